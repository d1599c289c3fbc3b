"""Broken data files: `launcher check` and `launcher train` refuse each in one sentence."""

import gzip
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from tests.support.desk import Case, Desk, check_and
from tests.support.jobs import example_table

_TRAIN = "data/train.parquet"
_ENDINGS = ".parquet, .pq, .arrow, .feather, .ipc, .csv, .tsv, .jsonl, .ndjson, .json, .txt"


def _file(desk: Desk, name: str, content: str | bytes) -> list[str]:
    desk.file(name, content)
    return [f"data.train={name}"]


def _link(target: str) -> None:
    Path(_TRAIN).unlink()
    Path(_TRAIN).symlink_to(target)


def _folder() -> None:
    Path(_TRAIN).unlink()
    Path(_TRAIN).mkdir()


def _pipe(desk: Desk) -> None:
    Path(_TRAIN).unlink()
    os.mkfifo(_TRAIN)


def _damaged(desk: Desk) -> None:
    """Overwrite the pages of a Parquet file, but not its footer and magic bytes."""
    content = Path(_TRAIN).read_bytes()
    desk.file(_TRAIN, content[:4] + b"\xff" * 600 + content[604:])


def _cut_arrow(desk: Desk, keep: int) -> list[str]:
    pyarrow.feather.write_feather(example_table(40), "data/train.arrow", compression="uncompressed")
    return _file(desk, "data/train.arrow", Path("data/train.arrow").read_bytes()[:keep])


FILES = [
    Case("nothing there", lambda desk: Path(_TRAIN).unlink(),
         f"data.train: DESK/{_TRAIN} does not exist; give a file, a directory or a glob that does"),
    Case("an empty Parquet file", lambda desk: desk.file(_TRAIN),
         f"DESK/{_TRAIN}: not a readable parquet file (Parquet file size is 0 bytes); restore or remove it"),
    Case("half a Parquet file", lambda desk: desk.file(_TRAIN, Path(_TRAIN).read_bytes()[:-100]),
         f"DESK/{_TRAIN}: not a readable parquet file (Parquet magic bytes not found in footer. ...); restore or "
         "remove it"),
    Case("a Parquet file whose pages are damaged", _damaged, f"DESK/{_TRAIN}: cannot be read (...); restore the file"),
    Case("no rows", lambda desk: pq.write_table(example_table(0), _TRAIN),
         f"data.train: DESK/{_TRAIN} has no rows; give a file that has"),
    Case("a directory where the file was", lambda desk: _folder(),
         f"data.train: DESK/{_TRAIN} holds no data files ({_ENDINGS}); name the files so, or set data.format"),
    Case("a link to nowhere", lambda desk: _link("gone.parquet"),
         f"data.train: DESK/{_TRAIN} does not exist; give a file, a directory or a glob that does"),
    Case("a link to itself", lambda desk: _link("train.parquet"),
         f"data.train: DESK/{_TRAIN} cannot be listed (Too many levels of symbolic links); check the address, the "
         "network and your rights"),
    Case("a pipe", _pipe,
         f"data.train: DESK/{_TRAIN} cannot be listed (it is a device or a pipe, neither file nor directory); check "
         "the address, the network and your rights"),
    Case("a device", lambda desk: ["data.train=/dev/zero", "data.format=csv"],
         "data.train: /dev/zero cannot be listed (it is a device or a pipe, neither file nor directory); check the "
         "address, the network and your rights"),
    Case("a glob that matches nothing", lambda desk: ["data.train=data/*.csv"],
         f"data.train: DESK/data/*.csv matches no data files ({_ENDINGS}); name the files so, or set data.format"),
    Case("a glob that is none", lambda desk: ["data.train=data/[z-a].parquet"],
         "data.train: DESK/data/[z-a].parquet is no path or glob (bad character range z-a at ...); fix it"),
    Case("a spreadsheet", lambda desk: _file(desk, "data/train.xlsx", b"PK\x03\x04"),
         f"data.train: DESK/data/train.xlsx has no known ending ({_ENDINGS}); name the files so, or set data.format"),
    Case("a spreadsheet that is called CSV", lambda desk: _file(desk, "data/train.csv", b"PK\x03\x04" + bytes(40)),
         "DESK/data/train.csv: not a readable csv file (it is a zip archive or a spreadsheet; save it as text); fix "
         "the file, or set data.format"),
    Case("a packed CSV under another name",
         lambda desk: _file(desk, "data/train.csv", gzip.compress(b"text,label\nw1,a\nw2,b\n")),
         "DESK/data/train.csv: not a readable csv file (it is compressed with gzip; add .gz to its name and set "
         "data.format, or decompress it); fix the file, or set data.format"),
    Case("a CSV in UTF-16", lambda desk: _file(desk, "data/train.csv", "text,label\nw1,a\nw2,b\n".encode("utf-16")),
         "DESK/data/train.csv: not a readable csv file (it is UTF-16; save it as UTF-8); fix the file, or set "
         "data.format"),
    Case("a CSV with a ragged row", lambda desk: _file(desk, "data/train.csv", "text,label\nw1,a\nw2\nw3,b\n"),
         "DESK/data/train.csv: not a readable csv file (CSV parse error: Row #3: Expected 2 columns, got 1: w2); fix "
         "the file, or set data.format"),
    Case("a CSV of blank lines", lambda desk: _file(desk, "data/train.csv", "\n\n\n"),
         "DESK/data/train.csv: has no rows; give a file that has"),
    Case("a JSON line that is cut off",
         lambda desk: _file(desk, "data/train.jsonl", '{"text": "w1", "label": "a"}\n{"text": "w2",\n'),
         "DESK/data/train.jsonl: not a readable jsonl file (line 2: Expecting property name enclosed in double quotes "
         "at character 16); fix the file, or set data.format"),
    Case("JSON lines of numbers", lambda desk: _file(desk, "data/train.jsonl", "5\n6\n"),
         "DESK/data/train.jsonl: not a readable jsonl file (line 1: it holds no object); fix the file, or set "
         "data.format"),
    Case("JSON lines of empty objects", lambda desk: _file(desk, "data/train.jsonl", "{}\n{}\n"),
         "DESK/data/train.jsonl: has no columns; give a file whose rows hold something"),
    Case("a JSON line without a bottom", lambda desk: _file(desk, "data/train.jsonl", '{"a":' * 50_000),
         "DESK/data/train.jsonl: not a readable jsonl file (line 1: it is nested too deeply); fix the file, or set "
         "data.format"),
    Case("Parquet that is called JSON", lambda desk: _file(desk, "data/train.json", Path(_TRAIN).read_bytes()),
         "DESK/data/train.json: not a readable jsonl file (it is a Parquet file; name it .parquet); fix the file, or "
         "set data.format"),
    Case("half an Arrow file", lambda desk: _cut_arrow(desk, -50),
         "DESK/data/train.arrow: not a readable arrow file (Not an Arrow file); restore or remove it"),
    Case("the begin of an Arrow file", lambda desk: _cut_arrow(desk, 6),
         "DESK/data/train.arrow: not a readable arrow file (File is too small: 6); restore or remove it"),
    Case("one damaged file of two",
         lambda desk: desk.file("data/train2.parquet", "x" * 100) or ["data.train=data/train*.parquet"],
         "DESK/data/train2.parquet: not a readable parquet file (Parquet magic bytes not found in footer. ...); "
         "restore or remove it"),
    Case("a data set of the hub, without a network", lambda desk: ["data.train=hub:glue/sst2#train"],
         "data.train: hub:glue/sst2#train cannot be loaded (Couldn't reach 'glue/sst2' on the Hub "
         "(OfflineModeIsEnabled)); write hub:NAME#SPLIT, with the CONFIG it needs as hub:ORG/NAME/CONFIG#SPLIT"),
    Case("a data set of the hub without a name", lambda desk: ["data.train=hub:#train"],
         "override data.train=hub:#train: data.train[0]: hub:#train has an empty part; write hub:NAME#SPLIT, ..."),
    Case("a scheme that nobody knows", lambda desk: ["data.train=foo://bucket/train.parquet"],
         "data.train: foo://bucket/train.parquet: cannot be opened (Protocol not known: foo); install the fsspec "
         "driver of its protocol"),
    Case("a web server that is not there", lambda desk: ["data.train=http://127.0.0.1:1/train.parquet"],
         "data.train: http://127.0.0.1:1/train.parquet cannot be listed (...); check the address, the network and your "
         "rights"),
]  # fmt: skip


@check_and("train", FILES)
def test_a_broken_data_file_is_refused(command: str, case: Case, desk: Desk) -> None:
    desk.refuses_case(command, case)


def _csv(desk: Desk, content: str) -> Sequence[str]:
    return _file(desk, "data/train2.csv", content)


# A readable file is converted before its columns are checked, and the converted file is kept.
CONVERTED = [
    Case("a CSV without names of columns", lambda desk: _csv(desk, "a good film,a\na bad film,b\n"),
         "DESK/data/train2.csv: has no column 'text', which the task reads; the file has a good film, a (see task:)"),
    Case("formats that differ, and so do types",
         lambda desk: _csv(desk, "text,label\nw1,3\n") and ["data.train=data/train*"],
         f"DESK/data/train2.csv: column 'label' is int64, but string in DESK/{_TRAIN}; give all files of a split the "
         "same types"),
]  # fmt: skip


@pytest.mark.parametrize("case", CONVERTED, ids=lambda case: case.name)
def test_a_converted_file_with_wrong_columns_is_refused(case: Case, desk: Desk) -> None:
    desk.refuses_case("check", case, may_leave="runs/.cache")
    assert [path.suffix for path in Path("runs").rglob("*") if path.is_file()] == [".parquet"]


@pytest.mark.slow
def test_a_bucket_without_a_network_is_refused_in_seconds(desk: Desk) -> None:
    sentence = (
        "data.train: s3://bucket/train.parquet?endpoint_override=127.0.0.1:1 cannot be listed (no "
        "answer: ...); check the address, the network and your rights"
    )
    desk.monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    desk.refuses("check", sentence, "job.yaml", "data.train=s3://bucket/train.parquet?endpoint_override=127.0.0.1:1")
