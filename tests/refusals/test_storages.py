"""Unusable storages, and runs that cannot be resumed: `check` and `train` refuse each in one sentence."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.desk import Case, Desk, fits

_REMEDY = "give a directory that can be written"
_RESTORE = "restore it from a copy, or start a new run under another name"
_RUN = "runs/first"
_STEP = f"{_RUN}/checkpoints/step-00000005"


def _link(target: str) -> list[str]:
    Path("store").symlink_to(target)
    return ["output.storage=store"]


def _pipe() -> list[str]:
    os.mkfifo("store")
    return ["output.storage=store"]


STORAGES = [
    Case("below a file", lambda desk: ["output.storage=job.yaml/runs"],
         f"output.storage: DESK/job.yaml is a file; {_REMEDY}"),
    Case("a device", lambda desk: ["output.storage=/dev/null"], f"output.storage: /dev/null is a file; {_REMEDY}"),
    Case("a pipe", lambda desk: _pipe(), f"output.storage: DESK/store is a file; {_REMEDY}"),
    Case("a link to nowhere", lambda desk: _link("gone/deep"),
         f"output.storage: DESK/store is a link to gone/deep, which does not exist; {_REMEDY}"),
    Case("a link to itself", lambda desk: _link("store"),
         f"output.storage: DESK/store is a link to store, which does not exist; {_REMEDY}"),
    Case("a name that is too long", lambda desk: ["output.storage=" + "x" * 300],
         f"output.storage: DESK/xxx... cannot be used (File name too long); {_REMEDY}"),
    Case("a scheme that nobody knows", lambda desk: ["output.storage=foo://bucket/runs"],
         "output.storage: foo://bucket/runs: cannot be opened (Protocol not known: foo); install the fsspec driver of "
         "its protocol"),
    Case("no bucket", lambda desk: ["output.storage=s3://"],
         "output.storage: s3:// names no directory; write it as s3://BUCKET/FOLDER"),
    Case("a web server", lambda desk: ["output.storage=https://example.com/runs"],
         f"output.storage: https://example.com/runs cannot be written (a web server takes no files); {_REMEDY}, or a "
         "URI such as s3://"),
    Case("a data set of the hub", lambda desk: ["output.storage=hub:me/runs"],
         f"output.storage: hub:me/runs cannot be written (a data set of the hub takes no files); {_REMEDY}, or a URI "
         "such as s3://"),
    Case("HDFS without Java",
         lambda desk: desk.monkeypatch.setenv("JAVA_HOME", "/nowhere") or ["output.storage=hdfs://x/runs"],
         "output.storage: hdfs://x/runs cannot be opened (...); fix the URI, or install its driver"),
]  # fmt: skip


_NEW = f"change `name` to start a new run, from the old weights with `--fork DESK/{_RUN}`"


def _torn(desk: Desk, name: str, content: str | bytes) -> None:
    desk.begun()
    desk.file(f"{_RUN}/{name}", content)


RUNS = [
    Case("a file in its place", lambda desk: desk.file(_RUN, "mine"),
         f"DESK/{_RUN}: is a file, where the directory of the run should be; change `name`, or move it away"),
    Case("a run of another job", lambda desk: desk.begun() or ["train.batch_size=16", "task.max_length=16"],
         f"DESK/{_RUN}: belongs to another job (task.max_length: 32 -> 16; train.batch_size: 8 -> 16); {_NEW}, or undo "
         "the change to resume this one"),
    Case("a run of other data", lambda desk: desk.begun() or desk.texts(["a", "b"] * 30),
         f"DESK/{_RUN}: the training data changed since the run began (... rows, fingerprint ... -> 60 rows, "
         f"fingerprint ...); put it back, or {_NEW}"),
    Case("a job file cut off", lambda desk: _torn(desk, "job.yaml", "name: fir"),
         f"DESK/{_RUN}/job.yaml: not a resolved job file (task: Field required); {_RESTORE}"),
    Case("a job file of noise", lambda desk: _torn(desk, "job.yaml", b"\xff\x00"),
         f"DESK/{_RUN}/job.yaml: not a resolved job file ('utf-8' codec ...); {_RESTORE}"),
    Case("a directory where the job file was", lambda desk: Path(f"{_RUN}/job.yaml").mkdir(parents=True),
         f"DESK/{_RUN}/job.yaml: cannot be used (...); {_RESTORE}"),
    Case("a job file of a newer version",
         lambda desk: desk.begun() or desk.file(f"{_RUN}/job.yaml", Path(f"{_RUN}/job.yaml").read_text() + "soon: 1\n"),
         f"DESK/{_RUN}/job.yaml: holds soon, which this version of the launcher does not know; use the version that "
         "wrote it"),
    Case("a plan cut off", lambda desk: _torn(desk, "plan.json", '{"task":'),
         f"DESK/{_RUN}/plan.json: not a valid Plan (Invalid JSON: EOF ...); {_RESTORE}"),
    Case("a plan of a newer version",
         lambda desk: desk.begun() or desk.edit(f"{_RUN}/plan.json", lambda plan: plan.update(soon=1)),
         f"DESK/{_RUN}/plan.json: holds soon, which this version of the launcher does not know; use the version that "
         "wrote it"),
    Case("metrics that are none", lambda desk: _torn(desk, "metrics.jsonl", '{"step": 1}\n{"st'),
         f"DESK/{_RUN}/metrics.jsonl:1: not a record of a run; {_RESTORE}"),
    Case("a file where the checkpoints were", lambda desk: _torn(desk, "checkpoints", ""),
         f"DESK/{_RUN}/checkpoints: is not a directory; {_RESTORE}"),
    Case("shards of another ZeRO stage", lambda desk: desk.begun() or desk.checkpoint() or ["parallel.zero=3"],
         "the checkpoint of step 5 was written with ZeRO stage 2, stage 3 cannot load it; set parallel.zero: 2 to "
         "resume"),
    Case("a result cut off", lambda desk: _torn(desk, "result.json", "{"),
         f"DESK/{_RUN}/result.json: not a valid ResultRecord (Invalid JSON: EOF ...); {_RESTORE}"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("case", [*STORAGES, *RUNS], ids=lambda case: case.name)
def test_an_unusable_storage_or_run_is_refused(case: Case, command: str, desk: Desk) -> None:
    desk.refuses_case(command, case)


@pytest.fixture
def tiny_storage(desk: Desk) -> Iterator[Path]:
    """Mount a file system of 16 KiB; skip if this user may not mount."""
    folder = Path("small")
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", "small"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs to mount a tmpfs ({made.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "small"], check=True)


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_full_storage_is_refused(command: str, tiny_storage: Path, desk: Desk) -> None:
    sentence = f"output.storage: DESK/small cannot be written (No space left on device); {_REMEDY}"
    desk.refuses(command, sentence, "job.yaml", "output.storage=small/runs")


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_read_only_storage_is_refused(command: str, tiny_storage: Path, desk: Desk) -> None:
    subprocess.run(["mount", "-o", "remount,ro", "small"], check=True)
    sentence = f"output.storage: DESK/small cannot be written (no permission); {_REMEDY}"
    desk.refuses(command, sentence, "job.yaml", "output.storage=small/runs")


def test_a_storage_that_fills_up_keeps_no_partial_files(tiny_storage: Path, desk: Desk) -> None:
    # The storage passes the check at the start, and fills up while data are converted.
    desk.monkeypatch.setattr("launcher.rundir.writable._probe", lambda folder: None)
    desk.file(
        "data/train.csv", "text,label\n" + "".join(f"w{i} w{i * 7919 % 9973},{'ab'[i % 2]}\n" for i in range(9000))
    )
    before = desk.files()
    ended = desk.launcher("check", "job.yaml", "output.storage=small/runs", "data.train=data/train.csv")
    assert ended.code == 2
    reason = "cannot be written (No space left on device); give a directory that can be"
    sentence = f"output.storage: DESK/small/runs/.cache/... {reason}"
    assert fits(sentence, ended.err.strip()), ended.err
    assert {name for name in desk.files() if name not in before} <= {"small/runs", "small/runs/.cache"}
