"""`train:` in the job file: everything the loss curve is a function of, beside data and model. Runs anywhere."""

from typing import Annotated, Literal

from pydantic import Field

from launcher.spec.base import Section
from launcher.spec.optimizer import AdamW, Optimizer


class _Warmup(Section):
    warmup_fraction: float = Field(default=0.1, ge=0.0, le=1.0)  # the BERT recipe's 10 %
    """Share of all steps over which the learning rate rises linearly from 0."""


class ConstantSchedule(_Warmup):
    """Warm-up, then the learning rate stays."""

    type: Literal["constant"] = "constant"


class LinearSchedule(_Warmup):
    """Warm-up, then a straight line to 0 at the last step."""

    type: Literal["linear"] = "linear"


class CosineSchedule(_Warmup):
    """Warm-up, then half a cosine to 0 at the last step (Loshchilov & Hutter 2017, arXiv:1608.03983)."""

    type: Literal["cosine"] = "cosine"


Schedule = Annotated[ConstantSchedule | LinearSchedule | CosineSchedule, Field(discriminator="type")]


class TrainSpec(Section):
    """How long, how fast and with which numbers."""

    epochs: int = Field(default=3, ge=1)
    """Passes over the training data; every row counts exactly once in each."""

    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps even if the epochs are not over; schedules end there too."""

    batch_size: int = Field(default=32, ge=1)
    """Global batch: samples per optimizer step over all workers. Cut into micro-batches as memory needs."""

    learning_rate: float = Field(default=2e-5, gt=0.0)
    """Peak learning rate, reached at the end of the warm-up."""

    optimizer: Optimizer = AdamW()
    """The optimizer and its own parameters; AdamW where no `type` is given."""

    layer_decay: float | None = Field(default=None, gt=0.0, le=1.0)
    """Layer-wise learning-rate decay (ELECTRA, Clark et al. 2020, arXiv:2003.10555; BEiT, arXiv:2106.08254): layer i of
    n learns at learning_rate * layer_decay ** (n + 1 - i), the head at the full rate, the embeddings (i = 0) slowest;
    null trains all alike."""

    schedule: Schedule = LinearSchedule()
    """How the learning rate changes over the steps."""

    ema: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Exponential moving average of the weights: how much of it stays at each step (0.999, say; less in the first
    steps). Evaluations see the average, the best one is exported; the training goes on as without it."""

    max_grad_norm: float | None = Field(default=1.0, gt=0.0)
    """Clip the gradient of the global batch to this L2 norm; null does not clip."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Numbers of the forward and backward pass. Gradients are summed and weights stepped in fp32; fp16 scales the loss
    dynamically, for which it needs ZeRO."""

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do at a loss that is not a number: stop; skip the batch, at the price of a look at each step's loss
    (under ZeRO 2 and 3 the workers start again from the last checkpoint for it); or roll back to the last checkpoint
    and leave the batch out then, which costs nothing before. Its rows are written to skipped-batches.json."""

    compile: bool = False
    """Compile the model (`torch.compile`) in the first steps, a minute or more, for faster ones; not under ZeRO-3. On a
    CPU it needs a C++ compiler. Fused kernels round otherwise and draw other noise, so the curve is another one."""

    deterministic: bool = False
    """Refuse kernels whose result differs from call to call (torch.use_deterministic_algorithms)."""

    log_every_steps: int = Field(default=10, ge=1)
    """Reduce, write and show the losses of the last steps this often; every step's loss is recorded."""

    sync_check_steps: int = Field(default=200, ge=1)
    """Compare a hash of the weights across workers after the first step and then every so many steps."""


class EvaluationSpec(Section):
    """`evaluation:` when to look at the validation data and what to keep."""

    every_steps: int | None = Field(default=None, ge=1)
    """Evaluate every so many steps (and after the last); null evaluates at the end of each epoch."""

    metric: str | None = None
    """Validation metric that decides which checkpoint is best; null takes the task's own main metric."""

    mode: Literal["auto", "max", "min"] = "auto"
    """Whether more of the metric is better; `auto` knows the task's own metrics."""

    patience: int | None = Field(default=None, ge=1)
    """Stop early after this many evaluations in a row without a better metric; null never does."""

    batch_size: int = Field(default=64, ge=1)
    """Samples per evaluation batch over all workers; a memory knob."""


class CheckpointSpec(Section):
    """`checkpoint:` when to save the state from which a run goes on."""

    every_steps: int | None = Field(default=None, ge=1)
    """Save every so many steps; null saves by minutes and at evaluations only."""

    every_minutes: float | None = Field(default=10.0, gt=0.0)
    """Save when this many minutes have passed since the last checkpoint; null does not."""

    keep_last: int = Field(default=2, ge=1)
    """Checkpoints kept beside the best one; two, so that there is one to go back to when the last is damaged."""

    background: bool = True
    """Write while training goes on: it stands still only as long as the states are copied. Every worker then holds a
    copy of its share of the states in the CPU's memory."""

    on_failure: Literal["continue", "stop"] = "continue"
    """What to do when a checkpoint cannot be written (a full disk, a storage that fails): train on, with the last good
    one kept, and say so; or stop."""
