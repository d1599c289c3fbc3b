"""Predictions on a real Ray: every row comes out once and in order after kills, stops and dead workers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from launcher.errors import DataError, RunError, TrainingError
from launcher.predict.run import PredictionResult, predict_run
from launcher.rundir.directory import RunDir, read_job
from launcher.spec.job import JobSpec
from tests.support.finished_run import finished_run
from tests.support.jobs import example_table

pytestmark = pytest.mark.ray

_ROWS, _PARTS = 6200, 4  # parts of 2048 rows, the last smaller
_BAD = (5, 2047, 2048, 5000)

# One task whose batches are slow, and one that kills its worker at a row, once for each letter in a file.
_SLOW = """
import os, time
from launcher.tasks.text_classification import TextClassification


class Slow(TextClassification):
    def predict(self, model, samples):
        time.sleep(float(os.path.exists(os.environ.get("SLOW", "/nonexistent")) and 0.05))
        return super().predict(model, samples)


class Deadly(TextClassification):
    def encode(self, rows, with_targets, noise=None):
        if 3000 in rows.column("id").to_pylist():
            with open(DEATHS, "r+") as file:
                left = file.read()
                file.seek(0)
                file.truncate()
                file.write(left[1:])
            if left:
                os._exit(1)
        return super().encode(rows, with_targets, noise)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, user_modules: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("predict")
    text = example_table(_ROWS).column("text").to_pylist()
    for row in _BAD:
        text[row] = None
    table = pa.table({"id": np.arange(_ROWS), "text": pa.array(text, pa.string())})
    (folder / "in").mkdir()
    pq.write_table(table.slice(0, 5000), folder / "in" / "a.parquet")
    pq.write_table(table.slice(5000), folder / "in" / "b.parquet", row_group_size=33)
    sys.path.insert(0, str(user_modules))
    (user_modules / "slow_task.py").write_text(f"DEATHS = {str(folder / 'deaths')!r}\n{_SLOW}")
    yield folder
    sys.path.remove(str(user_modules))


def _run(place: Path, tiny_bert: Path, name: str, **sections: object) -> RunDir:
    return finished_run(
        tiny_bert, place / "runs", name=name, data={"on_bad_row": "skip"}, evaluation={"batch_size": 64}, **sections
    )


@pytest.fixture(scope="module")
def run(place: Path, tiny_bert: Path) -> RunDir:
    return _run(place, tiny_bert, "plain")


def _with(run: RunDir, **sections: dict[str, object]) -> JobSpec:
    raw = read_job(run).model_dump()
    return JobSpec.model_validate(raw | {name: raw[name] | values for name, values in sections.items()})


def _rows(output: Path) -> pa.Table:
    """Read the output and check that every row is there once, in order, and bad rows have no prediction."""
    table = pq.read_table(output)
    assert table.column("id").to_pylist() == list(range(_ROWS))
    assert [i for i, p in enumerate(table.column("prediction").to_pylist()) if p is None] == list(_BAD)
    assert sorted(path.name for path in output.iterdir())[:2] == ["_SUCCESS", "_predictions.json"]
    assert len(list(output.iterdir())) == 2 + _PARTS
    return table


@pytest.fixture(scope="module")
def whole(run: RunDir, place: Path, ray_cluster: None) -> pa.Table:
    """Return the predictions of two workers without faults."""
    assert predict_run(run, str(place / "in"), str(place / "whole")) == PredictionResult(_ROWS, len(_BAD), 0)
    return _rows(place / "whole")


def test_a_complete_output_is_not_written_again(run: RunDir, place: Path, whole: pa.Table) -> None:
    before = {path: path.stat().st_mtime_ns for path in (place / "whole").iterdir()}
    assert predict_run(run, str(place / "in"), str(place / "whole")) == PredictionResult(_ROWS, len(_BAD), _ROWS)
    assert {path: path.stat().st_mtime_ns for path in (place / "whole").iterdir()} == before
    with pytest.raises(RunError, match=r"whole: holds other predictions \(of .*in with 6200 rows, not .*a\.parquet"):
        predict_run(run, str(place / "in" / "a.parquet"), str(place / "whole"))
    with pytest.raises(RunError, match=r"lies within the input .*in; give a directory that does not"):
        predict_run(run, str(place / "in"), str(place / "in" / "out"))
    with pytest.raises(DataError, match=r"whole: 4 of its rows could not be used .*data\.on_bad_row=skip as before"):
        predict_run(run, str(place / "in"), str(place / "whole"), job=_with(run, data={"on_bad_row": "error"}))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_same_command_resumes_after_a_kill_or_ctrl_c(
    how: signal.Signals, run: RunDir, place: Path, tiny_bert: Path, whole: pa.Table
) -> None:
    import ray

    slow = _run(place, tiny_bert, "slow", task={"type": "slow_task:Slow"})
    output, brake = place / f"ended-{how.name}", place / "brake"
    brake.touch()
    environment = os.environ | {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "SLOW": str(brake),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "launcher", "predict", slow.uri, str(place / "in"), "--output", str(output),
        'cluster.pass_env=["SLOW", "PYTHONPATH"]',
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(output.glob("part-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    brake.unlink()
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert 1 <= len(before) < _PARTS and not (output / "_SUCCESS").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130, stderr
        assert f"rows are in {output}; run the same command again" in " ".join(stderr.split())
        assert not list(output.glob(".part-*"))
        return
    console = Console(file=StringIO(), width=200)
    done = predict_run(slow, str(place / "in"), str(output), console, _with(slow, cluster={"workers": 1}))
    assert 0 < done.found_rows < _ROWS
    assert f"resuming: {done.found_rows} of 6200 rows are in" in console.file.getvalue()  # type: ignore[attr-defined]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert _rows(output).equals(whole)  # bit by bit, with another number of workers


def test_a_dead_worker_is_replaced_and_its_part_repeated(
    place: Path, tiny_bert: Path, ray_cluster: None, whole: pa.Table
) -> None:
    deadly = _run(place, tiny_bert, "deadly", task={"type": "slow_task:Deadly"}, cluster={"workers": 1})
    (place / "deaths").write_text("xxxxx")
    with pytest.raises(TrainingError, match=r"part 1 \(2048 rows from .*a\.parquet: row 2048\) killed its worker 3"):
        predict_run(deadly, str(place / "in"), str(place / "deadly"))
    assert (place / "deaths").read_text() in ("x", "xx")  # the first death may have come while part 1 was read ahead
    done = predict_run(deadly, str(place / "in"), str(place / "deadly"))  # the last death, then it works
    assert done == PredictionResult(_ROWS, len(_BAD), 2048) and (place / "deaths").read_text() == ""
    assert _rows(place / "deadly").equals(whole)


def test_a_bad_row_stops_the_command_and_is_named(run: RunDir, place: Path, ray_cluster: None) -> None:
    strict = _with(run, data={"on_bad_row": "error"})
    with pytest.raises(DataError, match=r"b\.parquet: row 0: text is null; fix the row, or set data\.on_bad_row: skip"):
        predict_run(run, str(place / "in" / "b.parquet"), str(place / "strict"), job=strict)
    assert not (place / "strict").exists()  # no part was finished
