"""`launcher replay --prove` and `launcher verify`: options, exit codes and what is printed."""

from pathlib import Path

import pytest

from launcher.cli.options import REPLAY_KEYS, load_run_job
from launcher.cli.prove import _find_stages
from launcher.rundir.directory import RunDir
from launcher.spec.exactness import provable_workers
from tests.support.certified_run import certified_run
from tests.support.command_line import CommandLine
from tests.support.jobs import write_splits


@pytest.fixture
def run(tiny_bert: Path, tmp_path: Path) -> RunDir:
    return certified_run(tiny_bert, tmp_path / "runs", write_splits(tmp_path / "data", 40, test=20))


def test_verify_agrees_and_finds_a_changed_file(run: RunDir, launcher: CommandLine) -> None:
    ended = launcher("verify", run.uri)
    assert ended.code == 0 and "differs" not in ended.out
    assert "metrics.jsonl, losses of 4 steps: ok\n" in ended.out
    assert "training data as they are now: ok\n" in ended.out
    assert ended.out.endswith("Proven: the same bits on 1 and 2 workers, ZeRO 0 and 1 (certificate.json)\n")
    run.write_bytes("metrics.jsonl", run.read_bytes("metrics.jsonl").replace(b'"loss":0.5,', b'"loss":0.4,'))
    ended = launcher("verify", run.uri)
    assert ended.code == 1 and "metrics.jsonl, losses of 4 steps: differs, " in ended.out
    assert ended.out.endswith("the certificate does not hold for this directory\n")


def test_verify_notes_data_that_cannot_be_read_and_finds_other_data(
    run: RunDir, tmp_path: Path, launcher: CommandLine
) -> None:
    write_splits(tmp_path / "data", 41)
    ended = launcher("verify", run.uri)
    assert ended.code == 1 and "training data as they are now: differs, " in ended.out
    (tmp_path / "data/train.parquet").unlink()
    ended = launcher("verify", run.uri)
    assert ended.code == 0
    assert "note: the training data were not compared, as they cannot be read here (data.train: " in ended.out


def test_verify_needs_a_certificate(run: RunDir, launcher: CommandLine) -> None:
    run.write_bytes("certificate.json", b"{}")
    ended = launcher("verify", run.uri)
    assert ended.code == 2 and "certificate.json: not a valid Certificate (steps: Field required)" in ended.err
    run.delete("certificate.json")
    ended = launcher("verify", run.uri)
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert f"{run.uri}: has no certificate.json; write one with `launcher replay {run.uri} --prove`" in ended.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--prove", "--workers", "0"), "--workers: '0' is not a number of workers; give numbers from 1 on"),
        (("--prove", "--workers", "1,"), "--workers: '' is not a number of workers; give numbers from 1 on"),
        (("--prove", "--workers", "two"), "--workers: 'two' is not a number of workers; give numbers from 1 on"),
        (("--prove", "--zero", "7"), "--zero: '7' is not a ZeRO stage; give some of 0, 1, 2 and 3, such as 0,1"),
        (("--workers", "2"), "--workers: is for the shapes of --prove; add --prove, or write cluster.workers=N"),
        (("--prove", "--name", "x"), "--name: x is for one run, and --prove names one for each shape"),
        (("--prove", "cluster.workers=2"), "override cluster.workers=2: --prove decides this for each shape"),
        (("--prove", "parallel.zero=1"), "override parallel.zero=1: --prove decides this for each shape; give --zero"),
        (("--prove", "train.epochs=2"), "override train.epochs=2: train.epochs is fixed"),
        (("--prove", "--zero", "0", "parallel.offload_optimizer=true"), "offload_optimizer needs zero: 1, 2 or 3"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_make_no_sense_are_refused(
    run: RunDir, launcher: CommandLine, arguments: tuple[str, ...], sentence: str
) -> None:
    ended = launcher("replay", run.uri, *arguments)
    assert ended.code == 2 and ended.err.count("\n") == 1 and sentence in ended.err


def test_an_unfinished_run_is_refused(run: RunDir, launcher: CommandLine) -> None:
    run.delete("result.json")
    ended = launcher("replay", run.uri, "--prove")
    assert ended.code == 2 and "is not finished; finish it with `launcher train` before replaying it" in ended.err


def test_default_shapes_are_those_that_are_exact_and_find_room(run: RunDir) -> None:
    job = load_run_job(run, [], REPLAY_KEYS)
    assert [provable_workers(job, cores) for cores in (1, 2, 5, 64)] == [(1, 2), (1, 2), (1, 2, 4), (1, 2, 4)]
    threads = job.model_copy(update={"train": job.train.model_copy(update={"threads": 4})})
    assert provable_workers(threads, 16) == (1, 2, 4)
    gpus = job.model_copy(update={"cluster": job.cluster.model_copy(update={"gpus_per_worker": 1, "workers": 4})})
    assert provable_workers(gpus, 64) == (1, 2, 4)
    assert _find_stages(run, []) == (0, 1)
    assert _find_stages(run, ["parallel.offload_optimizer=true"]) == (1,)
    assert _find_stages(run, ["parallel.offload_parameters=true"]) == ()
