"""`launcher submit` and `launcher jobs` before they reach a cluster: errors are one sentence, within seconds."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.cli.remote_command import parse_command
from launcher.errors import UserError
from launcher.spec.loader import dump_job
from launcher.submit.ray_jobs import Submission
from tests.support.jobs import make_job

_DEAD = "http://127.0.0.1:9"


def _submit(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words], capture_output=True, text=True, cwd=folder, env=env, timeout=120
    )


@pytest.fixture
def job(tmp_path: Path) -> Path:
    spec = make_job(Path("/models/bert"), {"train": ["s3://bucket/train"]}, Path("/mnt/runs"))
    (tmp_path / "job.yaml").write_text(dump_job(spec))
    return tmp_path / "job.yaml"


def test_a_dead_address_is_reported_within_seconds(job: Path) -> None:
    began = time.monotonic()
    done = _submit(job.parent, "submit", "job.yaml", "--address", _DEAD)
    assert done.returncode == 2
    assert done.stderr == (
        f"{_DEAD}: no Ray dashboard answers (ConnectionError); give --address http://HEAD:8265, or forward its port\n"
    )
    assert time.monotonic() - began < 30
    assert _submit(job.parent, "jobs", "list", "--address", _DEAD).returncode == 2


def test_a_large_package_prints_a_warning(job: Path) -> None:
    with open(job.parent / "weights.bin", "wb") as stream:
        stream.truncate(101 * 2**20)
    done = _submit(job.parent, "submit", "job.yaml", "cluster.code=[weights.bin]", "--address", _DEAD)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "warning: 101 MiB would be sent with the job, and Ray accepts 100 MiB zipped; the largest are weights.bin "
        "(101 MiB): keep data on shared storage\n"
    )


def test_a_file_with_the_name_of_the_job_file_prints_a_warning(job: Path) -> None:
    (job.parent / "launcher-job.yaml").touch()
    done = _submit(job.parent, "submit", "job.yaml", "--working-dir", ".", "--address", _DEAD)
    assert done.stderr.startswith(
        "warning: launcher-job.yaml is not sent: on the cluster that name is this job with its overrides; rename the "
        "file if the job reads it\n"
    )


def test_all_paths_that_the_cluster_cannot_find_are_reported(job: Path) -> None:
    done = _submit(job.parent, "submit", "job.yaml", "output.storage=runs", "data.train=[a.parquet]")
    assert done.returncode == 2
    assert [line.split(" is a ")[0] for line in done.stderr.splitlines()] == [
        "output.storage: runs",
        "data.train: a.parquet",
    ]


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("", "none of train, tune, evaluate, predict"),
        ("train2", "none of train, tune, evaluate, predict"),
        ("train learning_rate=1", "takes no learning_rate=1; write 'train --fork s3://runs/RUN', with changes as KEY"),
        ("train first", "takes --fork and --chaos, not first"),
        ("train --fork runs/first", "--fork: runs/first is a relative path, which the cluster cannot find; give a URI"),
        ("train --chaos kil=1@step3", "kil"),
        ("tune --fork /runs/first", "takes no options"),
        ("evaluate test", "not test; write 'evaluate --split test', or 'evaluate --data s3://in --name NAME'"),
        ("evaluate --split train", "--split is train, which is not one of validation, test"),
        ("evaluate --data", "--data has no value"),
        ("evaluate --data s3://in --split test", "--data and --split: give only one of them"),
        ("evaluate --name new", "--name: names the scores on --data"),
        ("evaluate --data s3://in --name test", "--name: test is a split of the run"),
        ("evaluate --data s3://in --data s3://in", "--data is given twice"),
        ("evaluate --data s3://in train.epochs=2", "override train.epochs=2: train.epochs is fixed, as the run was"),
        ("evaluate --data 's3://in", "close its quotes"),
        ("predict s3://in", "write 'predict s3://in --output s3://out'"),
    ],
)
def test_a_wrong_remote_command_is_refused(command: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_command(command)
    assert sentence in refused.value.message


def test_other_data_is_evaluated_on_the_cluster() -> None:
    words = parse_command("evaluate --data 's3://in/new data.csv' --name=new data.format=csv")
    job = make_job(Path("m"), {"train": ["s3://t"]}, Path("/mnt/runs"))
    assert Submission(job, words).entrypoint == (
        "exec python -m launcher evaluate /mnt/runs/test --data 's3://in/new data.csv' --name=new data.format=csv"
    )


def test_permissions_of_the_submitted_job_become_overrides() -> None:
    job = make_job(
        Path("m"), {"train": ["s3://t"]}, Path("/r"), model={"trust_remote_code": True}, cluster={"address": "auto"}
    )
    words = parse_command("predict in --output out model.trust_remote_code=false")
    assert Submission(job, words).entrypoint == (
        "exec python -m launcher predict /r/test in --output out model.trust_remote_code=false cluster.address=auto"
    )


def test_a_submitted_run_may_fork_another() -> None:
    job = make_job(Path("m"), {"train": ["s3://t"]}, Path("/mnt/runs"))
    assert Submission(job, parse_command("train --fork /mnt/runs/first")).entrypoint == (
        "exec python -m launcher train launcher-job.yaml --fork /mnt/runs/first"
    )


def test_other_data_must_be_visible_to_the_cluster(job: Path) -> None:
    done = _submit(job.parent, "submit", "job.yaml", "--command", "evaluate --data new.csv", "--address", _DEAD)
    assert done.returncode == 2
    assert done.stderr.startswith("--data: new.csv is a relative path that is not sent with the job; give a URI")
    (job.parent / "new.csv").write_text("text,label\n")
    sent = ("submit", "job.yaml", "cluster.code=[new.csv]", "--command", "evaluate --data new.csv", "--address", _DEAD)
    assert "no Ray dashboard answers" in _submit(job.parent, *sent).stderr


def test_the_entrypoint_quotes_paths_and_replaces_the_shell() -> None:
    job = make_job(Path("m"), {"train": ["s3://t"]}, Path("/mnt/my runs"), cluster={"prepare": "python prepare.py"})
    assert Submission(job, ("train",)).entrypoint == (
        "python prepare.py && exec python -m launcher train launcher-job.yaml"
    )
    predict = Submission(job, ("predict", "s3://in/*.parquet", "--output", "/mnt/a b"))
    assert predict.entrypoint == (
        "exec python -m launcher predict '/mnt/my runs/test' 's3://in/*.parquet' --output '/mnt/a b'"
    )
