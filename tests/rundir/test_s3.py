"""A job with data, model and storage on an S3-compatible server: same losses as on disk, errors within seconds."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

import launcher.rundir.directory
from launcher.data.files import list_files
from launcher.driver.prepare import prepare
from launcher.errors import DataError, ModelError, RunError
from launcher.models.cells import CellSource, read_cell
from launcher.models.remote import local_copy, remote_files
from launcher.report.render import write_report
from launcher.rundir import metrics_log
from launcher.rundir.directory import RunDir
from launcher.rundir.records import StepRecord
from launcher.rundir.uri import open_uri
from launcher.rundir.writable import check_storage
from launcher.spec.loader import dump_job
from launcher.train.checkpoint import catalog
from tests.support.jobs import make_job, prepared_job, write_splits
from tests.support.s3 import MISSING, clean_environment, free_port, s3_server, server_command, upload
from tests.support.worker_group import run_group, train_here

pytestmark = pytest.mark.skipif(server_command() is None, reason=MISSING)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server("bucket") as address:
        yield address


@pytest.fixture
def endpoint(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Set the variables of this process to the server, and return its address."""
    for name, value in clean_environment(server).items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def dead(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")


def test_resumed_run_on_s3_matches_uninterrupted_run_on_disk(tiny_bert: Path, tmp_path: Path, server: str) -> None:
    # The URIs carry server and keys as options, as the worker processes do not have the variables.
    sections = {"checkpoint": {"every_minutes": None, "every_steps": 4}}
    splits = write_splits(tmp_path / "data", 97, validation=23, test=19)
    whole = run_group(2, train_here, prepared_job(tiny_bert, splits, tmp_path / "runs", **sections))["lines"]

    upload(server, tmp_path / "data", "bucket/data")
    upload(server, tiny_bert, "bucket/model")
    options = f"?endpoint_override={server}&scheme=http&region=us-east-1"
    place = "s3://tester:secret@bucket"
    data = {name: f"{place}/data/{name}.parquet{options}" for name in splits}
    job = make_job(tiny_bert, data, tmp_path, **sections)
    job = job.model_copy(
        update={
            "model": job.model.model_copy(update={"name": f"{place}/model{options}"}),
            "output": job.output.model_copy(update={"storage": f"{place}/runs{options}"}),
        }
    )
    prepared = prepare(job)
    first = run_group(2, train_here, prepared, 4)["lines"]
    assert catalog.latest_step(prepared.run) == 4
    fewer = prepare(job.model_copy(update={"name": "fewer", "cluster": job.cluster.model_copy(update={"workers": 1})}))
    fewer.run.copy_from(prepared.run, catalog.checkpoint_dir(4))  # before it is pruned
    rest = run_group(2, train_here, prepared)["lines"]
    assert first[:4] + rest == whole  # bit by bit
    alone = run_group(1, train_here, fewer)["lines"]
    assert [step for step, _ in alone] == [step for step, _ in whole[4:]]
    assert [loss for _, loss in alone] == pytest.approx([loss for _, loss in whole[4:]], abs=1e-5)

    assert [x.loss for x in prepared.run.read_metrics() if isinstance(x, StepRecord)] == [loss for _, loss in whole]
    prepared.run.write_bytes("job.yaml", dump_job(prepared.job).encode())
    prepared.run.write_record("plan.json", prepared.plan)
    write_report(prepared.run)
    assert b"tester:secret" not in prepared.run.read_bytes("report.html")


def test_csv_on_s3_is_converted_once(tiny_bert: Path, tmp_path: Path, endpoint: str) -> None:
    write_splits(tmp_path / "data", 60)
    pyarrow.csv.write_csv(pq.read_table(tmp_path / "data/train.parquet"), tmp_path / "train.csv")
    upload(endpoint, tmp_path / "train.csv", "bucket/csv/train.csv")
    job = make_job(tiny_bert, {"train": "s3://bucket/csv"}, tmp_path)
    job = job.model_copy(update={"output": job.output.model_copy(update={"storage": "s3://bucket/csv-runs"})})
    fs, path = open_uri("s3://bucket/csv-runs/.cache")

    def cached() -> list[tuple[str, int]]:
        infos = fs.get_file_info(pafs.FileSelector(path, recursive=True))
        return [(info.path, info.mtime_ns) for info in infos if info.is_file]

    assert prepare(job).plan.train_rows == 60
    before = cached()
    assert [name.rsplit("/", 1)[-1] for name, _ in before] == ["train.parquet"]
    time.sleep(1.1)  # S3 has times in whole seconds
    prepare(job)
    assert cached() == before


def test_metrics_are_split_into_parts(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.rundir.directory, "_PART_BYTES", 500)
    run = RunDir("s3://bucket/parts/run")
    lines = [
        StepRecord(step=step, epoch=1, loss=1.0 / step, learning_rate=1e-3, grad_norm=None, samples=8, skipped_rows=0,
                   samples_per_s=1.0, elapsed_s=1.0)
        for step in range(1, 31)
    ]  # fmt: skip
    for line in lines:
        run.append_metrics([line])
    assert len(run.metrics_parts()) > 3 and run.metrics_parts()[0] == "metrics.jsonl"
    assert list(run.read_metrics()) == lines
    metrics_log.truncate_after(run, 12)
    run.append_metrics(lines[12:14])
    assert list(run.read_metrics()) == lines[:14]


def test_missing_bucket_or_model_is_refused(endpoint: str) -> None:
    with pytest.raises(
        RunError, match=r"output\.storage: s3://none/runs: cannot be used \(there is no such bucket\); cr"
    ):
        check_storage("s3://none/runs")
    check_storage("s3://bucket/not-yet")
    with pytest.raises(DataError, match=r"data\.train: s3://none/x cannot be listed \(there is no such bucket\)"):
        list_files("train", "s3://none/x")
    with pytest.raises(ModelError, match=r"model\.name: s3://none/m: cannot be used \(there is no such bucket\); cre"):
        remote_files("s3://none/m")
    with pytest.raises(ModelError, match=r"model\.name: s3://bucket/m is empty or does not exist; give a directory"):
        remote_files("s3://bucket/m")


def test_wrong_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(None) as address:
        for name, value in clean_environment(address).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RunError, match=r"\(the access key is unknown\); check AWS_ACCESS_KEY_ID and AWS_SECRET_"):
            check_storage("s3://bucket/runs")
        with pytest.raises(DataError, match=r"data\.train: s3://bucket/x cannot be listed \(access is denied\); check"):
            list_files("train", "s3://bucket/x")


def test_model_is_copied_once_and_its_weights_on_demand(
    endpoint: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    upload(endpoint, tiny_bert, "bucket/models/bert")
    names = {path.name for path in tiny_bert.iterdir()}
    part = Path(local_copy("s3://bucket/models/bert"))
    assert {path.name for path in part.iterdir()} == names - {"model.safetensors"}
    whole = Path(local_copy("s3://bucket/models/bert", weights=True))
    assert (whole / "model.safetensors").read_bytes() == (tiny_bert / "model.safetensors").read_bytes()
    local_copy.cache_clear()  # as another process
    assert local_copy("s3://bucket/models/bert") == local_copy("s3://bucket/models/bert", weights=True) == str(whole)
    (tmp_path / "more.txt").write_text("a change")
    upload(endpoint, tmp_path / "more.txt", "bucket/models/bert/more.txt")
    local_copy.cache_clear()
    assert (Path(local_copy("s3://bucket/models/bert")) / "more.txt").exists()


def test_picture_is_read_from_s3(endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    upload(endpoint, tmp_path / "a.png", "bucket/pictures/a.png")
    places = CellSource(remote=(("s3://bucket/pictures", ""),))
    assert read_cell({"path": "s3://bucket/pictures/a.png", "bytes": None}, places) == b"picture"
    with pytest.raises(ValueError, match=r"is 's3://bucket/pictures/b\.png', which cannot be read"):
        read_cell("s3://bucket/pictures/b.png", places)


def test_dead_endpoint_is_refused_within_seconds(dead: None, tiny_bert: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RunError, match=r"s3://bucket/runs: cannot be used \(no answer: .*\); check AWS_ENDPOINT_URL"):
        check_storage("s3://bucket/runs")
    assert time.monotonic() - began < 25


def test_command_reports_a_missing_bucket_in_one_sentence(endpoint: str, tiny_bert: Path, tmp_path: Path) -> None:
    job = make_job(tiny_bert, write_splits(tmp_path / "data", 20), tmp_path)
    (tmp_path / "job.yaml").write_text(dump_job(job))
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "check", "job.yaml", "output.storage=s3://none/runs"],
        capture_output=True, text=True, cwd=tmp_path, env=clean_environment(endpoint), timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2,
        "output.storage: s3://none/runs: cannot be used (there is no such bucket); create it, or give another one\n",
    )
