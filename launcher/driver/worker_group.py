"""Starts train workers through Ray Train and tells what went wrong in one error. Runs on the head (the driver).

The function that each worker runs comes from above (`launcher/train/worker.py`); the loop itself is `loop.py`.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from launcher.data.ray_data import TASK_CPUS, DeterministicDataConfig
from launcher.driver.library_logs import silence_ray_messages
from launcher.driver.ray_errors import unwrap_ray_error
from launcher.driver.signals import ForcedStop, run_interruptibly
from launcher.errors import ClusterError, RunInterrupted
from launcher.processes import fork_client, local_ray
from launcher.processes.ray_address import check_address
from launcher.rundir.directory import RunDir
from launcher.rundir.uri import SETTINGS, open_uri
from launcher.spec.job import JobSpec

# What workers may see of the driver's environment beside job.cluster.pass_env: no secrets among them.
_ENV = ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TORCH_HOME", "TOKENIZERS_PARALLELISM", "DS_ACCELERATOR",
        "CUDA_HOME", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "OPENBLAS_CORETYPE",
        "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR", *SETTINGS)  # fmt: skip


# Ray Train's controller asks the workers every 2 s whether they live, and sees a loss no sooner. Asking so few of them
# more often costs nothing; one that does not answer in time is a loss only after ten minutes.
_FEW_WORKERS = 16


def _no_retries(elastic: bool) -> FailureConfig:
    """Whatever ends a group ends the fit; one that finds no room waits for it, unless its size may change."""
    # Typed as Train V1's.
    return FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0 if elastic else -1)  # type: ignore[call-arg]


@contextmanager
def ray_session(job: JobSpec, at_once: int = 1) -> Iterator[None]:
    """Connect to a Ray inside the block: the one already joined, the job's cluster, or one of this machine alone.

    Args:
        job: The job; says what it asks of a cluster.
        at_once: Number of such jobs that a local Ray has room for.

    Raises:
        ClusterError: The cluster cannot be reached, or is too small for the job.
    """
    if ray.is_initialized():
        yield
        return
    address = job.cluster.address or os.environ.get("RAY_ADDRESS")
    check_address(job.cluster.address)
    if not logging.getLogger("ray").isEnabledFor(logging.WARNING):  # as it is with --debug
        silence_ray_messages()
    environment = {name: os.environ[name] for name in (*_ENV, *job.cluster.pass_env) if name in os.environ}
    runtime_env: dict[str, Any] = {"env_vars": environment}
    if address:
        executable = fork_client.ray_executable()
        runtime_env |= {} if executable is None else {"py_executable": executable}
        _connect(address, runtime_env)
    else:
        _connect(_local_address(job, at_once), runtime_env)
    try:
        check_resources(job)
        yield
    finally:
        ray.shutdown()


def _local_address(job: JobSpec, at_once: int) -> str:
    try:
        return local_ray.start_for_command(local_ray.local_cpus(job.cluster.logical_cpus(at_once))).address()
    except local_ray.LocalRayError as error:
        raise ClusterError(f"{error}; see /tmp/ray/session_latest/logs, or set cluster.address to a cluster") from error


def _connect(address: str, runtime_env: dict[str, Any]) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"cluster.address: no Ray cluster at {address} ({str(error).splitlines()[0]}); start one, or leave the "
            "address out for a local one"
        ) from error


def check_resources(job: JobSpec) -> None:
    """Compare what the job reserves with what the cluster has.

    Raises:
        ClusterError: it would wait for ever.
    """
    cluster = job.cluster
    if cluster.kubernetes is not None and cluster.kubernetes.autoscales:
        return  # nodes come when workers wait for them
    have = ray.cluster_resources()
    workers = cluster.min_workers or cluster.workers
    wants = {"CPU": workers * cluster.cpus_per_worker, "GPU": workers * cluster.gpus_per_worker}
    for kind, amount in wants.items():
        if amount > have.get(kind, 0.0):
            raise ClusterError(
                f"cluster.workers: {workers} workers need {amount:g} {kind}, the cluster has "
                f"{have.get(kind, 0.0):g}; ask for fewer workers or fewer {kind}s per worker"
            )


def worker_resources(job: JobSpec) -> dict[str, float]:
    """What Ray reserves for one worker.

    A little of each worker's CPUs is left to the stream's tasks and the driver: where the workers take a whole node, or
    all that a lost node leaves, they would wait for ever.
    """
    cluster = job.cluster
    cpus = max(TASK_CPUS, cluster.cpus_per_worker - TASK_CPUS * (cluster.most_data_workers + 1))
    return {"CPU": cpus} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker > 0 else {})


def max_workers_available(job: JobSpec) -> int:
    """How many workers of a job the nodes of the cluster hold; those that are gone, or about to go, are not counted."""
    needs, leaving = worker_resources(job), _draining_node_ids()
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    with ThreadPoolExecutor(_PROBES) as probes:
        nodes = [node["Resources"] for node, here in zip(alive, probes.map(_answers, alive), strict=True) if here]
    return sum(min(int(has.get(kind, 0.0) / amount + 1e-9) for kind, amount in needs.items()) for has in nodes)


def _answers(node: Mapping[str, Any]) -> bool:
    """Whether a node's raylet can be reached: Ray itself takes half a minute to notice that it is gone."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _PROBE_S).close()
    except OSError:
        return False
    return True


def _draining_node_ids() -> set[str]:
    """Nodes that drain: they live, and take no new work."""
    # As Ray Train's own watcher asks (ray 2.60, train/v2/_internal/execution/preemption.py).
    return set(ray._private.state.state.get_draining_nodes() or ())


_PROBES, _PROBE_S = 32, 3.0


@dataclass(frozen=True)
class WorkerGroupConfig:
    """One start of a worker group.

    Args:
        job: workers and resources.
        run: the run.
        data: deals the streams.
        streams: names of the data sets workers will ask for.
        notes: directory of the run in which Ray Train keeps notes of its own meanwhile.
    """

    job: JobSpec
    run: RunDir
    data: DeterministicDataConfig
    streams: tuple[str, ...]
    notes: str = "ray"


def run_worker_group(
    it: WorkerGroupConfig,
    worker: Callable[[dict[str, object]], None],
    config: dict[str, object],
    ask_stop: Callable[[], bool],
) -> None:
    """Run `worker(config)` in every train worker and wait.

    Args:
        it: what to start.
        worker: runs in every train worker.
        config: its argument.
        ask_stop: asks the workers to save and leave, at SIGTERM or Ctrl-C; False when there is nothing to save.

    Raises:
        RunInterrupted: by a signal, before the workers could leave by themselves.
        LauncherError: what a worker or the stream raised on purpose, as itself.
        WorkerLostError: they were lost, or broke down; a new start may go on.
        TrainingError: anything else that ended them.
    """
    cluster, resources = it.job.cluster, worker_resources(it.job)
    gpu = cluster.gpus_per_worker > 0
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if cluster.workers <= _FEW_WORKERS:
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    storage, place = open_uri(it.run.uri)
    trainer = _DataParallelTrainer(
        worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=cluster.workers, use_gpu=gpu, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        # Ray opens a URI in its own way, without its options (`?endpoint_override=`).
        # A group that ends is started again by `driver/controller.py` alone, which knows from where.
        run_config=RunConfig(
            name=it.notes,
            storage_filesystem=storage,
            storage_path=place,
            failure_config=_no_retries(elastic=cluster.min_workers is not None),
        ),
        # Placeholders: DeterministicDataConfig.configure puts the canonical stream in their place at every start.
        datasets={name: _placeholder for name in it.data.names(it.streams)},
        dataset_config=it.data,
    )
    try:
        # Off the main thread, where Ray Train would put its own SIGINT handler, which exits without a word.
        run_interruptibly(trainer.fit, ask_stop)
    except ForcedStop as stop:
        raise RunInterrupted(
            f"interrupted; the same command goes on from the last checkpoint in {it.run.uri}"
        ) from stop
    except Exception as error:  # process border: Ray wraps whatever a worker raised; it is raised again below
        _free_reserved()
        raise unwrap_ray_error(error) from error
    finally:
        it.run.delete(it.notes)


class _DataParallelTrainer(TorchTrainer):
    """Ray Train without its actor that frees what a dead controller had reserved, as `_free_reserved` does that.

    The actor asks the dashboard, which a local Ray does not have, and the end of a run would wait 12 s for it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # typed as Train V1's
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def _free_reserved() -> None:
    """Remove the placement groups of this driver: a controller that was killed leaves its own."""
    job = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name.endswith(job) and group["state"] != "REMOVED":  # the id of a group ends with that of its job
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))


def _placeholder() -> "ray.data.Dataset":
    return ray.data.range(1)
