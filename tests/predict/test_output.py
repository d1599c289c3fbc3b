"""The output directory of predictions: claimed, resumed and completed; half a part is never visible."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.errors import RowCountError, RunError
from launcher.predict.fingerprint import model_fingerprint
from launcher.predict.output import (
    FINISHED,
    LOCK,
    MANIFEST,
    Part,
    PredictionsRecord,
    complete_parts,
    create_output,
    discard_empty,
    finish,
    lock_output,
    part_name,
    remove_unfinished,
    write_part,
)
from launcher.predict.parts import Layout
from launcher.rundir.directory import RunDir

_LAYOUT = Layout(25, 10, 4)
_SCHEMA = pa.schema({"id": pa.int64(), "prediction": pa.string()})
_REQUESTED = PredictionsRecord(
    input="in.parquet", input_fingerprint="i", run="/runs/a", model_fingerprint="m",
    options={"task.max_length": "8"}, rows=25, part_rows=10, piece_rows=4,
)  # fmt: skip


def _write(output: RunDir, number: int, rows: int | None = None) -> Part:
    ids = list(_LAYOUT.part(number))[:rows]
    with write_part(output, number, _SCHEMA) as out:
        out.write(pa.table({"id": ids, "prediction": ["a"] * len(ids)}, _SCHEMA), number)
        return out.finish()


def test_an_output_is_complete_when_all_parts_are_written(tmp_path: Path) -> None:
    output = RunDir(str(tmp_path / "out"))
    assert create_output(output, _REQUESTED) == _REQUESTED
    assert complete_parts(output, _LAYOUT) == {}
    written = [_write(output, number) for number in (2, 0)]
    assert complete_parts(output, _LAYOUT) == {0: Part(10, 0), 2: Part(5, 2)} and written == [Part(5, 2), Part(10, 0)]
    with pytest.raises(RowCountError, match=r"out: 15 rows in 2 parts came out of 25 in 3; remove it"):
        finish(output, _LAYOUT, Part(15, 2))
    total = written[0] + written[1] + _write(output, 1)
    assert finish(output, _LAYOUT, total).model_dump() == {"rows": 25, "skipped_rows": 3, "parts": 3}
    assert output.list("") == [FINISHED, MANIFEST, *map(part_name, range(3))]
    assert pq.read_table(tmp_path / "out").column("id").to_pylist() == list(range(25))  # readers ignore the records


def test_a_failed_part_leaves_no_file(tmp_path: Path) -> None:
    output = RunDir(str(tmp_path))
    with pytest.raises(ValueError, match="in the middle"), write_part(output, 0, _SCHEMA) as out:
        out.write(pa.table({"id": [0], "prediction": ["a"]}, _SCHEMA), 0)
        assert [name.startswith(".part-00000000.") for name in output.list("")] == [True]
        raise ValueError("in the middle")
    assert output.list("") == []
    (tmp_path / ".part-00000003.host.1.tmp").write_bytes(b"PAR1")  # of a killed worker
    remove_unfinished(output)
    assert output.list("") == []


def test_a_failed_part_leaves_no_object_in_a_store_without_renames() -> None:
    """Use fsspec, like s3fs: a stream that an error closes is published."""
    output = RunDir("memory://launcher-test-output")
    output.delete("")
    assert output.local is None
    create_output(output, _REQUESTED)
    written = _write(output, 2)
    with pytest.raises(ValueError, match="in the middle"), write_part(output, 0, _SCHEMA) as out:
        out.write(pa.table({"id": [0], "prediction": ["a"]}, _SCHEMA), 0)
        raise ValueError("in the middle")
    remove_unfinished(output)
    assert complete_parts(output, _LAYOUT) == {2: written}
    assert output.list("") == [MANIFEST, part_name(2)]


def test_a_torn_part_is_missing_and_an_unknown_file_is_refused(tmp_path: Path) -> None:
    output = RunDir(str(tmp_path))
    _write(output, 0)
    _write(output, 1)
    path = tmp_path / part_name(1)
    path.write_bytes(path.read_bytes()[:-9])
    assert complete_parts(output, _LAYOUT) == {0: Part(10, 0)}
    _write(output, 1, rows=3)
    with pytest.raises(RunError, match=r"part-00000001\.parquet: has 3 rows, its part has 10; remove it and run"):
        complete_parts(output, _LAYOUT)
    os.rename(path, tmp_path / "part-00000003.parquet")
    with pytest.raises(RunError, match=r"part-00000003\.parquet: is no part of these predictions; remove it"):
        complete_parts(output, _LAYOUT)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"input": "b.parquet", "input_fingerprint": "j", "rows": 26},
            r"holds other predictions \(of in\.parquet with 25 rows, not b\.parquet with 26\); give another "
            "--output, or remove it",
        ),
        ({"input_fingerprint": "j"}, r"\(of in\.parquet with 25 rows, whose files have changed\)"),
        ({"run": "/runs/b", "model_fingerprint": "n"}, r"\(by the model of /runs/a, not of /runs/b\)"),
        ({"model_fingerprint": "n"}, r"\(by the model of /runs/a, as it was before it changed\)"),
        ({"options": {"task.max_length": "16"}}, r"\(task\.max_length: 8 -> 16\)"),
    ],
)
def test_other_predictions_are_refused(tmp_path: Path, changes: dict[str, object], sentence: str) -> None:
    output = RunDir(str(tmp_path / "out"))
    create_output(output, _REQUESTED)
    other = _REQUESTED.model_copy(update=changes)
    assert create_output(output, other) == other  # without parts nothing would be lost
    create_output(output, _REQUESTED)
    _write(output, 2)
    with pytest.raises(RunError, match=sentence):
        create_output(output, other)
    other_cut = _REQUESTED.model_copy(update={"part_rows": 5})
    assert create_output(output, other_cut) == _REQUESTED  # resumed with the cut of the existing parts


def test_foreign_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("foreign")
    with pytest.raises(RunError, match="is not empty; give a new directory, so that nothing is overwritten"):
        create_output(RunDir(str(tmp_path)), _REQUESTED)
    with pytest.raises(RunError, match=r"notes\.txt: is a file; give a new directory"):
        create_output(RunDir(str(tmp_path / "notes.txt")), _REQUESTED)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_output_without_parts_is_removed(tmp_path: Path) -> None:
    output = RunDir(str(tmp_path / "deep" / "out"))
    with lock_output(output):
        create_output(output, _REQUESTED)
        discard_empty(output)
    assert not output.exists()
    with lock_output(output):
        create_output(output, _REQUESTED)
        _write(output, 1)
        discard_empty(output)
    assert output.list("") == [MANIFEST, part_name(1)]


def test_a_second_command_on_one_output_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    output = RunDir(str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).touch()  # of a command that was killed
    with lock_output(output):
        create_output(output, _REQUESTED)
        with (
            pytest.raises(RunError, match=r"out: another `launcher predict` is writing there now; wait for it, or"),
            lock_output(output),
        ):
            pass
        assert output.list("") == [LOCK, MANIFEST]
    with lock_output(output):
        assert create_output(output, _REQUESTED) == _REQUESTED
    assert output.list("") == [MANIFEST]


def test_an_output_that_cannot_be_locked_is_refused_by_what_writes_to_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (RunDir(str(tmp_path / "file")), RunDir("memory://launcher-test-no-locks")):
        with lock_output(output):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_model_fingerprint_covers_weights_and_config_but_not_the_card(tmp_path: Path) -> None:
    run, weights = RunDir(str(tmp_path)), bytearray(os.urandom(9 << 20))
    run.write_bytes("model/config.json", b"{}")
    run.write_bytes("model/model.safetensors", bytes(weights))
    before = model_fingerprint(run)
    run.write_bytes("model/README.md", b"scores")
    assert model_fingerprint(run) == before
    run.write_bytes("model/model.safetensors", os.urandom(9 << 20))
    assert model_fingerprint(run) != before
    run.write_bytes("model/model.safetensors", bytes(weights))
    run.write_bytes("model/config.json", b"[]")
    assert model_fingerprint(run) != before
