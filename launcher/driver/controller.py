"""Starts train workers until a run is complete, whatever happens to them. Runs on the head (the driver).

Every start goes on from the newest good checkpoint, under a lease of its own, with as many workers as the cluster has
room for. What counts as a failure and how many are borne: `driver/failure_policy.py`.
"""

from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console

from launcher.data.ray_data import DeterministicDataConfig
from launcher.data.windows import TRAIN
from launcher.driver.control import ControlChannel
from launcher.driver.failure_policy import FailurePolicy
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


def is_finished(prepared: PreparedJob) -> bool:
    """Whether all that a job asks for is there."""
    run = prepared.run
    tested = "test" not in prepared.splits or run.exists("scores-test.json")
    return run.exists("result.json") and run.exists("model/config.json") and tested


_MOST_DAMAGES = 5
"""Checkpoints that one command finds damaged, or cannot keep, before it blames the storage."""


@dataclass
class TrainController:
    """One command's work on a run.

    Args:
        prepared: the job.
        asked: the job as the command was given it.
        console: where it says what happens.
        line: to the workers and from them.
        lease: under which the command works on the run; each start of workers renews it.
        faults: that are to happen.
    """

    prepared: PreparedJob
    requested_job: JobSpec
    console: Console
    control: ControlChannel
    lease: Lease
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        self._run = self.prepared.run
        self._failures = FailurePolicy(self.prepared.job.fault_tolerance)
        self._halvings = len(read_reductions(self._run))
        self._elastic = ScalingPolicy(self.requested_job)
        self._damages = 0
        self._seen = 0, 0

    def run(self) -> None:
        """Start workers, and again, until the run is complete.

        Raises:
            RunInterrupted: somebody asked to stop; the checkpoint is there.
            UserError: what no new start would mend.
            TrainingError: likewise, or too many failures.
        """
        while True:
            try:
                if is_finished(self.prepared):
                    return
                self._start()
            except StorageUnavailableError as trouble:
                self._handle_failure(WorkerLostError(trouble.message))
                continue
            except CorruptCheckpointError as damage:
                self._damages += 1
                if self._damages > _MOST_DAMAGES:
                    raise TrainingError(
                        f"{damage.message}; it is the {self._damages}th: look at the storage"
                    ) from damage
                self._say(damage.message)
                continue
            except NonFiniteLossError as bad:
                self._say(f"{bad.message}: going back to step {catalog.latest_step(self._run)}, its batch is left out")
                continue
            except TrainingError as error:
                # Any worker's error may be the first to be heard; what was written down tells whether memory ran out.
                if not self._halved():
                    self._handle_failure(error)
                continue
            self._handle_early_exit()

    def _start(self) -> None:
        """One start of all workers, from the newest checkpoint to the end, or to whatever ends it."""
        self._resize()
        start = self._latest_valid_step()
        self.lease = self.lease.renew(start)
        self._clear_notes()
        job, plan, splits = self.prepared.job, self.prepared.plan, self.prepared.splits
        data = DeterministicDataConfig(job, plan, splits, start)
        post, lease = self.control.client, self.lease
        order = WorkerConfig(
            self._run, job, plan, splits, post, post, resume_step=start, lease=lease, faults=self.faults
        )
        streams = (TRAIN, "test") if "test" in splits else (TRAIN,)
        config: dict[str, object] = {"order": order}
        if data.names((TRAIN,)):
            config["stream"] = TRAIN
        self.control.begin()
        with self._elastic.watch_capacity(job, self.control.request_restart):
            it = WorkerGroupConfig(job, self._run, data, streams, f"ray-{self.lease.token:06d}")
            run_worker_group(it, train_loop_per_worker, config, self.control.request_stop)

    def _resize(self) -> None:
        """Plan for as many workers as there is room for."""
        workers = self._elastic.next_workers(self._say)
        if workers == self.prepared.job.cluster.workers:
            return
        text = f"{workers} workers from here on, where there were {self.prepared.job.cluster.workers}; same curve"
        record_event(self._run, "resized", catalog.latest_step(self._run), text)
        self._say(text)
        self._plan_for(workers)

    def _plan_for(self, workers: int) -> None:
        self.prepared = prepare(with_workers(self.requested_job, workers), measure=True)
        self._run.write_record("plan.json", self.prepared.plan)

    def _latest_valid_step(self) -> int:
        """Return the step of the newest checkpoint that looks whole; put aside those that do not.

        Returns:
            0 for a run that has none yet.

        Raises:
            StorageUnavailableError: The storage does not tell, for now.
            RunError: A newer version of the launcher wrote it, or none of those that are there can be used.
        """
        while step := catalog.latest_step(self._run):
            damage = catalog.find_corruption(self._run, step)
            if damage is None:
                return step
            catalog.quarantine(self._run, step, damage)
            self._say(f"the checkpoint of step {step} is damaged ({damage}) and not used")
        catalog.check_restart_from_zero(self._run)
        return 0

    def _clear_notes(self) -> None:
        """What Ray Train kept for itself in starts whose driver was killed."""
        for name in self._run.list(""):
            if name.startswith("ray-") and name < f"ray-{self.lease.token:06d}":
                self._run.delete(name)

    def _halved(self) -> bool:
        """Whether memory ran out and the workers may start again with smaller micro-batches."""
        told = read_reductions(self._run)
        if len(told) == self._halvings or not told[-1].restarted:
            return False
        self._halvings = len(told)
        self._say(told[-1].sentence())
        self._plan_for(self.prepared.job.cluster.workers)
        return True

    def _handle_failure(self, error: TrainingError) -> None:
        """Wait for the next start.

        Raises:
            TrainingError: there is none.
        """
        if not isinstance(error, WorkerLostError):
            raise error
        kind, hang = "worker-lost", self.control.hang
        if hang is not None:
            # Workers that Ray ended first have left none.
            stacks = f"; stacks in {self._run.path('hangs')}" if self._run.list("hangs") else ""
            kind, error = "hang", WorkerLostError(f"{hang}{stacks}")
        step, newest = self._look()
        wait_s = self._failures.decide(error, step)
        prometheus.count_failure(self.prepared.job, prometheus.LOST)
        after = "" if hang is not None else f" after step {step}"  # a hang names its own
        text = f"{error.message}{after}; going on from step {newest}"
        record_event(self._run, kind, step, text)
        self._say(f"{text} {f'in {wait_s:g} s' if wait_s else 'at once'} ({self._failures.said()})")
        interruptible_sleep(
            wait_s, f"interrupted; the same command goes on from the last checkpoint in {self._run.uri}"
        )

    def _look(self) -> tuple[int, int]:
        """Return the last step of the log and the newest checkpoint's; the last known where the storage is silent."""
        with suppress(StorageUnavailableError):
            self._seen = summarize(self._run).step, catalog.latest_step(self._run)
        return self._seen

    def _handle_early_exit(self) -> None:
        """Say why the workers left early, with a checkpoint, if they did.

        Raises:
            RunInterrupted: because they were asked to.
        """
        try:
            if is_finished(self.prepared):
                return
            step = catalog.latest_step(self._run)
        except StorageUnavailableError:
            return  # borne where it is asked again
        if self.control.is_stop_requested:
            raise RunInterrupted(f"stopped after step {step}, which is saved; the same command goes on from there")
        if self._elastic.has_grown:
            return  # the next start tells
        prometheus.count_failure(self.prepared.job, prometheus.PREEMPTED)
        text = f"a node is being taken away: step {step} is saved, going on with other nodes"
        record_event(self._run, "preempted", step, text)
        self._say(text)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
