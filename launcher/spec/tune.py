"""`tune:` in the job file: search space, search algorithm and budget of a sweep. Runs anywhere."""

from typing import Literal

from pydantic import Field, JsonValue, model_validator

from launcher.spec.base import Section

# Inside Dimension, `int` is a field, and its annotations would mean that.
_Integer = int
_RANGES = ("uniform", "loguniform", "int", "logint")


class Dimension(Section):
    """Values of one key in the search space, in exactly one of these forms."""

    uniform: tuple[float, float] | None = None
    """Number between two bounds, both included."""
    loguniform: tuple[float, float] | None = None
    """Number between two bounds, uniform on a log scale; for learning rates."""
    int: tuple[_Integer, _Integer] | None = None
    """Integer between two bounds, both included."""
    logint: tuple[_Integer, _Integer] | None = None
    """Integer between two bounds, uniform on a log scale."""
    choice: tuple[JsonValue, ...] | None = None
    """One value of a list."""

    @model_validator(mode="after")
    def _check_form(self) -> "Dimension":
        names = [name for name in (*_RANGES, "choice") if getattr(self, name) is not None]
        if len(names) != 1:
            raise ValueError("needs exactly one of uniform, loguniform, int, logint and choice")
        name = names[0]
        value = getattr(self, name)
        if name == "choice":
            # Counted and not put into a set: options may be lists and mappings.
            if not value or any(value.count(option) > 1 for option in value):
                raise ValueError("choice needs at least one value, and no value twice")
        elif not value[0] < value[1]:
            raise ValueError(f"{name} needs the lower bound first, then the upper, not {list(value)}")
        elif name.startswith("log") and value[0] <= 0:
            raise ValueError(f"{name} needs bounds above 0, not {value[0]:g}")
        return self

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both bounds of a range (integers for an integer range); None for a choice."""
        # A pair is never false, not even (0, 0).
        return self.uniform or self.loguniform or self.int or self.logint

    @property
    def is_log(self) -> bool:
        """Return True if a range is searched on a log scale."""
        return self.loguniform is not None or self.logint is not None

    @property
    def is_whole(self) -> bool:
        """Return True if a range contains only integers."""
        return self.int is not None or self.logint is not None


class TuneSpec(Section):
    """`tune:` A sweep: trials of the job with different values for some keys, each on the workers of `cluster:`."""

    space: dict[str, Dimension] = Field(min_length=1)
    """Search space, by dotted key of the job file: `train.learning_rate: {loguniform: [1e-6, 1e-3]}`."""
    trials: int = Field(default=16, ge=1)
    """Number of trials; `search: grid` may need fewer."""
    metric: str | None = None
    """Validation metric that ranks trials; null uses `evaluation.metric`, else the task's main metric."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether to maximise or minimise the metric; `auto` knows the task's own metrics."""
    search: Literal["random", "grid", "optuna", "bohb"] = "random"
    """How to choose the values of the next trial: at random, every combination (`grid`), or with Optuna's TPE from the
    results so far. `bohb` is TPE with the hyperband scheduler (Falkner et al. 2018, arXiv:1807.01774)."""
    scheduler: Literal["asha", "hyperband", "pbt", "median", "none"] = "asha"
    """How to stop bad trials early: `asha` (arXiv:1810.05934), `hyperband` (arXiv:1603.06560), `median` (stops trials
    below the median) or `none`. `pbt` (arXiv:1711.09846) restarts bad trials from checkpoints of good ones with changed
    values. Needs several evaluations per trial."""
    grace: float = Field(default=0.1, gt=0.0, le=1.0)
    """Fraction of its steps that a trial runs before it can be stopped; for pbt, the fraction between changes."""
    reduction_factor: float = Field(default=3.0, gt=1.0)
    """Ratio of trials that asha and hyperband stop: one in this many continues at each rung."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Maximum number of concurrent trials; null runs as many as fit on the cluster (hyperband and bohb always do)."""
    retries: int = Field(default=0, ge=0)
    """Number of retries of a crashed trial. A trial with a non-finite loss is not retried."""
    minutes: float | None = Field(default=None, gt=0.0)
    """Time limit of the sweep in minutes; null has none. Finished trials are kept."""
    target: float | None = None
    """Value of the metric at which the sweep stops; null does not stop early."""
    storage_budget_gib: float = Field(default=20.0, gt=0.0)
    """Maximum size of all trials' checkpoints in GiB. Beyond it, those of the worst finished trials are deleted. Trials
    that stopped early never keep theirs."""
    refit: Literal["none", "train+validation"] = "none"
    """`none` exports the best trial's model; `train+validation` retrains its job on both splits together."""
    repeats: int = Field(default=0, ge=0)
    """Number of other seeds with which the best trial is retrained, to show how much results vary."""
