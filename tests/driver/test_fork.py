"""A new run from the weights of another, and changes after which a run cannot be resumed."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from launcher.driver.fork import fork_job
from launcher.driver.preflight import check_resumable
from launcher.driver.prepare import prepare
from launcher.driver.run import run_job
from launcher.errors import RunError
from launcher.rundir.directory import RunDir, read_job
from launcher.rundir.records import StepRecord
from launcher.spec.job import JobSpec
from launcher.spec.loader import dump_job
from tests.support.jobs import make_job, write_splits


def _silent() -> Console:
    return Console(file=StringIO(), width=300)


def _losses(run: RunDir) -> list[float]:
    return [line.loss for line in run.read_metrics() if isinstance(line, StepRecord)]


@pytest.fixture(scope="module")
def job(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("forks")
    model = shutil.copytree(tiny_bert, folder / "model")
    data = write_splits(folder / "data", train=132, validation=22)
    return make_job(model, data, folder / "runs", name="old", checkpoint={"every_steps": 6})


@pytest.fixture(scope="module")
def old(job: JobSpec, ray_cluster: None) -> RunDir:
    return run_job(job, _silent())


def _renamed(job: JobSpec, name: str) -> JobSpec:
    return job.model_copy(update={"name": name})


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_run_is_forked(job: JobSpec, old: RunDir) -> None:
    console = _silent()
    new = fork_job(_renamed(job, "new"), old.uri, console)
    assert f"starting from the weights of {old.uri}, step" in console.file.getvalue()  # type: ignore[attr-defined]
    run = run_job(new, _silent())
    assert Path(new.model.name, "model.safetensors").read_bytes() == old.read_bytes("model/model.safetensors")
    assert _losses(run)[0] != _losses(old)[0]
    # The same command resumes the new run without the old one; so does the job file that it wrote.
    assert fork_job(_renamed(job, "new"), old.uri, _silent()).model.name == new.model.name
    assert read_job(run).model.name == new.model.name
    check_resumable(prepare(new))
    with pytest.raises(RunError, match=r"belongs to another job \(model\.name: .* from the old weights with `--fork"):
        check_resumable(prepare(_renamed(job, "new")))
    other = shutil.copytree(old.uri, f"{old.uri}-copied")
    with pytest.raises(RunError, match="has started, and not from"):
        fork_job(_renamed(job, "new"), str(other), _silent())


@pytest.mark.ray
@pytest.mark.slow
def test_the_newest_checkpoint_of_an_unfinished_run_is_forked(job: JobSpec, old: RunDir) -> None:
    begun = RunDir(old.uri.replace("/old", "/begun"))
    shutil.copytree(old.uri, begun.uri)
    begun.delete("result.json")
    begun.delete("model")
    begun.write_bytes("job.yaml", dump_job(_renamed(read_job(old), "begun")).encode())
    new = fork_job(_renamed(job, "from-begun"), begun.uri, _silent())
    weights = load_file(f"{new.model.name}/model.safetensors")
    last = load_file(old.path("model/model.safetensors"))
    best = json.loads(old.read_bytes("result.json"))["best_step"]
    assert weights.keys() == last.keys()
    assert all(torch.equal(weights[name], last[name]) for name in last) == (best == 12)
    assert not begun.exists("model") and not [name for name in begun.list("") if name.startswith("ray")]
    record = json.loads(Path(new.model.name).parent.joinpath("fork.json").read_text())
    assert record == {"origin": begun.uri, "step": 12}


@pytest.mark.ray
def test_a_fork_needs_a_new_name_and_weights(job: JobSpec, old: RunDir, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is the run itself; change `name`"):
        fork_job(job, old.uri, _silent())
    with pytest.raises(RunError, match="no run there"):
        fork_job(_renamed(job, "x"), str(tmp_path), _silent())
    empty = RunDir(str(tmp_path / "empty"))
    empty.write_bytes("job.yaml", old.read_bytes("job.yaml"))
    with pytest.raises(RunError, match="has neither a model nor a checkpoint yet"):
        fork_job(_renamed(job, "x"), empty.uri, _silent())


@pytest.mark.ray
def test_a_run_is_not_resumed_with_a_changed_tokenizer_or_other_data(job: JobSpec, old: RunDir) -> None:
    check_resumable(prepare(job))
    file = Path(job.model.name) / "tokenizer.json"
    before = file.read_text()
    file.write_text(before.replace('"w7"', '"w7x"'))
    try:
        with pytest.raises(
            RunError, match=r"the model .* changed .*\(tokenizer\.json: sha256 \w+ -> sha256 \w+\); put"
        ):
            check_resumable(prepare(job))
    finally:
        file.write_text(before)
    check_resumable(prepare(job))
    other = write_splits(Path(job.output.storage).parent / "more", train=140)
    changed = job.model_copy(update={"data": job.data.model_copy(update={"train": (other["train"],)})})
    with pytest.raises(RunError, match="belongs to another job"):
        check_resumable(prepare(changed))
