"""`logging:` where a run's numbers go beside metrics.jsonl and TensorBoard; nothing here changes the curve."""

from pydantic import Field

from launcher.spec.base import PATTERN_WORDS, Section


class LoggingSpec(Section):
    """`logging:` trackers; each is one line."""

    mlflow: str | None = Field(default=None, min_length=1)
    """MLflow tracking server or store (`http://mlflow:5000`, `sqlite:////shared/mlflow.db`); null logs to none."""

    wandb: str | None = Field(
        default=None,
        pattern=r"^([A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]{1,128}$",
        json_schema_extra={
            PATTERN_WORDS: "not PROJECT or ENTITY/PROJECT, of letters, digits, dots, dashes and underscores"
        },
    )
    """Weights & Biases: PROJECT or ENTITY/PROJECT that the run belongs to, the trials of a sweep as one group; account
    and server are wandb's own variables (WANDB_API_KEY, WANDB_BASE_URL, WANDB_MODE); null logs to none."""

    experiment: str = Field(default="launcher", min_length=1)
    """Experiment of MLflow that the runs belong to; the trials of a sweep are children of one run."""

    prometheus: bool = True
    """Whether Ray's metrics ports tell step, loss, samples/s, data wait and checkpoint time of the run
    (`cluster/monitoring/` has a dashboard); costs microseconds a step."""
