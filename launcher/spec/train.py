"""`train:`, `evaluation:` and `checkpoint:` in the job file. Runs anywhere.

The loss curve depends on `train:`, but not on the other two.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from launcher.spec.base import Section
from launcher.spec.optimizer import AdamW, Optimizer


class _Warmup(Section):
    # The BERT recipe's 10 %.
    warmup_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    """Fraction of all steps in which the learning rate rises linearly from 0."""


class ConstantSchedule(_Warmup):
    """Warm-up, then a constant learning rate."""

    type: Literal["constant"] = "constant"


class LinearSchedule(_Warmup):
    """Warm-up, then linear decay to 0 at the last step."""

    type: Literal["linear"] = "linear"


class CosineSchedule(_Warmup):
    """Warm-up, then cosine decay to 0 at the last step (Loshchilov & Hutter 2017, arXiv:1608.03983)."""

    type: Literal["cosine"] = "cosine"


Schedule = Annotated[ConstantSchedule | LinearSchedule | CosineSchedule, Field(discriminator="type")]


class TrainSpec(Section):
    """`train:` Length of training, optimizer, learning rate and numerics."""

    # epochs, batch_size and learning_rate lie in the ranges that BERT's authors recommend for fine-tuning (Devlin et
    # al. 2019, A.3).
    epochs: int = Field(default=3, ge=1)
    """Passes over the training data. Each epoch uses every row exactly once."""

    max_steps: int | None = Field(default=None, ge=1)
    """Maximum number of optimizer steps, even if epochs remain. The learning-rate schedule ends there too."""

    batch_size: int = Field(default=32, ge=1)
    """Global batch: samples per optimizer step over all workers. It is split into micro-batches to fit into memory."""

    virtual_ranks: int | None = Field(default=None, ge=1)
    """Parts that every global batch is cut into, a power of two. Noise, BatchNorm statistics and the order in which
    gradients are added follow the part, so any number of workers that divides it trains the same bits (ZeRO 0 and 1).
    Null takes the smallest power of two that is not below `cluster.workers`, at least 8, at most `batch_size`. The run
    keeps what it started with. Fewer parts make larger micro-batches, which a GPU may need to be busy."""

    threads: int = Field(default=1, ge=1)
    """CPU threads of a worker. They change the last bits of its sums, and so belong to the run and not to the machine.
    With GPUs they make no difference."""

    learning_rate: float = Field(default=2e-5, gt=0.0)
    """Peak learning rate, reached at the end of the warm-up."""

    optimizer: Optimizer = AdamW()
    """Optimizer and its parameters; AdamW if `type` is missing."""

    layer_decay: float | None = Field(default=None, gt=0.0, le=1.0)
    """Layer-wise learning-rate decay (ELECTRA, Clark et al. 2020, arXiv:2003.10555; BEiT, arXiv:2106.08254): layer i of
    n uses learning_rate * layer_decay ** (n + 1 - i), the head the full rate, the embeddings (i = 0) the lowest. Null
    uses one rate for all layers."""

    schedule: Schedule = LinearSchedule()
    """Learning-rate schedule over the steps."""

    ema: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Decay of an exponential moving average (EMA) of the weights, such as 0.999; it starts lower in the first steps.
    Evaluations and the exported model use the average; training itself does not change."""

    max_grad_norm: float | None = Field(default=1.0, gt=0.0)
    """L2 norm to which the gradient of the global batch is clipped; null does not clip."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward and backward pass. Gradients are accumulated and weights updated in fp32. fp16 uses
    dynamic loss scaling, which needs ZeRO."""

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do at a non-finite loss. `stop` ends the run. `skip` skips the batch, and costs one device sync per step
    (under ZeRO 2 and 3 the workers restart from the last checkpoint). `rollback` restarts from the last checkpoint and
    skips the batch then, at no cost before. The rows of skipped batches are written to skipped-batches.json."""

    compile: bool = False
    """Compile the model with `torch.compile`. The first steps take a minute or more, later ones are faster. Not
    available under ZeRO-3; needs a C++ compiler on CPUs. Fused kernels round differently, so the loss curve changes."""

    deterministic: bool = False
    """Allow only deterministic kernels (torch.use_deterministic_algorithms)."""

    log_every_steps: int = Field(default=10, ge=1)
    """Steps between log lines. Each one reduces and writes the losses of all steps since the last, so none is lost."""

    sync_check_steps: int = Field(default=200, ge=1)
    """Steps between comparisons of a weight hash across workers; the first one is after step 1."""

    @model_validator(mode="after")
    def _check_virtual_ranks(self) -> "TrainSpec":
        parts = self.virtual_ranks
        if parts is not None and parts & (parts - 1):
            lower = 1 << (parts.bit_length() - 1)
            raise ValueError(f"virtual_ranks is {parts}, which is no power of two; give {lower} or {2 * lower}")
        if parts is not None and parts > self.batch_size:
            raise ValueError(
                f"virtual_ranks is {parts}, more than the {self.batch_size} samples of a batch (batch_size); lower it, "
                "or raise batch_size"
            )
        return self


class EvaluationSpec(Section):
    """`evaluation:` When to evaluate the validation data, and which checkpoint is best."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations; there is also one after the last step. Null evaluates at the end of each epoch."""

    metric: str | None = None
    """Validation metric that selects the best checkpoint; null uses the task's main metric."""

    mode: Literal["auto", "max", "min"] = "auto"
    """Whether to maximise or minimise the metric; `auto` knows the task's own metrics."""

    patience: int | None = Field(default=None, ge=1)
    """Stop early after this many evaluations in a row without improvement; null never stops early."""

    batch_size: int | None = Field(default=None, ge=1)
    """Samples per evaluation batch over all workers. Null takes `train.batch_size`, at least 64; predictions take 64.
    Each is cut into `train.virtual_ranks` parts, so that scores have the same bits on any number of workers. Affects
    memory and speed, not the metrics."""


class CheckpointSpec(Section):
    """`checkpoint:` When to save the states that a run resumes from."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null saves only by `every_minutes` and at evaluations."""

    every_minutes: float | None = Field(default=10.0, gt=0.0)
    """Minutes between checkpoints; null does not save by time."""

    keep_last: int = Field(default=2, ge=1)
    """Number of recent checkpoints to keep, in addition to the best one. With two, the run can fall back to the older
    one if the newest is corrupt."""

    background: bool = True
    """Write checkpoints while training continues; it pauses only to copy the states. Each worker then keeps a copy of
    its shard of the states in CPU memory."""

    on_failure: Literal["continue", "stop"] = "continue"
    """What to do if a checkpoint cannot be written (full disk, failing storage): `continue` warns, keeps the last valid
    checkpoint and trains on; `stop` ends the run."""
