"""Configuration that the driver sends to its train workers. Any process; imports nothing heavy."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.data.splits import Split
from launcher.rundir.directory import RunDir
from launcher.rundir.lease import Lease
from launcher.rundir.plan import Plan
from launcher.spec.fault_injection import Fault
from launcher.spec.job import JobSpec

# Both modules import torch, which the driver must not load to send this.
if TYPE_CHECKING:
    from launcher.train.loggers.run_log import OnMetrics
    from launcher.train.preemption import ControlClient


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker trains, scores or exports; pickled to every rank."""

    run: RunDir
    job: JobSpec
    """Job with absolute paths and inferred labels."""
    plan: Plan
    splits: dict[str, Split]
    on_metrics: "OnMetrics | None" = None
    """Receives every line of metrics.jsonl on rank 0."""
    control: "ControlClient | None" = None
    """Receives heartbeats, and answers whether the workers should stop."""
    evaluate_only: str | None = None
    """Split to score with the run's model, instead of training."""
    resume_step: int = 0
    """Step of the checkpoint to resume from; 0 starts from the pretrained weights."""
    lease: Lease | None = None
    """Right to write to the run directory, while training."""
    export_to: RunDir | None = None
    """Run directory that receives the weights of checkpoint `resume_step`, instead of training."""
    faults: tuple[Fault, ...] = ()
    """Faults to inject."""
