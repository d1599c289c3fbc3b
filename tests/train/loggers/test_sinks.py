"""Lines of metrics.jsonl as trackers and Prometheus receive them."""

import pytest

from launcher.rundir.records import EvaluationRecord, GenerationRecord, MetricsLine, TimesRecord
from launcher.train.loggers import prometheus
from launcher.train.loggers.sinks import scalars_of
from tests.support.records import step_record

_STEP = step_record(3, loss=0.5)
_TIMES = TimesRecord(
    step=3, steps=3, seconds=9.0, data_s=(1.0, 2.0), communication_s=(0.7, 0.1), evaluation_s=(0.0, 0.0),
    checkpoint_s=(0.5, 0.4),
)  # fmt: skip
_EVALUATION = EvaluationRecord(
    split="validation", step=3, loss=0.7, metrics={"accuracy": 0.6}, rows=9, skipped_rows=0, seconds=1.0, best=True
)
_GENERATION = GenerationRecord(step=3, row=0, inputs={"text": "a"}, prediction="b")


@pytest.mark.parametrize(
    ("line", "scalars"),
    [
        (_STEP, {"train/loss": 0.5, "train/learning_rate": 1e-3, "train/samples_per_s": 4.0}),
        (_STEP.model_copy(update={"grad_norm": 2.0}),
         {"train/loss": 0.5, "train/learning_rate": 1e-3, "train/samples_per_s": 4.0, "train/grad_norm": 2.0}),
        (_TIMES, {"time/data_s": 2.0, "time/communication_s": 0.7, "time/evaluation_s": 0.0, "time/checkpoint_s": 0.5}),
        (_EVALUATION, {"validation/loss": 0.7, "validation/accuracy": 0.6}),
        (_GENERATION, {}),
    ],
    ids=["step", "step with norm", "times", "evaluation", "generation"],
)  # fmt: skip
def test_line_has_these_scalars(line: MetricsLine, scalars: dict[str, float]) -> None:
    assert scalars_of(line) == scalars


class _Metric:
    """Stand-in for Ray's Gauge and Counter that records values."""

    values: list[tuple[str, float, dict[str, str]]]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description
        self.name, self.tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.values.append((self.name, value, tags))

    inc = set


def test_prometheus_receives_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    _Metric.values = []
    monkeypatch.setattr(prometheus, "Gauge", _Metric)
    monkeypatch.setattr(prometheus, "Counter", _Metric)
    sink = prometheus.PrometheusSink("a-run")
    for line in (_STEP, _TIMES, _EVALUATION, _GENERATION):
        sink.write(line, {})
    assert {name: value for name, value, tags in _Metric.values if tags == {"run": "a-run"}} == {
        "launcher_step": 3, "launcher_epoch": 1, "launcher_loss": 0.5, "launcher_learning_rate": 1e-3,
        "launcher_samples_per_second": 4.0, "launcher_samples": 8, "launcher_training_seconds": 9.0,
        "launcher_data_wait_seconds": 2.0, "launcher_communication_seconds": 0.7, "launcher_checkpoint_seconds": 0.5,
    }  # fmt: skip
    scores = [(value, tags["split"], tags["metric"]) for name, value, tags in _Metric.values if "metric" in tags]
    assert scores == [(0.7, "validation", "loss"), (0.6, "validation", "accuracy")]
