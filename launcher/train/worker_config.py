"""What a train worker is told. Any process: some only pass it on, so it imports nothing heavy."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.data.splits import Split
from launcher.rundir.directory import RunDir
from launcher.rundir.lease import Lease
from launcher.rundir.plan import Plan
from launcher.spec.fault_injection import Fault
from launcher.spec.job import JobSpec

if TYPE_CHECKING:
    from launcher.train.loggers.run_log import OnMetrics
    from launcher.train.preemption import ControlClient


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker is told; pickled to it."""

    run: RunDir
    job: JobSpec
    plan: Plan
    splits: dict[str, Split]
    on_metrics: "OnMetrics | None" = None
    control: "ControlClient | None" = None
    """Asked whether the training should stop."""
    evaluate_only: str | None = None
    """Score this split with the job's model and do nothing else."""
    resume_step: int = 0
    """Step of the checkpoint to go on from; 0 for none."""
    lease: Lease | None = None
    """Under which a training writes."""
    export_to: RunDir | None = None
    """Publish the weights of the checkpoint `start` there and do nothing else."""
    faults: tuple[Fault, ...] = ()
    """That are to happen."""
