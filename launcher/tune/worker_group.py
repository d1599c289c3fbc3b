"""All workers of a trial as one: called together, and asked who failed first. Train workers (rank 0 of each trial)."""

import socket

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher.driver.prepare import PreparedJob
from launcher.driver.ray_errors import unwrap_ray_error
from launcher.errors import TrainingError
from launcher.train.loop import EvaluationEvent
from launcher.tune.trial_worker import CheckpointRef, RemoteTrialWorker, TrialWorker


class TrialWorkerGroup:
    """All workers of a trial: rank 0 here, the others in the further bundles of this actor's placement group."""

    def __init__(self, world_size: int, threads: int) -> None:
        host = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((host, 0))
            address = f"tcp://{host}:{free.getsockname()[1]}"
        group = ray.util.get_current_placement_group()
        assert group is not None, "Ray Tune gives each trial a placement group"
        self._peers = []
        for rank in range(1, world_size):
            resources = group.bundle_specs[rank]
            placed = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            options = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0)}
            peer = RemoteTrialWorker.options(scheduling_strategy=placed, **options)  # type: ignore[attr-defined]  # ray adds it
            self._peers.append(peer.remote(rank, world_size, address, threads))
        self._own = TrialWorker(0, world_size, address, threads)

    @property
    def size(self) -> int:
        """Workers in it."""
        return 1 + len(self._peers)

    def begin(self, prepared: PreparedJob, start: CheckpointRef | None) -> None:
        self._together("begin", prepared, start)

    def advance(self) -> EvaluationEvent | None:
        pause = self._together("advance")
        assert pause is None or isinstance(pause, EvaluationEvent)
        return pause

    def save(self) -> int:
        return int(str(self._together("save")))

    def _together(self, method: str, *args: object) -> object:
        """Call it on all workers at once; what a peer raised first is the reason, if one did."""
        waiting = [getattr(peer, method).remote(*args) for peer in self._peers]
        try:
            answer = getattr(self._own, method)(*args)
            ray.get(waiting)
        except TrainingError:
            raise
        except Exception as error:  # process border: a peer's own reason is told rather than that it hung up
            found = self._reason(waiting)
            if found is None:
                raise
            raise found from error
        return answer

    def _reason(self, waiting: "list[ray.ObjectRef[object]]") -> Exception | None:
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=5) if waiting else ([], [])
        for answer in ready:
            try:
                ray.get(answer)
            except RayError as found:
                return unwrap_ray_error(found)
        return None

    def close(self) -> None:
        """End the trial and the group; the process forms no other, as DeepSpeed keeps the groups it has seen."""
        self._own.leave()
        for peer in self._peers:
            ray.kill(peer)
