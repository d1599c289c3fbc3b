"""What travels with a submitted job, and what is refused because it would be looked for in vain."""

import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import RunError, SpecError
from launcher.spec.job import JobSpec
from launcher.submit.package import JOB_FILE, Package, make_package
from tests.support.jobs import make_job


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a directory to submit from: a git checkout with code, and data that git ignores."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        ".gitignore": "data/\n*.log\n", "my_tasks.py": "A = 1\n", "prepare/run.py": "print(1)\n",
        "prepare/__pycache__/run.pyc": "x", "data/train.parquet": "PAR1", "data/big/part-0.parquet": "PAR1",
        "notes.log": "x", ".venv/lib/thing.py": "x",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def _job(train: str = "s3://bucket/train", storage: str = "/mnt/runs", **cluster: object) -> JobSpec:
    return make_job(Path("/models/bert"), {"train": [train]}, Path(storage), cluster=cluster)


def test_code_alone_travels_by_default(folder: Path) -> None:
    package = make_package(_job(code=["my_tasks.py", "prepare"]), None)
    assert sorted(package.files) == ["my_tasks.py", "prepare/run.py"]
    package.write(folder / "package.zip")
    with zipfile.ZipFile(folder / "package.zip") as archive:
        assert sorted(archive.namelist()) == [JOB_FILE, "my_tasks.py", "prepare/run.py"]
        assert "address: auto" in archive.read(JOB_FILE).decode()
        assert archive.read("prepare/run.py") == b"print(1)\n"


def test_the_job_file_wins_over_a_file_of_its_name(folder: Path) -> None:
    (folder / JOB_FILE).write_text("name: another\n")
    make_package(_job(), folder).write(folder / "package.zip")
    with zipfile.ZipFile(folder / "package.zip") as archive:
        assert archive.namelist().count(JOB_FILE) == 1
        assert archive.read(JOB_FILE).decode().startswith("name: test\n")


def test_the_same_content_is_the_same_package(folder: Path) -> None:
    package = make_package(_job(code=["prepare"]), None)
    package.write(folder / "a.zip")
    (folder / "prepare/run.py").touch()
    package.write(folder / "b.zip")
    assert (folder / "a.zip").read_bytes() == (folder / "b.zip").read_bytes()


def test_a_working_directory_travels_without_what_git_ignores(folder: Path) -> None:
    package = make_package(_job(), folder)
    assert sorted(package.files) == [".gitignore", "my_tasks.py", "prepare/run.py"]


def test_ignored_data_travels_when_it_is_named(folder: Path) -> None:
    package = make_package(_job("data/train.parquet", code=["data/train.parquet"]), folder)
    assert "data/train.parquet" in package.files
    assert "data/big/part-0.parquet" not in package.files


def test_rayignore_counts(folder: Path) -> None:
    (folder / ".rayignore").write_text("prepare\n")
    assert sorted(make_package(_job(), folder).files) == [".gitignore", ".rayignore", "my_tasks.py"]


def test_outside_of_git_all_files_travel(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "b.py").write_text("")
    assert sorted(make_package(_job(), tmp_path).files) == ["a.py"]


_SHARED = "give a URI or an absolute path on storage that all nodes share"


def test_a_relative_storage_is_refused(folder: Path) -> None:
    with pytest.raises(SpecError) as refused:
        make_package(_job(storage="runs"), None)
    assert refused.value.problems == (
        f"output.storage: runs is a relative path that is not packed with the job; {_SHARED}",
    )


def test_data_that_git_ignores_is_refused(folder: Path) -> None:
    with pytest.raises(SpecError) as refused:
        make_package(_job("data/train.parquet"), folder)
    assert refused.value.problems == (
        "data.train: data/train.parquet is ignored by git, so it is not packed with the job; "
        f"{_SHARED}, or name it in cluster.code if it is small",
    )


@pytest.mark.parametrize("train", ["data/big/*.parquet", "data/b*/part-?.parquet", "data/**/part-0.parquet"])
def test_a_glob_is_looked_for_in_the_package(folder: Path, train: str) -> None:
    with pytest.raises(SpecError, match="is ignored by git"):
        make_package(_job(train), folder)
    assert make_package(_job(train, code=["data/big"]), folder).files


def test_a_model_directory_must_travel_but_a_hub_name_need_not(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    job = _job()
    local = job.model_copy(update={"model": job.model.model_copy(update={"name": "model"})})
    with pytest.raises(SpecError, match=r"model\.name: model is a relative path that is not packed with the job"):
        make_package(local, None)
    hub = job.model_copy(update={"model": job.model.model_copy(update={"name": "bert-base-uncased"})})
    make_package(hub, None)


@pytest.mark.parametrize(
    "entry, why",
    [("/etc/hosts", "lies outside of"), ("../other", "lies outside of"), ("prepare/../../x", "lies outside of"),
     ("missing.py", "give an existing file or directory")],
)  # fmt: skip
def test_code_that_cannot_travel_is_refused(folder: Path, entry: str, why: str) -> None:
    with pytest.raises(SpecError, match=f"cluster.code: {entry} .*{why}"):
        make_package(_job(code=[entry]), None)


def test_a_working_directory_must_be_one(folder: Path) -> None:
    with pytest.raises(RunError, match=r"--working-dir: .*my_tasks.py is not a directory"):
        make_package(_job(), folder / "my_tasks.py")


def test_the_largest_files_are_known(folder: Path) -> None:
    package = make_package(_job(code=["my_tasks.py", "prepare"]), None)
    assert package.size_bytes == len("A = 1\n") + len("print(1)\n")
    assert package.largest(1) == [("prepare/run.py", 9)]


@given(st.lists(st.sampled_from(["a", "b", "c.py", "d"]), min_size=1, max_size=4))
def test_a_path_is_held_with_all_above_it(parts: list[str]) -> None:
    name = "/".join(parts)
    package = Package(_job(), {name: Path("/dev/null")})
    for end in range(1, len(parts) + 1):
        assert package.holds("/".join(parts[:end]))
        assert package.holds("./" + "/".join(parts[:end]) + "/")
    assert not package.holds(name + "x")
    assert not package.holds(f"x/{name}")


def test_links_that_lead_out_do_not_travel(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nor does a link in a circle keep the walk from ending; one inside of the directory is followed once."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "plans.txt").write_text("x")
    (folder / "prepare" / "out").symlink_to(outside)
    (folder / "prepare" / "plans.txt").symlink_to(outside / "plans.txt")
    (folder / "prepare" / "circle").symlink_to(folder / "prepare")
    (folder / "prepare" / "another").symlink_to(folder)
    (folder / "lib").mkdir()
    (folder / "lib" / "b.py").write_text("B = 1\n")
    (folder / "prepare" / "lib").symlink_to(folder / "lib")
    (folder / "prepare" / "c.py").symlink_to(folder / "lib" / "b.py")
    package = sorted(make_package(_job(code=["prepare"]), None).files)
    assert package == ["prepare/c.py", "prepare/lib/b.py", "prepare/run.py"]
    (folder / "out").symlink_to(outside)
    for entry in ("out", "prepare/plans.txt"):
        with pytest.raises(SpecError, match=f"cluster.code: {entry} is a link out of {folder}; put a copy"):
            make_package(_job(code=[entry]), None)


@pytest.mark.parametrize("in_git", [True, False])
@pytest.mark.parametrize(
    "name", [".env", ".env.local", ".ssh/id_ed25519", "id_rsa", ".aws/credentials", "server.key", "a/.kube/config"]
)
def test_keys_of_people_do_not_travel(name: str, in_git: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if in_git:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for file in (f"code/{name}", "code/run.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    assert list(make_package(_job(), tmp_path).files) == ["code/run.py"]
    assert list(make_package(_job(code=["code"]), None).files) == ["code/run.py"]
    # Who names a file means it.
    assert list(make_package(_job(code=[f"code/{name}"]), None).files) == [f"code/{name}"]


def test_a_directory_with_too_many_files_is_no_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.submit.package._MOST_FILES", 3)
    (folder / "many").mkdir()
    for i in range(4):
        (folder / "many" / str(i)).touch()
    with pytest.raises(RunError, match="many: holds more than 3 files, too many for code"):
        make_package(_job(code=["many"]), None)
