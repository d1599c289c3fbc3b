"""Connects to Ray and runs one worker group through Ray Train. Runs on the head (the driver).

Each worker runs `train/entrypoint.py`; the training loop is `train/loop.py`. `driver/controller.py` restarts groups.
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

# Environment variables that workers inherit from the driver, in addition to job.cluster.pass_env. None holds a secret.
_ENV = ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TORCH_HOME", "TOKENIZERS_PARALLELISM", "DS_ACCELERATOR",
        "CUDA_HOME", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "OPENBLAS_CORETYPE",
        "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR", *SETTINGS)  # fmt: skip

# Ray Train's controller polls its workers every 2 s (ray 2.60, RAY_TRAIN_HEALTH_CHECK_INTERVAL_S) and sees a loss no
# sooner. With few workers polling more often costs nothing; a worker that does not answer counts as lost after 10 min.
_FEW_WORKERS = 16
_NODE_PROBES, _NODE_PROBE_S = 32, 3.0


@contextmanager
def ray_session(job: JobSpec, concurrent_jobs: int = 1) -> Iterator[None]:
    """Connect to Ray inside the block: to the session that is open, the job's cluster, or a local Ray.

    Args:
        job: Job with the address and the size of the cluster.
        concurrent_jobs: Number of such jobs that a local Ray must hold at the same time.

    Raises:
        ClusterError: The cluster cannot be reached, or is too small for the job.
    """
    if ray.is_initialized():
        yield
        return
    address = job.cluster.address or os.environ.get("RAY_ADDRESS")
    check_address(job.cluster.address)
    if not logging.getLogger("ray").isEnabledFor(logging.WARNING):  # unless --debug is on
        silence_ray_messages()
    environment = {name: os.environ[name] for name in (*_ENV, *job.cluster.pass_env) if name in os.environ}
    runtime_env: dict[str, Any] = {"env_vars": environment}
    if address:
        executable = fork_client.ray_executable()
        if executable is not None:
            runtime_env["py_executable"] = executable
    else:
        address = _start_local_ray(job, concurrent_jobs)
    _connect(address, runtime_env)
    try:
        check_resources(job)
        yield
    finally:
        ray.shutdown()


def _start_local_ray(job: JobSpec, concurrent_jobs: int) -> str:
    """Start a Ray on this machine, or find the one that the command has begun; return its address."""
    try:
        return local_ray.start_for_command(local_ray.local_cpus(job.cluster.logical_cpus(concurrent_jobs))).address()
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
    """Compare the resources that the job reserves with those of the cluster.

    Raises:
        ClusterError: The job would wait forever.
    """
    cluster = job.cluster
    if cluster.kubernetes is not None and cluster.kubernetes.autoscales:
        return  # the autoscaler adds nodes once workers wait for them
    available = ray.cluster_resources()
    workers = cluster.min_workers or cluster.workers
    required = {"CPU": workers * cluster.cpus_per_worker, "GPU": workers * cluster.gpus_per_worker}
    for kind, amount in required.items():
        if amount > available.get(kind, 0.0):
            raise ClusterError(
                f"cluster.workers: {workers} workers need {amount:g} {kind}, the cluster has "
                f"{available.get(kind, 0.0):g}; ask for fewer workers or fewer {kind}s per worker"
            )


def worker_resources(job: JobSpec) -> dict[str, float]:
    """Return the resources that Ray reserves for one worker.

    A small part of each worker's CPUs stays free for Ray Data and the driver. Without it they would wait forever
    where the workers take a whole node, or all that is left after the loss of one.
    """
    cluster = job.cluster
    cpus = max(TASK_CPUS, cluster.cpus_per_worker - TASK_CPUS * (cluster.most_data_workers + 1))
    return {"CPU": cpus} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker > 0 else {})


def max_workers_available(job: JobSpec) -> int:
    """Return how many workers of a job the cluster can hold, on nodes that answer and do not drain."""
    required = worker_resources(job)
    draining = _draining_node_ids()
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    # In parallel: each node that is lost costs the whole timeout.
    with ThreadPoolExecutor(_NODE_PROBES) as probes:
        answers = list(probes.map(_is_reachable, alive))
    # All that a node has, not what is free: this run's own workers hold a part. So resources that other jobs hold count
    # too.
    resources = [node["Resources"] for node, is_reachable in zip(alive, answers, strict=True) if is_reachable]
    # Whole workers per node, as a worker cannot span two. The addition undoes rounding: 0.3 / 0.1 is below 3.
    return sum(min(int(node.get(kind, 0.0) / amount + 1e-9) for kind, amount in required.items()) for node in resources)


def _is_reachable(node: Mapping[str, Any]) -> bool:
    """Return True if a node's raylet accepts connections; Ray itself takes 30 s to mark a lost node as dead."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _NODE_PROBE_S).close()
    except OSError:
        return False
    return True


def _draining_node_ids() -> set[str]:
    """Return the nodes that drain: they are alive, and take no new work."""
    # Private, as there is no public call: the same one that Ray Train's own watcher makes (ray 2.60,
    # train/v2/_internal/execution/preemption.py).
    return set(ray._private.state.state.get_draining_nodes() or ())


@dataclass(frozen=True)
class WorkerGroupConfig:
    """Settings of one worker group.

    Args:
        job: Job with workers and resources.
        run: Run directory.
        data: Ray Data config that splits the streams among the workers.
        streams: Names of the data sets that workers ask for.
        ray_dir: Directory inside the run for Ray Train's own files; deleted when the group ends.
    """

    job: JobSpec
    run: RunDir
    data: DeterministicDataConfig
    streams: tuple[str, ...]
    ray_dir: str = "ray"


def run_worker_group(
    group: WorkerGroupConfig,
    train_fn: Callable[[dict[str, object]], None],
    train_fn_config: dict[str, object],
    request_stop: Callable[[], bool],
) -> None:
    """Run `train_fn(train_fn_config)` in every train worker and wait until all have returned.

    Args:
        group: Worker group to start.
        train_fn: Function that every train worker runs.
        train_fn_config: Argument of `train_fn`; pickled to the workers.
        request_stop: Function that asks the workers to save a checkpoint and exit, at SIGTERM or Ctrl-C; returns False
            if there is nothing to save.

    Raises:
        RunInterrupted: A signal arrived, and the workers could not exit by themselves.
        LauncherError: A worker or the stream raised it on purpose.
        WorkerLostError: Workers were lost or broke down; a restart may succeed.
        TrainingError: Anything else ended the workers.
    """
    trainer = _make_trainer(group, train_fn, train_fn_config)
    try:
        # In its own thread: on the main thread Ray Train installs a SIGINT handler that exits without a message.
        run_interruptibly(trainer.fit, request_stop)
    except ForcedStop as stop:
        raise RunInterrupted(
            f"interrupted; run the same command again to resume from the last checkpoint in {group.run.uri}"
        ) from stop
    except Exception as error:  # process border: Ray wraps whatever a worker raised; it is raised again below
        # At once: the next attempt needs these resources.
        _remove_placement_groups()
        raise unwrap_ray_error(error) from error
    finally:
        # Nothing of Ray Train's own is needed to resume: checkpoints and log are the launcher's.
        group.run.delete(group.ray_dir)


def _make_trainer(
    group: WorkerGroupConfig, train_fn: Callable[[dict[str, object]], None], train_fn_config: dict[str, object]
) -> TorchTrainer:
    cluster = group.job.cluster
    use_gpu = cluster.gpus_per_worker > 0
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if cluster.workers <= _FEW_WORKERS:
        # Ray Train passes this variable on to its controller; a value that the user has set stays.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A file system, as Ray would open the URI itself without its options (`?endpoint_override=`).
    file_system, storage_path = open_uri(group.run.uri)
    return _DataParallelTrainer(
        train_fn,
        train_loop_config=train_fn_config,
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=use_gpu, resources_per_worker=worker_resources(group.job)
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name=group.ray_dir,
            storage_filesystem=file_system,
            storage_path=storage_path,
            failure_config=_no_retries(is_elastic=cluster.min_workers is not None),
        ),
        # Placeholders: DeterministicDataConfig.configure replaces them with the canonical stream at every start.
        datasets={name: _placeholder for name in group.data.names(group.streams)},
        dataset_config=group.data,
    )


def _no_retries(is_elastic: bool) -> FailureConfig:
    """Return a config without retries: only `driver/controller.py` restarts a group, as it knows from which step.

    A group that does not fit waits for nodes, unless its size may change: then it fails, and the controller resizes it.
    """
    limit = 0 if is_elastic else -1
    # Ray's annotations are those of Train V1's class.
    return FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=limit)  # type: ignore[call-arg]


class _DataParallelTrainer(TorchTrainer):
    """Ray Train's trainer without the actor that frees what a dead controller reserved (ray 2.60).

    The actor asks the dashboard, which a local Ray does not have, so the end of a run would wait 12 s for it.
    `_remove_placement_groups` does its work.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # typed as Train V1's
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def _remove_placement_groups() -> None:
    """Remove the placement groups of this driver; a controller that was killed does not remove its own."""
    job_id = ray.get_runtime_context().get_job_id()
    for group_id, group in placement_group_table().items():
        if group_id.endswith(job_id) and group["state"] != "REMOVED":  # the id of a group ends with that of its job
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group_id)))


def _placeholder() -> "ray.data.Dataset":
    return ray.data.range(1)
