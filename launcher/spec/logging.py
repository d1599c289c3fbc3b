"""`logging:` in the job file: destinations of metrics besides metrics.jsonl and TensorBoard. Runs anywhere.

Nothing here changes the loss curve.
"""

from pydantic import Field

from launcher.spec.base import PATTERN_WORDS, Section


class LoggingSpec(Section):
    """`logging:` Experiment trackers and live metrics."""

    mlflow: str | None = Field(default=None, min_length=1)
    """MLflow tracking server or store (`http://mlflow:5000`, `sqlite:////shared/mlflow.db`); null does not log to
    MLflow."""

    wandb: str | None = Field(
        default=None,
        pattern=r"^([A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]{1,128}$",
        json_schema_extra={
            PATTERN_WORDS: "not PROJECT or ENTITY/PROJECT, of letters, digits, dots, dashes and underscores"
        },
    )
    """Weights & Biases project, as PROJECT or ENTITY/PROJECT; null does not log to it. The trials of a sweep form one
    group. Account and server come from wandb's own variables (WANDB_API_KEY, WANDB_BASE_URL, WANDB_MODE)."""

    experiment: str = Field(default="launcher", min_length=1)
    """MLflow experiment of the run. The trials of a sweep become child runs of one run."""

    prometheus: bool = True
    """Publish step, loss, samples/s, data wait and checkpoint time through Ray's metrics ports, for Prometheus
    (`cluster/monitoring/` has a Grafana dashboard). Costs microseconds per step."""
