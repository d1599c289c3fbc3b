"""Evaluations that generate: each row once, with the same scores on any number of workers and under ZeRO-3."""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.driver.prepare import PreparedJob
from launcher.rundir.records import ScoresRecord
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here, with_job

_EVALUATION = {"evaluation": {"every_steps": 5, "batch_size": 8}}


@pytest.fixture
def job(tiny_models: dict[str, Path], tmp_path: Path) -> PreparedJob:
    # 13 rows in batches of 8: under 3 workers with micro-batches of 2 some ranks have fillers.
    data = write_splits(tmp_path / "data", train=44, validation=13, task="seq2seq")
    train = {"max_steps": 10, "epochs": 3, "learning_rate": 1e-2}
    task = {"type": "seq2seq", "max_target_length": 12, "max_new_tokens": 8}
    return prepared_job(tiny_models["seq2seq"], data, tmp_path, task=task, train=train, **_EVALUATION)


def _scores(job: PreparedJob) -> dict[str, Any]:
    """Train, and return the scores of each evaluation, those of the report, the texts, and the forward passes."""
    engines: list[Any] = []
    train_here(job, None, engines.append)
    lines = [json.loads(line) for line in job.run.read_bytes("metrics.jsonl").splitlines()]
    return {
        "metrics": [line["metrics"] | {"loss": line["loss"]} for line in lines if line["kind"] == "evaluation"],
        "scores": json.loads(job.run.read_bytes("scores-validation.json")),
        "texts": [[line["row"], line["prediction"], line["target"]] for line in lines if line["kind"] == "generation"],
        "forwards": engines[0].num_forwards,
    }


@pytest.mark.parametrize(
    ("rows", "zero"),
    [(None, 3), (3, 2), pytest.param(None, 2, marks=pytest.mark.long), pytest.param(3, 3, marks=pytest.mark.long)],
)
def test_scores_of_generated_texts_do_not_depend_on_the_cluster(job: PreparedJob, rows: int | None, zero: int) -> None:
    limited = with_job(job, task={**job.job.task.parameters(), "type": "seq2seq", "generated_rows": rows})
    alone = run_group(1, _scores, with_job(limited, name="alone", cluster={"workers": 1}))
    record = ScoresRecord.model_validate(alone["scores"])
    assert record.notes[0] == f"{rows or 13} generated texts compared"
    assert record.notes[1].startswith("bleu: nrefs:1|case:mixed|eff:no|tok:13a|")
    assert len(alone["metrics"]) == 2
    assert alone["metrics"][-1]["chrf"] > 10
    written = {row.row: row.prediction for row in record.worst}
    assert len(written) == 13
    assert [row for row, text in written.items() if not text.startswith("(only the first")] == [
        row for row in written if rows is None or row < rows
    ]
    # Each text beside its reference, at the steps 5 and 10.
    assert [row for row, _, _ in alone["texts"]] == [0, 1, 2, 3] * 2
    assert all(target for _, _, target in alone["texts"])
    cut = with_job(limited, name="cut", parallel={"zero": zero, "micro_batch": 2}, cluster={"workers": 3})
    other = run_group(3, _scores, cut)
    assert other["texts"] == alone["texts"]
    for metrics, reference in zip(other["metrics"], alone["metrics"], strict=True):
        assert metrics == pytest.approx(reference, abs=1e-4)
    other_record = ScoresRecord.model_validate(other["scores"])
    assert {row.row: row.prediction for row in other_record.worst} == written
    # The heartbeat counts generated tokens too.
    assert other["forwards"] > 50
