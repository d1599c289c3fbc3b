"""The numbers of a line of metrics.jsonl by the names they have in trackers. Pure; train workers."""

from launcher.rundir.records import EvaluationRecord, GenerationRecord, MetricsLine, TimesRecord


def scalars_of(line: MetricsLine) -> dict[str, float]:
    """The numbers of a line, `group/name` each; {} where it has none."""
    if isinstance(line, GenerationRecord):
        return {}
    if isinstance(line, EvaluationRecord):
        return {f"{line.split}/loss": line.loss, **{f"{line.split}/{name}": v for name, v in line.metrics.items()}}
    if isinstance(line, TimesRecord):
        # The worker that waits longest is the one all others wait for.
        return {
            "time/data_s": max(line.data_s),
            "time/communication_s": max(line.communication_s, default=0.0),
            "time/evaluation_s": max(line.evaluation_s),
            "time/checkpoint_s": max(line.checkpoint_s),
        }
    scalars = {"train/loss": line.loss, "train/learning_rate": line.learning_rate}
    scalars["train/samples_per_s"] = line.samples_per_s
    return scalars if line.grad_norm is None else scalars | {"train/grad_norm": line.grad_norm}
