"""One worker of `predict`, without Ray: batches of similar length, read-ahead, and the order of rows."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from launcher.data.splits import Split, open_split
from launcher.errors import DataError
from launcher.predict.output import Part, part_name
from launcher.predict.parts import Layout
from launcher.predict.worker import PredictionConfig, Predictor
from launcher.rundir.directory import RunDir, read_job
from launcher.spec.job import JobSpec
from tests.support.finished_run import finished_run
from tests.support.jobs import example_table

_LAYOUT = Layout(310, 100, 40)
_BAD = (3, 39, 40, 309)


@pytest.fixture(scope="module")
def job(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    run = finished_run(tiny_bert, tmp_path_factory.mktemp("worker"), evaluation={"batch_size": 16})
    job = read_job(run)
    return job.model_copy(update={"model": job.model.exported(run.path("model"))})


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    text = example_table(310).column("text").to_pylist()
    for row in _BAD:
        text[row] = None
    path = tmp_path_factory.mktemp("input") / "in.parquet"
    pq.write_table(pa.table({"text": pa.array(text, pa.string()), "id": np.arange(310)}), path, row_group_size=70)
    return open_split("input", [str(path)])


def _predictor(job: JobSpec, split: Split, output: Path, on_bad_row: str = "skip") -> Predictor:
    job = job.model_copy(update={"data": job.data.model_copy(update={"on_bad_row": on_bad_row})})
    predictor = Predictor(PredictionConfig(job, split, _LAYOUT, RunDir(str(output))))
    predictor.load()
    return predictor


def test_rows_keep_their_order_and_the_prediction_of_each_alone(job: JobSpec, split: Split, tmp_path: Path) -> None:
    predictor = _predictor(job, split, tmp_path)
    answers = {
        number: list(predictor.predict(number, following)) for number, following in ((0, 1), (1, 3), (2, 3), (3, 0))
    }
    assert (
        answers[1] == [40, 80, 100, Part(100, 0)] and answers[3] == [10, Part(10, 1)] and answers[0][-1] == Part(100, 3)
    )
    table = pa.concat_tables(pq.read_table(tmp_path / part_name(number)) for number in range(4))
    assert table.schema.names == ["text", "id", "prediction", "scores"]
    assert table.column("id").to_pylist() == list(range(310))
    assert [i for i, score in enumerate(table.column("scores").to_pylist()) if score is None] == list(_BAD)
    model, task = predictor._model, predictor._task
    for row in (0, 2, 41, 99, 100, 308):
        alone = task.encode(table.slice(row, 1).select(["text"]), False)
        with torch.inference_mode():
            (score,) = task.predict(model, alone.samples).column("scores").to_pylist()
        theirs = json.loads(table.column("scores")[row].as_py())
        assert theirs == pytest.approx(json.loads(score), abs=1e-6)


def test_batches_hold_rows_of_similar_length(
    job: JobSpec, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, widths = _predictor(job, split, tmp_path), []
    collate = predictor._task.collate

    def counted(samples: pa.Table) -> object:
        batch = collate(samples)
        widths.append(batch.inputs["input_ids"].shape[1])
        return batch

    monkeypatch.setattr(predictor._task, "collate", counted)
    list(predictor.predict(2, None))
    pieces = [widths[:3], widths[3:6], widths[6:]]  # 40, 40 and 20 rows by 16
    assert len(widths) == 8 and all(piece == sorted(piece, reverse=True) for piece in pieces)
    assert pieces[0][0] > pieces[0][-1]


def test_a_part_with_a_bad_row_is_not_written(job: JobSpec, split: Split, tmp_path: Path) -> None:
    predictor = _predictor(job, split, tmp_path, "error")
    assert list(predictor.predict(1, 2))[-1] == Part(100, 0)
    with pytest.raises(DataError, match=r"in\.parquet: row 309: text is null; fix the row, or set data\.on_bad_row"):
        list(predictor.predict(3, None))
    assert RunDir(str(tmp_path)).list("") == [part_name(1)]
