"""Plan of a run: steps, windows, evaluations and memory, from the job file and facts about data and model.

Pure functions; runs on the client and the head. `driver/prepare.py` collects the facts, `check` prints the plan.
"""

from pydantic import Field

from launcher.rundir.records import Record
from launcher.spec.job import JobSpec

MAX_STEPS = 2**31 - 1
"""Limit on optimizer steps, so that step numbers fit into a signed 32-bit integer."""


class WorkerMemory(Record):
    """Estimated memory of one worker in bytes, on the device it trains on."""

    weights: int
    """Weights between two steps."""
    gradients: int
    """Gradients held until the step, or from one micro-batch to the next."""
    optimizer: int
    """Optimizer states, fp32 master weights, and the average of the weights (EMA)."""
    buffers: int
    """DeepSpeed's buffers at the peak: the bucket in which gradients are reduced, gathered weights."""
    activations: int
    """Activations of a micro-batch at the peak, including the batch and its loss."""
    peak: int
    """Largest sum at any time. Below the sum of the fields above, which peak at different times."""
    host: int
    """Offloaded states in CPU memory, in addition to the peak; on a CPU part of the peak."""
    disk: int = 0
    """Offloaded states in files below `parallel.offload_path`."""
    checkpoint: int
    """Size of one complete checkpoint, all workers together."""
    copy_bytes: int = 0
    """Staging copy of an asynchronous checkpoint on a CPU, in addition to the peak."""

    @property
    def needed(self) -> int:
        """Total bytes on the device that trains."""
        return self.peak + self.copy_bytes


class Plan(Record):
    """Content of plan.json: everything about a run that is known before it starts."""

    task: str
    train_rows: int
    validation_rows: int
    test_rows: int
    validation_sources: tuple[int, ...] = ()
    """Rows of each source of a mixture in the validation data; () without a mixture."""
    fingerprint: str
    """Hash that identifies the training data."""
    batch_size: int
    window_steps: int
    steps_per_epoch: int
    epochs: int
    total_steps: int
    evaluate_every_steps: int | None
    """None means at the end of each epoch."""
    metric: str
    """Metric that decides which checkpoint is best."""
    metric_mode: str
    workers: int
    zero: int
    samples_per_worker: int
    """Largest local batch: samples of a global batch on one worker."""
    virtual_ranks: int = 0
    """Parts that every global batch is cut into; 0 in older runs."""
    inexact: tuple[str, ...] = ()
    """Reasons why another number of workers may change the last bits; () if none that divides `virtual_ranks` does."""
    micro_batch: int
    accumulation: int
    """Micro-batches per step and worker."""
    model: dict[str, str | int | float | bool]
    """Facts about the model."""
    model_files: dict[str, str] = Field(default_factory=dict)
    """Hashes and sizes of the model's files, or a commit, to detect a changed model; {} in older runs."""
    parameters: int
    state_bytes_per_worker: int
    """Weights, gradients and optimizer states on one worker, without activations."""
    memory: WorkerMemory | None = None
    """Estimate for one worker; null if it was not measured."""
    memory_limit_bytes: int | None = None
    """Memory that a worker may use; null if unknown."""
    notes: tuple[str, ...] = ()
    """Warnings to read before a long run."""

    def evaluates_after(self, step: int) -> bool:
        """Return True if validation runs after `step` completed steps."""
        if not self.validation_rows:
            return False
        every = self.evaluate_every_steps or self.steps_per_epoch
        return step == self.total_steps or (step > 0 and step % every == 0)


def state_bytes(parameters: int, trained: int, job: JobSpec) -> int:
    """Return the bytes of weights, gradients and optimizer states per worker (ZeRO, arXiv:1910.02054, section 3).

    With AdamW, fp32 needs 4 + 4 + 8 bytes per parameter; bf16/fp16 needs 2 + 2 + 12, where the optimizer states
    include the fp32 master weights. Frozen parameters have weights only.

    Args:
        parameters: Number of parameters of the model.
        trained: Number of parameters that are not frozen.
        job: Job with precision, optimizer, ZeRO stage and workers.
    """
    full = job.train.precision == "fp32"
    weights, gradients, optimizer = (4, 4, 0) if full else (2, 2, 4)
    optimizer += _moment_bytes(job)
    workers, zero = job.cluster.workers, job.zero_stage
    per_parameter = weights / (workers if zero == 3 else 1)
    per_trained = gradients / (workers if zero >= 2 else 1)
    per_trained += optimizer / (workers if zero >= 1 else 1)
    return int(parameters * per_parameter + trained * per_trained)


def _moment_bytes(job: JobSpec) -> int:
    """Return the bytes of the optimizer's moments per trained parameter. Adafactor's factored moments count as 0."""
    optimizer = job.train.optimizer
    if optimizer.type == "sgd":
        return 4 if optimizer.momentum else 0
    return {"adamw": 8, "adamw_8bit": 2, "adafactor": 0}[optimizer.type]


def count_batches(rows: int, batch_size: int) -> int:
    """Return the number of global batches that hold `rows` rows; the last may be smaller."""
    return -(-rows // batch_size)


def total_steps(steps_per_epoch: int, job: JobSpec) -> int:
    """Return the number of optimizer steps of the whole run."""
    steps = steps_per_epoch * job.train.epochs
    return min(steps, job.train.max_steps or steps)
