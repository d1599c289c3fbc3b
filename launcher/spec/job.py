"""The job file as one frozen model. Runs anywhere; read `spec/loader.py` for how a YAML file becomes one."""

import re

from pydantic import ConfigDict, Field, model_validator

from launcher.spec.base import PATTERN_WORDS, Section
from launcher.spec.cluster import ClusterSpec
from launcher.spec.data import DataSpec
from launcher.spec.fault_tolerance import FaultToleranceSpec
from launcher.spec.logging import LoggingSpec
from launcher.spec.model import ModelSpec
from launcher.spec.parallel import ParallelSpec
from launcher.spec.train import CheckpointSpec, EvaluationSpec, TrainSpec
from launcher.spec.tune import TuneSpec

_VIRTUAL_RANKS = 8
"""Parts of a global batch if neither the job nor the number of workers asks for more."""
EVALUATION_BATCH = 64
"""Samples per evaluation batch if neither the job nor its training batches ask for more; also those of a prediction."""
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
INVALID_NAME = "not made of at most 63 letters, digits, dots, dashes and underscores, with a letter or digit first"
"""Explanation of an invalid name, for `NAME is ...` in an error message."""


def is_name(text: str) -> bool:
    """Return whether a text is a valid name of a run."""
    return _NAME.fullmatch(text) is not None


class TaskSpec(Section):
    """`task:` What the model learns. `type` names the task; the other keys are the task's own parameters."""

    # The task's own model validates the parameters (launcher/tasks); this layer does not know it.
    model_config = ConfigDict(extra="allow")

    type: str = Field(min_length=1)
    """Name of a built-in task (text-classification), or import path of your own (package.module:Task)."""

    def parameters(self) -> dict[str, object]:
        """Return the task's own keys as the user wrote them, without `type`."""
        return dict(self.__pydantic_extra__ or {})


class OutputSpec(Section):
    """`output:` Where runs are stored."""

    storage: str = Field(default="runs", min_length=1)
    """Directory or URI of the run directories. All nodes must share it."""


class JobSpec(Section):
    """A whole job file: task, model, data, and how and where to train."""

    name: str = Field(pattern=_NAME.pattern, json_schema_extra={PATTERN_WORDS: INVALID_NAME})
    """Name of the run and of its directory. Running the same job again resumes that run."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Random seed for the row order, new layers and dropout."""

    task: TaskSpec
    model: ModelSpec
    data: DataSpec
    train: TrainSpec = TrainSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    fault_tolerance: FaultToleranceSpec = FaultToleranceSpec()
    parallel: ParallelSpec = ParallelSpec()
    cluster: ClusterSpec = ClusterSpec()
    output: OutputSpec = OutputSpec()
    logging: LoggingSpec = LoggingSpec()
    tune: TuneSpec | None = None

    @model_validator(mode="after")
    def _check_optimizer(self) -> "JobSpec":
        # Here, because these rules join several sections, and a section sees only its own keys.
        kind = self.train.optimizer.type
        parallel = self.parallel
        if kind != "adamw" and (parallel.offload_optimizer or parallel.offload_parameters):
            key = "offload_optimizer" if parallel.offload_optimizer else "offload_parameters"
            raise ValueError(
                f"parallel.{key} needs adamw, which has a CPU kernel, and train.optimizer is {kind}; drop {key} or use "
                "adamw"
            )
        if self.train.compile and self.zero_stage == 3:
            raise ValueError(
                "train.compile is true and the ZeRO stage is 3, which gathers weights on the fly, and compiled code "
                "cannot; drop train.compile, or use parallel.zero: 2 without offload_parameters and offload_path"
            )
        if self.model.quantization is not None and self.zero_stage == 3:
            raise ValueError(
                f"model.quantization is {self.model.quantization} and the ZeRO stage is 3, which would cut 4-bit "
                "weights apart from their scales; set parallel.zero: 2 without offload_parameters and offload_path, or "
                "drop quantization"
            )
        if self.train.precision == "fp16" and self.zero_stage == 0:
            # At stage 0, DeepSpeed 0.19.8 starts with a loss scale of 2**32 and skips about the first twenty steps.
            raise ValueError(
                "train.precision is fp16, whose loss scaling needs ZeRO, and "
                + (
                    "train.optimizer is adafactor, which does not support it"
                    if kind == "adafactor"
                    else "parallel.zero is 0"
                )
                + "; set train.precision: bf16"
                + ("" if kind == "adafactor" else ", or parallel.zero: 1")
            )
        if kind == "adafactor" and parallel.zero not in ("auto", 0):
            raise ValueError(
                f"parallel.zero is {parallel.zero}, and train.optimizer is adafactor, which needs whole matrices, and "
                "ZeRO shards them; set parallel.zero: 0, or use another optimizer"
            )
        return self

    @property
    def virtual_ranks(self) -> int:
        """Parts of a global batch: `train.virtual_ranks`, or its default for the workers of this job."""
        if self.train.virtual_ranks is not None:
            return self.train.virtual_ranks
        wanted = max(_VIRTUAL_RANKS, 1 << (self.cluster.workers - 1).bit_length())
        return min(wanted, 1 << (self.train.batch_size.bit_length() - 1))

    @property
    def evaluation_batch_size(self) -> int:
        """Samples per evaluation batch: `evaluation.batch_size`, or its default for the batches of this job."""
        # As many as in training, so that a forward pass is as busy; more would take more memory than a step has.
        return self.evaluation.batch_size or max(EVALUATION_BATCH, self.train.batch_size)

    @property
    def adds_in_one_order(self) -> bool:
        """Return whether gradients are added in the order of the parts, the same for any number of workers."""
        # Offloaded gradients and the loss scale of fp16 are DeepSpeed's own affair, as are the other stages.
        is_plain = self.train.precision != "fp16" and not self.parallel.offload_optimizer
        return self.zero_stage == 0 or (self.zero_stage == 1 and is_plain)

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the job; `auto` without a memory estimate."""
        parallel = self.parallel
        if parallel.zero != "auto":
            return parallel.zero
        if parallel.offload_parameters or parallel.offload_path is not None:
            return 3
        if self.train.optimizer.type == "adafactor":
            return 0
        # A single worker has nothing to shard, and ZeRO's flat copies of weights and gradients take a quarter of a step
        # on a CPU. Half precision still needs ZeRO for its fp32 master weights.
        needs_no_zero = self.cluster.workers == 1 and self.train.precision == "fp32" and not parallel.offload_optimizer
        return 0 if needs_no_zero else 2
