"""`tune:` in the job file: what a sweep searches, how, and how much it may spend. Runs anywhere."""

from typing import Literal

from pydantic import Field, JsonValue, model_validator

from launcher.spec.base import Section

_Whole = int  # inside Dimension, `int` is a key
_RANGES = ("uniform", "loguniform", "int", "logint")


class Dimension(Section):
    """The values of one key; exactly one of the forms."""

    uniform: tuple[float, float] | None = None
    """Any number between two, both included."""
    loguniform: tuple[float, float] | None = None
    """Any number between two, evenly on a log scale: learning rates."""
    int: tuple[_Whole, _Whole] | None = None
    """Any integer between two, both included."""
    logint: tuple[_Whole, _Whole] | None = None
    """Any integer between two, evenly on a log scale."""
    choice: tuple[JsonValue, ...] | None = None
    """One of a list."""

    @model_validator(mode="after")
    def _one_form(self) -> "Dimension":
        given = [name for name in (*_RANGES, "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("needs exactly one of uniform, loguniform, int, logint and choice")
        name, value = given[0], getattr(self, given[0])
        if name == "choice":
            if not value or any(value.count(one) > 1 for one in value):
                raise ValueError("choice needs at least one value, each once")
        elif not value[0] < value[1]:
            raise ValueError(f"{name} needs the lower end first and the higher behind it, not {list(value)}")
        elif name.startswith("log") and value[0] <= 0:
            raise ValueError(f"{name} needs ends above 0, not {value[0]:g}")
        return self

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends of a range (integers, of a range of integers); None for a choice."""
        return self.uniform or self.loguniform or self.int or self.logint

    @property
    def is_log(self) -> bool:
        """Whether a range is searched evenly on a log scale."""
        return self.loguniform is not None or self.logint is not None

    @property
    def is_whole(self) -> bool:
        """Whether a range holds integers alone."""
        return self.int is not None or self.logint is not None


class TuneSpec(Section):
    """A sweep: trials of the job with other values in some of its keys. Workers and GPUs per trial: `cluster:`."""

    space: dict[str, Dimension] = Field(min_length=1)
    """What to search, by dotted key of the job file: `train.learning_rate: {loguniform: [1e-6, 1e-3]}`."""
    trials: int = Field(default=16, ge=1)
    """Trials in all; `search: grid` may need fewer."""
    metric: str | None = None
    """Validation metric that ranks trials; null takes `evaluation.metric`, else the task's own main one."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether more of the metric is better; `auto` knows the task's own metrics."""
    search: Literal["random", "grid", "optuna", "bohb"] = "random"
    """How the next trial is chosen: at random, every combination, or by Optuna's TPE from what trials reached. `bohb`
    is TPE with the hyperband scheduler (Falkner et al. 2018, arXiv:1807.01774)."""
    scheduler: Literal["asha", "hyperband", "pbt", "median", "none"] = "asha"
    """Which trials stop early: asha (arXiv:1810.05934), hyperband (arXiv:1603.06560), those below the median, or
    none; pbt (arXiv:1711.09846) lets bad ones go on from good ones with changed values. Needs several evaluations
    per trial."""
    grace: float = Field(default=0.1, gt=0.0, le=1.0)
    """Share of its steps that a trial may do before it can be stopped; for pbt the share between changes."""
    reduction_factor: float = Field(default=3.0, gt=1.0)
    """asha and hyperband keep one trial in so many at each rung."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Trials at the same time; null takes as many as the cluster has room for (hyperband and bohb always do)."""
    retries: int = Field(default=0, ge=0)
    """How often a trial that crashed is tried again; one whose loss is not finite never is."""
    minutes: float | None = Field(default=None, gt=0.0)
    """Stop the sweep after so long; what is finished is kept."""
    target: float | None = None
    """Stop the sweep when a trial reaches this value of the metric."""
    storage_budget_gib: float = Field(default=20.0, gt=0.0)
    """Checkpoints of all trials together; beyond it the worst finished trials give theirs up. Pruned ones always do."""
    refit: Literal["none", "train+validation"] = "none"
    """Export the best trial's model, or train its job again on training and validation data together."""
    repeats: int = Field(default=0, ge=0)
    """Train the best trial again with so many other seeds, to tell differences from noise."""
