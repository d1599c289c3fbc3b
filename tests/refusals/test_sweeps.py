"""Impossible clusters and sweeps: `check`, `train` and `tune` refuse each in one sentence."""

import socket
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.desk import Case, Desk, check_and


def _space(space: str, more: str = "") -> list[str]:
    return [f"tune={{space: {{{space}}}{more}}}"]


_RATE = "train.learning_rate: {choice: [1e-3, 2e-3]}"

SWEEPS = [
    Case("an unknown key", lambda desk: _space("train.learning_rat: {uniform: [1e-5, 1e-4]}"),
         "tune.space: train.learning_rat is not a key of train; did you mean learning_rate?"),
    Case("an empty key", lambda desk: _space('"train..epochs": {choice: [1, 2]}'),
         "tune.space: train. is not a key of train; the keys allowed there: ..."),
    Case("a key below a number", lambda desk: _space("train.epochs.first: {choice: [1, 2]}"),
         "tune.space: train.epochs.first: epochs has no keys; name a key of the job file"),
    Case("a value that the key refuses", lambda desk: _space("train.epochs: {choice: [0, 1]}"),
         "tune.space: train.epochs is 0, which is below 1; give a whole number of at least 1"),
    Case("a value that the task refuses", lambda desk: _space("task.max_length: {int: [2, 8]}"),
         "tune.space: task.max_length is 2, which is below 4; give a whole number of at least 4"),
    Case("longer texts than the model has positions", lambda desk: _space("task.max_length: {choice: [32, 512]}"),
         "tune.space: task.max_length 512: task.max_length: 512 is more than the model's 64 positions; lower it"),
    Case("a model that is not there", lambda desk: _space("model.name: {choice: [./model, ./nowhere]}"),
         "tune.space: model.name ./nowhere: model.name: there is no directory ./nowhere; give one that exists, or a "
         "hub name"),
    Case("a column that is not there", lambda desk: _space("task.label: {choice: [label, stars]}"),
         "tune.space: task.label stars: DESK/data/train.parquet: has no column 'stars', which the task reads; the file "
         "has text, label (see task:)"),
    Case("a key that all trials share", lambda desk: _space("output.storage: {choice: [a, b]}"),
         "tune.space: output.storage cannot be searched, because all trials share it; remove it from the space"),
    Case("a range from high to low", lambda desk: _space("train.learning_rate: {uniform: [1e-3, 1e-4]}"),
         "override tune=...: tune.space.train.learning_rate.uniform needs the lower bound first, then the upper, not "
         "[0.001, 0.0001]"),
    Case("a logarithm of nothing", lambda desk: _space("train.learning_rate: {loguniform: [0, 1e-4]}"),
         "override tune=...: tune.space.train.learning_rate.loguniform needs bounds above 0, not 0"),
    Case("two forms of one key", lambda desk: _space("train.learning_rate: {choice: [1e-3], uniform: [0, 1]}"),
         "override tune=...: tune.space.train.learning_rate: needs exactly one of uniform, loguniform, int, logint and "
         "choice"),
    Case("a value given twice", lambda desk: _space("train.learning_rate: {choice: [1e-3, 1e-3]}"),
         "override tune=...: tune.space.train.learning_rate.choice needs at least one value, and no value twice"),
    Case("nothing to search", lambda desk: ["tune={space: {}}"],
         "override tune={space: {}}: tune.space is {}, which has fewer than 1 item; give ..."),
    Case("a grid over a continuous range",
         lambda desk: _space("train.learning_rate: {uniform: [1e-4, 1e-3]}", ", search: grid"),
         "tune.space: train.learning_rate is a continuous range, which a grid cannot list; use choice"),
    Case("a grid that fills the memory",
         lambda desk: _space("seed: {int: [1, 2000000]}, train.batch_size: {int: [1, 2000000]}", ", search: grid"),
         "tune.space: the grid has 4000000000000 combinations, more than 100000; use choice, or search: random"),
    Case("a key that cannot change during a trial",
         lambda desk: _space("train.batch_size: {choice: [4, 8]}", ", scheduler: pbt"),
         "tune.space: train.batch_size cannot change during a trial, which scheduler: pbt requires (only ... can); use "
         "another scheduler"),
    Case("a metric that the task does not have", lambda desk: _space(_RATE, ", metric: acc"),
         "tune.metric is acc, which is not one of accuracy, ...; ..."),
    Case("a target that is no number", lambda desk: _space(_RATE, ", target: .nan"),
         "override tune=...: tune.target is .nan, which is not a finite number; give a number, or null"),
    Case("no validation data", lambda desk: ["data.validation=null", *_space(_RATE)],
         "data.validation: missing; a sweep ranks its trials by the validation data"),
    Case("test data that are not there", lambda desk: ["data.test=nowhere.parquet", *_space(_RATE)],
         "data.test: nowhere.parquet does not exist; give a file, a directory or a glob that does"),
    Case("a row that cannot be used", lambda desk: desk.texts(["a", "b", None] * 6) or _space(_RATE),
         "DESK/data/train.parquet: row 2: label is null; fix the row, or set data.on_bad_row: skip to leave such rows "
         "out"),
]  # fmt: skip


@check_and("tune", SWEEPS)
def test_an_impossible_sweep_is_refused(command: str, case: Case, desk: Desk) -> None:
    desk.refuses_case(command, case)


def test_check_of_a_sweep_finds_a_label_that_would_stop_it_at_its_end(desk: Desk) -> None:
    desk.texts(["a", "new"], "data/test.parquet")
    sentence = "DESK/data/test.parquet: row 1: label is 'new', ..."
    desk.refuses("check", sentence, "job.yaml", "data.test=data/test.parquet", *_space(_RATE))


def test_tune_without_a_search_space_is_refused(desk: Desk) -> None:
    sentence = "tune: missing; set what to search, as in `tune: {space: {train.learning_rate: ...}}`"
    desk.refuses("tune", sentence, "job.yaml")


def test_tune_in_the_directory_of_a_run_is_refused(desk: Desk) -> None:
    desk.begun()
    sentence = "DESK/runs/first: contains a run that is not a sweep; change `name` to start a sweep"
    desk.refuses("tune", sentence, "job.yaml", *_space(_RATE))


_GPUS = (
    "cluster.gpus_per_worker: 2 workers with 1 GPUs each need 2 GPUs, this machine has 0; set cluster.address to a "
    "cluster that has them, or ask for fewer"
)


@pytest.mark.parametrize("command", ["train", "tune"])
def test_missing_gpus_are_refused(command: str, desk: Desk) -> None:
    desk.monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    desk.refuses(command, _GPUS, "job.yaml", "cluster.gpus_per_worker=1", *_space(_RATE))


_DISK = ["parallel.offload_optimizer=true", "parallel.offload_path=/nowhere"]


@pytest.mark.parametrize("command", ["train", "tune"])
def test_a_missing_offload_directory_is_refused(command: str, desk: Desk) -> None:
    sentence = f"parallel.offload_path: /nowhere is no directory on {socket.gethostname()}; make it on every node, "
    sentence += "on a disk of the node's own"
    desk.refuses(command, sentence, "job.yaml", *_DISK, *_space(_RATE))
    assert f"note: {sentence}\n" in desk.launcher("check", "job.yaml", *_DISK).out


def test_check_only_notes_missing_gpus_as_the_job_may_run_on_a_cluster(desk: Desk) -> None:
    desk.monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    ended = desk.launcher("check", "job.yaml", "cluster.gpus_per_worker=1")
    assert ended.code == 0 and f"note: {_GPUS}\n" in ended.out
    assert "note: cluster.gpus_per_worker" not in desk.launcher("check", "job.yaml").out


def test_check_notes_workers_without_samples(desk: Desk) -> None:
    sentence = (
        "note: cluster.workers: of 20 workers only 8 ever get a sample, as a batch has no more parts; raise "
        "train.batch_size, which changes the curve, or take fewer workers\n"
    )
    assert sentence in desk.launcher("check", "job.yaml", "cluster.workers=20").out


def test_a_missing_cluster_is_refused_and_no_new_run_is_kept(desk: Desk) -> None:

    def refuse(*_: object, **__: object) -> NoReturn:
        raise ConnectionError("no route\nto the host")

    desk.monkeypatch.setattr("ray.init", refuse)
    desk.monkeypatch.setattr("launcher.processes.ray_address.check_reachable", bool)  # what answers first
    before = desk.files()
    ended = desk.launcher("train", "job.yaml", "cluster.address=10.0.0.1:6379")
    remedy = "start one, or leave the address out for a local one"
    sentence = f"cluster.address: no Ray cluster at 10.0.0.1:6379 (no route); {remedy}"
    assert (ended.code, ended.err.strip()) == (2, sentence)
    assert {name for name in desk.files() if name not in before} <= {"runs"}
    desk.begun()
    assert desk.launcher("train", "job.yaml", "cluster.address=10.0.0.1:6379").code == 2
    assert Path("runs/first/job.yaml").exists()
