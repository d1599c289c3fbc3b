"""Unusable runs, data and arguments of evaluate, predict, report, compare, replay, rows: one sentence each."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.desk import Desk, Order, well

_RESTORE = "restore it from a copy, or start a new run under another name"
_RUN = "runs/first"


def _pipe(_: Desk) -> None:
    os.mkfifo("in.parquet")


def _rows(**columns: object) -> Callable[[Desk], None]:
    return lambda desk: desk.table("in.parquet", **columns)


def _twin() -> None:
    shutil.copytree(_RUN, "runs/second")


def _evil(old: str, new: str) -> Callable[[Desk], None]:
    """Return a function that changes the job.yaml in the run directory."""

    def damage(desk: Desk) -> None:
        desk.table("in.parquet", text=["w1"], label=["a"])
        text = Path(f"{_RUN}/job.yaml").read_text()
        assert old in text
        Path(f"{_RUN}/job.yaml").write_text(text.replace(old, new))

    return damage


def _gone(desk: Desk) -> None:
    desk.table("in.parquet", text=["w1"], label=["a"])
    desk.monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")


def _taken(desk: Desk) -> None:
    """Write predictions to `out` in another command, which holds the lock until this process ends."""
    desk.table("in.parquet", text=["w1"])
    Path("out").mkdir()
    fcntl.flock(os.open("out/.predict.lock", os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)


_QUESTIONS = "--step N for the rows of a step, --row FILE:NUMBER for the inverse"
_PERMITS = "and only you can permit that; add"

ORDERS = [
    *(
        Order(f"{command} {_RUN} {rest}", _evil("trust_remote_code: false", "trust_remote_code: true"),
              f"DESK/{_RUN}/job.yaml: asks for model.trust_remote_code: true, which runs Python code from the model's "
              f"directory, {_PERMITS} model.trust_remote_code=true to the command to allow it, or "
              "model.trust_remote_code=false to run without it")
        for command, rest in (
            ("predict", "in.parquet --output out"),
            ("evaluate", "--split validation"),
            ("replay", ""),
        )
    ),
    Order(f"predict {_RUN} in.parquet --output out", _evil("address: null", "address: ray://evil:10001"),
          f"DESK/{_RUN}/job.yaml: asks for cluster.address: ray://evil:10001, which sends data and environment to that "
          f"cluster, {_PERMITS} cluster.address=ray://evil:10001 to the command to allow it, or cluster.address=null "
          "to run without it"),
    Order(f"replay {_RUN}", _evil("mlflow: null", "mlflow: http://evil:5000"),
          f"DESK/{_RUN}/job.yaml: asks for logging.mlflow: http://evil:5000, which sends metrics and the credentials "
          f"in MLflow's variables to that server, {_PERMITS} logging.mlflow=http://evil:5000 to the command to allow "
          "it, or logging.mlflow=null to run without it"),
    *(
        Order(command, _gone,
              "RAY_ADDRESS: 127.0.0.1:1: nothing listens there (Connection refused); is Ray running on 127.0.0.1, and "
              "is 1 its port? give auto, HOST:6379 (on a node of the cluster), or ray://HOST:10001 (from elsewhere); "
              "unset it to use a local Ray")
        for command in ("train job.yaml", f"predict {_RUN} in.parquet --output out")
    ),
    Order("evaluate nowhere", well,
          "DESK/nowhere: no run there (it has no job.yaml); give the directory that `launcher train` printed"),
    Order("evaluate job.yaml", well,
          "DESK/job.yaml: no run there (it has no job.yaml); give the directory that `launcher train` printed"),
    Order(f"evaluate {_RUN}", lambda desk: Path(f"{_RUN}/model/config.json").unlink(),
          f"DESK/{_RUN}: has no model yet; finish the run with `launcher train` first"),
    Order(f"evaluate {_RUN}", well, f"DESK/{_RUN}: its job file has no data.test; add it to the job file of a new run"),
    Order(f"evaluate {_RUN} --split tset", well,
          "--split is tset, which is not one of validation, test; did you mean test?"),
    Order(f"evaluate {_RUN} --data in.parquet --split test", well,
          "--data and --split: give only one of them, since other data is not a split of the run"),
    Order(f"evaluate {_RUN} --name new", well, "--name: names the scores on --data; give --data too, or drop --name"),
    Order(f"evaluate {_RUN} --data in.parquet --name test", well,
          "--name: test is a split of the run, and its scores are not overwritten; give another name"),
    Order(f"evaluate {_RUN} --data in.parquet seed=3", well,
          "override seed=3: seed is fixed, as the run was trained with it; only cluster, parallel, task, data.format, "
          "data.on_bad_row, evaluation.batch_size may be changed here"),
    Order(f"evaluate {_RUN} --data in.parquet --name a/b", well,
          "--name: a/b is not made of at most 63 letters, digits, dots, dashes and underscores, with a letter or digit "
          "first; give one that is"),
    Order(f"evaluate {_RUN} --data in.parquet", lambda desk: desk.file("in.parquet", "PAR1"),
          "DESK/in.parquet: not a readable parquet file (...); restore or remove it"),
    Order(f"evaluate {_RUN} --data in.parquet", _pipe,
          "in.parquet cannot be listed (it is a device or a pipe, neither file nor directory); check the "
          "address, the network and your rights"),
    Order(f"evaluate {_RUN} --data in.parquet", _rows(text=["w1"] * 3, label=["a", "b", None]),
          "DESK/in.parquet: row 2: label is null; fix the row, or set data.on_bad_row: skip to leave such rows out"),
    Order(f"evaluate {_RUN} --split validation", lambda desk: desk.file(f"{_RUN}/job.yaml", "name: ["),
          f"DESK/{_RUN}/job.yaml:1:8: not valid YAML: ..."),
    Order(f"predict {_RUN} nowhere.parquet --output out", well,
          "nowhere.parquet does not exist; give a file, a directory or a glob that does"),
    Order(f"predict {_RUN} in.parquet --output out", _rows(body=["w1"]),
          "DESK/in.parquet: has no column 'text'; it has body"),
    Order(f"predict {_RUN} in.parquet --output out", _rows(text=["w1"], prediction=["a"]),
          "DESK/in.parquet: already has a column 'prediction'; rename it before predicting"),
    Order(f"predict {_RUN} in.parquet --output out", _taken,
          "DESK/out: another `launcher predict` is writing there now; wait for it, or give another --output"),
    Order(f"predict {_RUN} data/train.parquet --output data", well,
          "DESK/data: is not empty; give a new directory, so that nothing is overwritten"),
    Order(f"predict {_RUN} data/train.parquet --output job.yaml/out", well,
          "DESK/job.yaml/out: cannot be written (Not a directory); give another --output"),
    Order(f"predict {_RUN} data/train.parquet --output foo://bucket/out", well,
          "foo://bucket/out: cannot be opened (Protocol not known: foo); install the fsspec driver of its protocol"),
    Order(f"predict {_RUN} in.parquet --output out", _rows(text=[["w1"], ["w2"]]),
          "DESK/in.parquet: row 0: text is ['w1'], which is not text; fix the row, or set data.on_bad_row: skip to "
          "leave such rows out"),
    Order("report data", well,
          "DESK/data: no run there (it has no job.yaml); give the directory that `launcher train` printed"),
    Order(f"report {_RUN}", lambda desk: desk.file(f"{_RUN}/metrics.jsonl", b"\xff\n"),
          f"DESK/{_RUN}/metrics.jsonl:1: not a record of a run; {_RESTORE}"),
    Order(f"report {_RUN}", lambda desk: desk.file(f"{_RUN}/result.json", "[]"),
          f"DESK/{_RUN}/result.json: not a valid ResultRecord (...); {_RESTORE}"),
    Order(f"report {_RUN}", lambda desk: desk.file(f"{_RUN}/plan.json", "{"),
          f"DESK/{_RUN}/plan.json: not valid JSON (...); {_RESTORE}"),
    Order(f"report {_RUN}", lambda desk: desk.edit(f"{_RUN}/scores-test.json", lambda scores: scores.update(soon=1)),
          f"DESK/{_RUN}/scores-test.json: holds soon, which this version of the launcher does not know; use the "
          "version that wrote it"),
    Order(f"report {_RUN}",
          lambda desk: desk.file(f"{_RUN}/job.yaml", Path(f"{_RUN}/job.yaml").read_text() + "soon: 1\n"),
          f"DESK/{_RUN}/job.yaml: holds soon, which this version of the launcher does not know; use the version that "
          "wrote it"),
    Order(f"compare {_RUN} nowhere", well,
          "DESK/nowhere: no run there (it has no job.yaml); give the directory that `launcher train` printed"),
    Order(f"compare {_RUN} runs/second --output data", lambda desk: _twin(),
          "--output: DESK/data is not a comparison page and would be overwritten; give another file"),
    Order(f"compare {_RUN} runs/second --output job.yaml", lambda desk: _twin(),
          "--output: DESK/job.yaml is not a comparison page and would be overwritten; give another file"),
    Order(f"compare {_RUN} {_RUN}", well, f"DESK/{_RUN}: is listed twice; give different runs"),
    Order(f"compare {_RUN} runs/second",
          lambda desk: _twin() or desk.file(f"{_RUN}/metrics.jsonl", '{"kind": "step"}\n'),
          f"DESK/{_RUN}/metrics.jsonl:1: not a record of a run; {_RESTORE}"),
    Order("sweeps compare runs/first", well,
          "runs/first: no sweep there (it has no sweep/sweep.json); give what `launcher tune` printed"),
    Order(f"replay {_RUN} train.epochs=5", well,
          "override train.epochs=5: train.epochs is fixed, as the run was trained with it; only cluster, parallel, "
          "checkpoint, logging may be changed here"),
    Order(f"replay {_RUN} --name first", well, "--name: first is the run itself; give another name"),
    Order(f"replay {_RUN} cluster.workers=two", well,
          "override cluster.workers=two: cluster.workers is two, which is not a whole number; give a whole number of "
          "at least 1"),
    Order(f"replay {_RUN}", lambda desk: desk.file(f"{_RUN}/plan.json", "{"),
          f"DESK/{_RUN}/plan.json: not a valid Plan (...); {_RESTORE}"),
    Order(f"replay {_RUN}", lambda desk: Path("data/train.parquet").unlink(),
          "data.train: DESK/data/train.parquet does not exist; give a file, a directory or a glob that does"),
    *(
        Order(f"rows {_RUN} {rest}", well, sentence)
        for rest, sentence in (
            ("", f"--step and --row: give one of them: {_QUESTIONS}"),
            ("--step 3 --row train.parquet:4", f"--step and --row: give only one of them: {_QUESTIONS}"),
            ("--row train.parquet:4 --losses", "--losses: are those of a step; give --step N instead of --row"),
            ("--step 0", "--step: 0 is not within 1 to 10, the steps of the run"),
            ("--step 9-11", "--step: 9-11 is not within 1 to 10, the steps of the run"),
            ("--step 5-3", "--step: 5-3 ends before it begins; write 3-5"),
            ("--step last", "--step: 'last' is neither a step nor a range; write 100 or 100-120"),
            ("--step 3-", "--step: '3-' is neither a step nor a range; write 100 or 100-120"),
            ("--row validation.parquet:3",
             "--row: validation.parquet is no file of the training data; it has DESK/data/train.parquet"),
            ("--row data/train.parquet:40",
             "--row: DESK/data/train.parquet has no row 40; it has 40 rows, numbered from 0"),
            ("--row 40", "--row: '40' is no row; write FILE:NUMBER, with the number of the row from 0"),
            ("--row train.parquet:-1",
             "--row: 'train.parquet:-1' is no row; write FILE:NUMBER, with the number of the row from 0"),
            ("--step 3 --output out.txt",
             "--output: out.txt is neither a .parquet nor a .csv file; give one of these endings"),
            ("--step 3 --output data/train.parquet",
             "--output: data/train.parquet exists and would be overwritten; give another file"),
            ("--step 3 --output job.yaml/out.csv",
             "--output: job.yaml/out.csv cannot be written (Not a directory); name another file"),
            ("--step 3 --output none/out.csv",
             "--output: none/out.csv cannot be written (No such file or directory); name another file"),
            ("--step 3 train.batch_size=4",
             "override train.batch_size=4: train.batch_size is fixed, as the run was trained with it; only data.train, "
             "data.mixture may be changed here"),
        )
    ),
    Order(f"rows {_RUN} --step 3 --losses",
          lambda desk: desk.edit(f"{_RUN}/plan.json", lambda plan: plan.update(fingerprint="0" * 64)),
          f"DESK/{_RUN}: the training data are not those of the run (fingerprint ..., the run's is 000000000000); put "
          "back the files it was trained on"),
    Order(f"rows {_RUN} --step 3", lambda desk: Path(f"{_RUN}/plan.json").unlink(), f"DESK/{_RUN}/plan.json: ..."),
    Order(f"rows {_RUN} --step 3", _evil("trust_remote_code: false", "trust_remote_code: true"),
          f"DESK/{_RUN}/job.yaml: asks for model.trust_remote_code: true, which runs Python code from the model's "
          f"directory, {_PERMITS} model.trust_remote_code=true to the command to allow it, or "
          "model.trust_remote_code=false to run without it"),
]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.words)
def test_a_wrong_command_is_one_sentence(order: Order, desk: Desk) -> None:
    desk.refuses_order(order)


def test_a_report_skips_a_metrics_line_that_was_cut_off(desk: Desk) -> None:
    desk.finished()
    with Path(f"{_RUN}/metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"kind": "step", "step": 5})[:12])
    assert desk.launcher("report", _RUN).code == 0
    assert "<html" in Path(f"{_RUN}/report.html").read_text()
