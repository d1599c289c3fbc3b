"""The plan of a run: steps, windows, evaluations and memory, from the job file and facts about data and model.

Pure; runs on the client and the head. `driver/prepare.py` collects the facts, `check` prints the plan.
"""

from pydantic import Field

from launcher.rundir.records import Record
from launcher.spec.job import JobSpec

MAX_STEPS = 2**31 - 1
"""More optimizer steps than that no run does; the numbers behind it fit everywhere."""


class WorkerMemory(Record):
    """Predicted bytes of one worker, on the device it trains on."""

    weights: int
    """As the model holds them between two steps."""
    gradients: int
    """Kept until the step, or from one micro-batch to the next."""
    optimizer: int
    """Optimizer states, the copy of the weights they belong to, and the average of the weights."""
    buffers: int
    """DeepSpeed's own beside them, at the peak: the bucket gradients are reduced in, gathered weights."""
    activations: int
    """Of a micro-batch, the batch and its loss among them, at the peak."""
    peak: int
    """The largest sum at any time; not that of the above, which peak at different times."""
    host: int
    """Beside it, in the CPU's memory, what was offloaded; on a CPU it is part of the peak."""
    disk: int = 0
    """In files of `parallel.offload_path`."""
    checkpoint: int
    """Of one whole checkpoint, all workers together."""
    copy_bytes: int = 0
    """Beside the peak, on a CPU: the copy from which a checkpoint is written while training goes on."""

    @property
    def needed(self) -> int:
        """All of it on the device that trains."""
        return self.peak + self.copy_bytes


class Plan(Record):
    """plan.json: everything about a run that is known before it starts."""

    task: str
    train_rows: int
    validation_rows: int
    test_rows: int
    fingerprint: str
    """Names the training data."""
    batch_size: int
    window_steps: int
    steps_per_epoch: int
    epochs: int
    total_steps: int
    evaluate_every_steps: int | None
    """None evaluates at the end of each epoch."""
    metric: str
    """The metric that decides which checkpoint is best."""
    metric_mode: str
    workers: int
    zero: int
    samples_per_worker: int
    """Largest share of a global batch."""
    micro_batch: int
    accumulation: int
    """Micro-batches per step and worker."""
    model: dict[str, str | int | float | bool]
    """Facts about the model."""
    model_files: dict[str, str] = Field(default_factory=dict)
    """What tells the model from a later one of its name: hashes and sizes, or a commit; {} in older runs."""
    parameters: int
    state_bytes_per_worker: int
    """Weights, gradients and optimizer states on one worker, activations not counted."""
    memory: WorkerMemory | None = None
    """Of one worker, predicted; null where it was not measured."""
    memory_limit_bytes: int | None = None
    """A worker may use; null where it is not known."""
    notes: tuple[str, ...] = ()
    """What the user should know before spending hours."""

    def evaluates_after(self, step: int) -> bool:
        """Whether the validation data is scored once `step` steps are done."""
        if not self.validation_rows:
            return False
        every = self.evaluate_every_steps or self.steps_per_epoch
        return step == self.total_steps or (step > 0 and step % every == 0)


def state_bytes(parameters: int, trained: int, job: JobSpec) -> int:
    """Bytes of weights, gradients and optimizer states per worker (ZeRO paper, arXiv:1910.02054, section 3).

    With AdamW fp32 keeps 4 + 4 + 8 bytes a parameter; bf16/fp16 2 + 2 + 12, the fp32 master copy among the optimizer
    states. Frozen parameters have weights only.

    Args:
        parameters: of the model.
        trained: those that are not frozen.
        job: precision, optimizer, ZeRO stage and workers.
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
    """Bytes of the optimizer's moments per trained parameter; a row and a column of a matrix are next to nothing."""
    optimizer = job.train.optimizer
    if optimizer.type == "sgd":
        return 4 if optimizer.momentum else 0
    return {"adamw": 8, "adamw_8bit": 2, "adafactor": 0}[optimizer.type]


def steps_of(rows: int, batch_size: int) -> int:
    """Global batches that hold `rows` rows; the last may be smaller."""
    return -(-rows // batch_size)


def total_steps(rows: int, job: JobSpec) -> int:
    """Optimizer steps of the whole run."""
    steps = steps_of(rows, job.train.batch_size) * job.train.epochs
    return min(steps, job.train.max_steps or steps)
