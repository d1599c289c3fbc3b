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

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
NO_NAME = "not made of at most 63 letters, digits, dots, dashes and underscores, with a letter or digit first"
"""What is wrong with a name that a run cannot have."""


def is_name(text: str) -> bool:
    """Whether a run can be called so."""
    return _NAME.fullmatch(text) is not None


class TaskSpec(Section):
    """`task:` what is learned. `type` names the task; the other keys are the task's own parameters."""

    # The parameters are validated by the task's own model (launcher/tasks), which this layer does not know.
    model_config = ConfigDict(extra="allow")

    type: str = Field(min_length=1)
    """Name of a task of the launcher (text-classification), or import path of one outside it (package.module:Task)."""

    def parameters(self) -> dict[str, object]:
        """The task's own keys as given, without `type`."""
        return dict(self.__pydantic_extra__ or {})


class OutputSpec(Section):
    """`output:` where runs go."""

    storage: str = Field(default="runs", min_length=1)
    """Directory or URI that holds the run directories; on several nodes it must be shared."""


class JobSpec(Section):
    """A whole job file: what to train, on what, and where it goes."""

    name: str = Field(pattern=_NAME.pattern, json_schema_extra={PATTERN_WORDS: NO_NAME})
    """Name of the run and of its directory; running the same job again goes on with the same run."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seeds the order of the rows, the new layers and dropout."""

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
    def _optimizer_fits(self) -> "JobSpec":
        kind, parallel = self.train.optimizer.type, self.parallel
        if kind != "adamw" and (parallel.offload_optimizer or parallel.offload_parameters):
            key = "offload_optimizer" if parallel.offload_optimizer else "offload_parameters"
            raise ValueError(
                f"parallel.{key} is for adamw, which has a CPU kernel, and train.optimizer is {kind}; drop {key} or "
                "take adamw"
            )
        if self.train.compile and self.zero_stage == 3:
            raise ValueError(
                "train.compile is true, and parallel is of ZeRO-3, which fetches weights where compiled code would "
                "have them; drop train.compile, or take parallel.zero: 2 without offload_parameters and offload_path"
            )
        if self.train.precision == "fp16" and self.zero_stage == 0:
            # DeepSpeed 0.19.8 begins there with another loss scale, 2**32, and skips the first twenty steps or so.
            raise ValueError(
                "train.precision is fp16, whose loss scaling needs ZeRO, and "
                + (
                    "train.optimizer is adafactor, which cannot have it"
                    if kind == "adafactor"
                    else "parallel.zero is 0"
                )
                + "; set train.precision: bf16"
                + ("" if kind == "adafactor" else ", or parallel.zero: 1")
            )
        if kind == "adafactor" and parallel.zero not in ("auto", 0):
            raise ValueError(
                f"parallel.zero is {parallel.zero}, and train.optimizer is adafactor, whose statistics are of whole "
                "matrices, which ZeRO cuts; set parallel.zero: 0, or take another optimizer"
            )
        return self

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that `parallel.zero` stands for."""
        parallel = self.parallel
        if parallel.zero != "auto":
            return parallel.zero
        if parallel.offload_parameters or parallel.offload_path is not None:
            return 3
        if self.train.optimizer.type == "adafactor":
            return 0
        # A single worker has nobody to shard with, and ZeRO's flat copies of weights and gradients take a quarter of a
        # step on a CPU; half precision keeps ZeRO for its fp32 master weights.
        alone = self.cluster.workers == 1 and self.train.precision == "fp32" and not parallel.offload_optimizer
        return 0 if alone else 2
