"""Runs worker groups until a run is complete, and restarts them after failures. Runs on the head (the driver).

Each attempt resumes from the newest valid checkpoint, under its own lease, with as many workers as the cluster can
hold. Which failures are retried: `failure_policy.py`; how many workers: `scaling_policy.py`; one attempt:
`worker_group.py`.
"""

from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console

from launcher.data.ray_data import DeterministicDataConfig
from launcher.data.windows import TRAIN
from launcher.driver.control import ControlChannel
from launcher.driver.failure_policy import FailurePolicy
from launcher.driver.preflight import is_finished
from launcher.driver.prepare import PreparedJob, prepare
from launcher.driver.scaling_policy import ScalingPolicy, with_workers
from launcher.driver.signals import interruptible_sleep
from launcher.driver.worker_group import WorkerGroupConfig, run_worker_group
from launcher.errors import (
    CorruptCheckpointError,
    NonFiniteLossError,
    RunInterrupted,
    StorageUnavailableError,
    TrainingError,
    WorkerLostError,
)
from launcher.formatting import print_line
from launcher.rundir.events import record_event
from launcher.rundir.lease import Lease
from launcher.rundir.metrics_log import summarize
from launcher.rundir.recovery import read_reductions
from launcher.spec.fault_injection import Fault
from launcher.spec.job import JobSpec
from launcher.train.checkpoint import catalog
from launcher.train.entrypoint import train_loop_per_worker
from launcher.train.loggers import prometheus
from launcher.train.worker_config import WorkerConfig

_MAX_CORRUPT_CHECKPOINTS = 5
"""Checkpoints that one command may find corrupt before it blames the storage."""


@dataclass
class TrainController:
    """One command's attempts to complete a run (the counterpart of Ray Train V2's `TrainController`).

    Args:
        prepared: Prepared job; planned again when the number of workers or the micro-batch changes.
        requested_job: Job as the user gave it, from which it is planned again.
        console: Console for what happens.
        control: Channel to and from the workers.
        lease: Right to write to the run; each attempt renews it, which fences off workers of earlier ones.
        faults: Faults to inject.
    """

    prepared: PreparedJob
    requested_job: JobSpec
    console: Console
    control: ControlChannel
    lease: Lease
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        self._run = self.prepared.run
        self._failure_policy = FailurePolicy(self.prepared.job.fault_tolerance)
        self._scaling_policy = ScalingPolicy(self.requested_job)
        # The plan already follows the reductions of earlier commands; only a new one is a reason to restart.
        self._known_reductions = len(read_reductions(self._run))
        self._corrupt_checkpoints = 0
        self._last_progress = (0, 0)

    def run(self) -> None:
        """Run the worker group to completion, restarting it after recoverable failures.

        Every attempt resumes from the newest valid checkpoint, with as many workers as the cluster can hold.

        Raises:
            RunInterrupted: The user asked to stop. A checkpoint has been saved.
            UserError: A restart cannot succeed before the user fixes something.
            TrainingError: The failure is permanent, or `fault_tolerance.max_failures` is exceeded.
        """
        while True:
            try:
                # Asked before each attempt: the workers may have finished although their group failed afterwards.
                if is_finished(self.prepared):
                    return
                self._run_attempt()
            # From a worker or from the driver's own reads. It may pass, so it counts like a lost worker.
            except StorageUnavailableError as error:
                self._handle_failure(WorkerLostError(error.message))
            # These two are TrainingErrors as well, so they come before its handler. The workers have quarantined or
            # removed the checkpoint, so the next attempt takes an older one.
            except CorruptCheckpointError as error:
                self._handle_corrupt_checkpoint(error)
            except NonFiniteLossError as error:
                # Not counted as a failure: `train/non_finite.py` limits how many batches a run may skip.
                step = catalog.latest_step(self._run)
                self._log(f"{error.message}: resuming from step {step}, without the batch")
            except TrainingError as error:
                # The first error to arrive may be any worker's; the record in the run says if memory ran out.
                if not self._apply_micro_batch_reduction():
                    self._handle_failure(error)
            else:
                self._handle_early_exit()

    def _run_attempt(self) -> None:
        """Start all workers from the newest valid checkpoint and wait until they exit.

        The order matters: the number of workers decides the plan, the step comes from the checkpoints that are valid
        now, and only with the renewed lease can no worker of an earlier attempt write any more.
        """
        self._resize()
        resume_step = self._latest_valid_step()
        self.lease = self.lease.renew(resume_step)
        self._remove_stale_ray_dirs()
        job, plan, splits = self.prepared.job, self.prepared.plan, self.prepared.splits
        data = DeterministicDataConfig(job, plan, splits, resume_step)
        config: dict[str, object] = {
            "worker": WorkerConfig(
                self._run, job, plan, splits, on_metrics=self.control.client, control=self.control.client,
                resume_step=resume_step, lease=self.lease, faults=self.faults,
            )
        }  # fmt: skip
        if data.names((TRAIN,)):
            config["stream"] = TRAIN
        streams = (TRAIN, "test") if "test" in splits else (TRAIN,)
        group = WorkerGroupConfig(job, self._run, data, streams, self._ray_dir())
        self.control.begin()
        with self._scaling_policy.watch_capacity(job, self.control.request_restart):
            run_worker_group(group, train_loop_per_worker, config, self.control.request_stop)

    def _resize(self) -> None:
        """Plan for as many workers as the cluster can hold now."""
        before = self.prepared.job.cluster.workers
        workers = self._scaling_policy.next_workers(self._log)
        if workers == before:
            return
        text = f"continuing with {workers} workers instead of {before}; the loss curve stays the same"
        record_event(self._run, "resized", catalog.latest_step(self._run), text)
        self._log(text)
        self._plan_for(workers)

    def _plan_for(self, workers: int) -> None:
        # From the job as requested: in the resolved one, `auto` is already a number, chosen for another number of
        # workers.
        self.prepared = prepare(with_workers(self.requested_job, workers), measure=True)
        self._run.write_record("plan.json", self.prepared.plan)

    def _latest_valid_step(self) -> int:
        """Return the step of the newest checkpoint that is complete; quarantine those that are corrupt.

        Returns:
            0 for a run without checkpoints.

        Raises:
            StorageUnavailableError: The storage does not answer for now.
            RunError: A newer version of the launcher wrote the checkpoint, or every checkpoint is corrupt.
        """
        while step := catalog.latest_step(self._run):
            # Records and file sizes only. The workers verify the hashes, as they read the files anyway.
            damage = catalog.find_corruption(self._run, step)
            if damage is None:
                return step
            catalog.quarantine(self._run, step, damage)
            self._log(f"the checkpoint of step {step} is damaged ({damage}) and not used")
        # Never from step 0 without a word while quarantined checkpoints exist: one of them may be restored.
        catalog.check_restart_from_zero(self._run)
        return 0

    def _ray_dir(self) -> str:
        return f"ray-{self.lease.token:06d}"

    def _remove_stale_ray_dirs(self) -> None:
        """Remove Ray Train's own directories of attempts whose driver was killed."""
        for name in self._run.list(""):
            # Names compare like tokens because these are padded to six digits.
            if name.startswith("ray-") and name < self._ray_dir():
                self._run.delete(name)

    def _handle_corrupt_checkpoint(self, error: CorruptCheckpointError) -> None:
        self._corrupt_checkpoints += 1
        if self._corrupt_checkpoints > _MAX_CORRUPT_CHECKPOINTS:
            raise TrainingError(
                f"{error.message}; it is corrupt checkpoint number {self._corrupt_checkpoints}: check the storage"
            ) from error
        self._log(error.message)

    def _apply_micro_batch_reduction(self) -> bool:
        """Return True if memory ran out and the workers can restart with smaller micro-batches; plan for them."""
        reductions = read_reductions(self._run)
        # A step that was repeated in place (ZeRO 0 and 1) needs no restart, so the error must have another cause.
        if len(reductions) == self._known_reductions or not reductions[-1].restarted:
            return False
        self._known_reductions = len(reductions)
        self._log(reductions[-1].sentence())
        self._plan_for(self.prepared.job.cluster.workers)
        return True

    def _handle_failure(self, error: TrainingError) -> None:
        """Record a failure and wait until the next attempt may start.

        Raises:
            TrainingError: There is no next attempt.
            RunInterrupted: A signal arrived during the wait.
        """
        # Only a lost worker may do better next time; anything else would fail again.
        if not isinstance(error, WorkerLostError):
            raise error
        kind = "worker-lost"
        step, newest = self._read_progress()
        after = f" after step {step}"
        if self.control.hang is not None:
            # Workers that Ray ended before their next heartbeat have written no stacks.
            stacks = f"; stacks in {self._run.path('hangs')}" if self._run.list("hangs") else ""
            error = WorkerLostError(f"{self.control.hang}{stacks}")
            kind = "hang"
            # The sentence about the hang names the step.
            after = ""
        # Raises when the limit is reached, so before an event says that the run resumes.
        wait_s = self._failure_policy.decide(error, step)
        prometheus.count_failure(self.prepared.job, prometheus.LOST)
        text = f"{error.message}{after}; resuming from step {newest}"
        record_event(self._run, kind, step, text)
        when = f"in {wait_s:g} s" if wait_s else "now"
        self._log(f"{text} {when} ({self._failure_policy.summary()})")
        interruptible_sleep(
            wait_s, f"interrupted; run the same command again to resume from the last checkpoint in {self._run.uri}"
        )

    def _read_progress(self) -> tuple[int, int]:
        """Return the last step of the log and that of the newest checkpoint.

        Returns:
            The last known ones while the storage does not answer.
        """
        with suppress(StorageUnavailableError):
            self._last_progress = (summarize(self._run).step, catalog.latest_step(self._run))
        return self._last_progress

    def _handle_early_exit(self) -> None:
        """Say why the workers saved a checkpoint and exited before the run was complete, if they did.

        Raises:
            RunInterrupted: The user asked them to.
        """
        try:
            if is_finished(self.prepared):
                return
            step = catalog.latest_step(self._run)
        except StorageUnavailableError:
            # `run` asks again and handles it.
            return
        # The user's stop comes first: a resize or a preemption at the same time would start another attempt.
        if self.control.is_stop_requested:
            raise RunInterrupted(f"stopped after step {step}, which is saved; run the same command again to resume")
        if self._scaling_policy.resize_requested:
            # `_resize` says so.
            return
        # A preemption is not counted by the failure policy: nothing is lost, and a run may be preempted any number of
        # times.
        prometheus.count_failure(self.prepared.job, prometheus.PREEMPTED)
        text = f"a node is preempted: step {step} is saved, resuming on other nodes"
        record_event(self._run, "preempted", step, text)
        self._log(text)

    def _log(self, text: str) -> None:
        print_line(self.console, text)
