"""The workers of a trial: the training loop from evaluation to evaluation, in processes that outlive the trial.

A process trains one trial after another. What stays warm between trials: imports, the process group, encoded rows
(`data/in_memory.py`) and the page cache. What each trial builds anew: task, model, engine, optimizer, stream and log.
Train workers; read `trial.py` next, which Ray Tune drives.
"""

import gc
import os
import socket
from collections.abc import Generator
from dataclasses import dataclass

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher.data.in_memory import InMemorySource, iter_shards_in_memory
from launcher.data.stream import ShardStream
from launcher.data.windows import train_windows
from launcher.driver.prepare import PreparedJob
from launcher.driver.ray_errors import unwrap_ray_error
from launcher.errors import MicroBatchOOMError, TrainingError
from launcher.rundir.directory import RunDir
from launcher.rundir.records import ResultRecord, TrainerState
from launcher.tasks import build_task
from launcher.train.checkpoint import catalog, reader
from launcher.train.checkpoint.writer import CheckpointWriter
from launcher.train.engine import Engine
from launcher.train.fault_injection import FaultInjector
from launcher.train.loggers.run_log import RunLog
from launcher.train.loop import INITIAL_STATE, EvaluationEvent, TrainContext, train

_ERROR_WAIT_S = 5.0
"""Time to wait for the error of another worker after one has failed."""


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint that a trial resumes from.

    Args:
        uri: Run directory of the checkpoint: the trial's own, or a copy of another trial's (PBT).
        step: Step of the checkpoint.
    """

    uri: str
    step: int


@dataclass
class _Training:
    """A trial that is being trained."""

    context: TrainContext
    log: RunLog
    events: Generator[EvaluationEvent, None, ResultRecord | None]
    state: TrainerState
    """State at the last evaluation: a checkpoint can be saved from it."""


class TrialWorker:
    """One worker, which trains one trial after another.

    Args:
        rank: Rank of this worker in its group.
        world_size: Number of workers of a trial.
        address: Address of rank 0, `tcp://host:port`.
    """

    def __init__(self, rank: int, world_size: int, address: str) -> None:
        has_gpu = torch.cuda.is_available()
        # Ray sets CUDA_VISIBLE_DEVICES to this worker's own GPU, so its local rank is always 0.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
        # Collective: returns once all ranks have connected. Formed once per process, and reused by all trials.
        dist.init_process_group("nccl" if has_gpu else "gloo", init_method=address, rank=rank, world_size=world_size)
        self._rank = rank
        self._training: _Training | None = None

    def begin(self, prepared: PreparedJob, start: CheckpointRef | None) -> None:
        """Build the model, load the checkpoint and open the data stream of a trial. Collective."""
        # First: otherwise two models would be in memory at once.
        self.end()
        job = prepared.job
        # Global state of the process: set for every trial, because the trial before may have had the other value.
        torch.use_deterministic_algorithms(job.train.deterministic)
        if not torch.cuda.is_available():
            torch.set_num_threads(job.train.threads)
        task = build_task(job)
        # No generator state carries over from the trial before: new weights are drawn from job.seed inside `fork_rng`,
        # and `Engine.seed` reseeds dropout at every step.
        engine = Engine(job, task, prepared.plan.micro_batch)
        state = INITIAL_STATE
        if start is not None:
            state = reader.load(RunDir(start.uri), engine, start.step)
        log = RunLog(prepared.run, job, None, state)
        # Without a lease the writer never works in the background. `TrialActor.save_checkpoint` relies on that.
        writer = CheckpointWriter(prepared.run, job, engine)
        context = TrainContext(
            prepared.run, job, prepared.plan, task, engine, prepared.splits, writer, FaultInjector(prepared.run)
        )
        source = InMemorySource(job, prepared.splits, engine.world_size)
        stream = ShardStream(iter_shards_in_memory(source, train_windows(prepared.plan, job, state.step), engine.rank))
        self._training = _Training(context, log, train(context, stream, log, state), state)

    def advance(self) -> EvaluationEvent | None:
        """Train to the next evaluation, or return None after the last step. Collective.

        Raises:
            TrainingError: The loss is not finite. Raised on all ranks, which stay usable.
            MicroBatchOOMError: This rank ran out of memory. With several workers the group is unusable afterwards.
        """
        training = self._training
        assert training is not None
        try:
            event = next(training.events)
        except StopIteration:
            return None
        except MicroBatchOOMError:
            if dist.get_world_size() > 1:
                # The other ranks wait inside a collective, which fails now.
                self.leave_group()
            raise
        except TrainingError:
            raise
        except BaseException:
            # Else the other ranks would wait for this one inside a collective.
            self.leave_group()
            raise
        training.state = event.state
        return event

    def save(self) -> int:
        """Save a checkpoint of the last evaluation's state unless there is one, and return its step. Collective."""
        training = self._training
        assert training is not None
        run, step = training.context.run, training.state.step
        # Rank 0 decides for all: each rank's own look at the storage could differ, and some would skip the save.
        exists = [step in catalog.complete_steps(run)]
        dist.broadcast_object_list(exists)
        if not exists[0]:
            training.context.writer.save(training.state)
        return step

    def end(self) -> None:
        """Free the trial's model. The process and its group stay warm."""
        if self._training is None:
            return
        self._training.events.close()
        self._training.log.close()
        self._training.context.engine.close()
        self._training = None
        # Engine and model reference each other, so only the cycle collector frees their memory.
        gc.collect()

    def leave_group(self) -> None:
        """End the trial and destroy the process group, so that collectives of the other ranks fail."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self.end()


@ray.remote
class RemoteTrialWorker(TrialWorker):
    """A worker of rank 1 or higher, in its own process."""


class TrialWorkerGroup:
    """All workers of a trial: rank 0 in this process, the others in the bundles of this actor's placement group.

    A process forms only one group, because DeepSpeed 0.19.8 caches groups in globals (`deepspeed/utils/groups.py`). All
    trials of an actor have the same number of workers: Ray 2.60 reuses an actor only for a trial with the same
    placement group factory (`_actor_cache` of `ray/tune/execution/tune_controller.py`).

    Args:
        world_size: Number of workers.
    """

    def __init__(self, world_size: int) -> None:
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            # The port is free again before rank 0 listens on it. If another process takes it, the trial fails; it is
            # retried under `tune.retries`, which is 0 by default.
            probe.bind((host, 0))
            address = f"tcp://{host}:{probe.getsockname()[1]}"
        group = ray.util.get_current_placement_group()
        assert group is not None, "Ray Tune gives each trial a placement group"
        self._others = []
        for rank in range(1, world_size):
            resources = group.bundle_specs[rank]
            bundle = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            options = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0)}
            worker = RemoteTrialWorker.options(scheduling_strategy=bundle, **options)  # type: ignore[attr-defined]  # ray adds it
            self._others.append(worker.remote(rank, world_size, address))
        # Last, because it blocks until all ranks have joined the process group.
        self._own = TrialWorker(0, world_size, address)

    @property
    def size(self) -> int:
        """Number of workers."""
        return 1 + len(self._others)

    def begin(self, prepared: PreparedJob, start: CheckpointRef | None) -> None:
        """Begin a trial on all workers."""
        self._call_all("begin", prepared, start)

    def advance(self) -> EvaluationEvent | None:
        """Train to the next evaluation on all workers, and return rank 0's event; None after the last step."""
        event = self._call_all("advance")
        assert event is None or isinstance(event, EvaluationEvent)
        return event

    def save(self) -> int:
        """Save a checkpoint on all workers, and return its step."""
        return int(str(self._call_all("save")))

    def close(self) -> None:
        """End the trial and the other processes."""
        self._own.leave_group()
        for worker in self._others:
            # Not a call: the worker may hang inside a collective and would never answer.
            ray.kill(worker)

    def _call_all(self, method: str, *args: object) -> object:
        """Call a method on all workers at once and return rank 0's result. Most methods are collectives."""
        # The other ranks first: rank 0's own call blocks in this process until they have joined its collectives.
        pending = [getattr(worker, method).remote(*args) for worker in self._others]
        try:
            result = getattr(self._own, method)(*args)
            # All ranks have left this call before the next one begins.
            ray.get(pending)
        except TrainingError:
            raise
        except Exception as error:
            # If another rank failed first, rank 0 only sees a broken connection: report the cause instead.
            cause = self._find_remote_error(pending)
            if cause is None:
                raise
            raise cause from error
        return result

    def _find_remote_error(self, pending: "list[ray.ObjectRef[object]]") -> Exception | None:
        if not pending:
            return None
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=_ERROR_WAIT_S)
        for result in ready:
            try:
                ray.get(result)
            except RayError as error:
                return unwrap_ray_error(error)
        return None
