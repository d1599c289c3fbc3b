"""`~`, environment variables and merge keys in a job file."""

from pathlib import Path

import pytest

from launcher.driver.prepare import with_absolute_paths
from launcher.errors import SpecError
from launcher.spec.loader import load_job
from launcher.spec.tune import TuneSpec

_JOB = """\
name: first
task: {type: text-classification}
model: {name: ~/mm}
data: {train: [~/a.csv, 'hub:~/b#train'], validation: ~/v, cache: {path: ~/c}}
output: {storage: ~/runs}
logging: {mlflow: ~/mlruns}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mm").mkdir()
    return tmp_path


def _write_job(folder: Path, text: str) -> Path:
    (folder / "first.yaml").write_text(text)
    return folder / "first.yaml"


def test_tilde_is_the_home_directory_in_every_path(home: Path) -> None:
    job = with_absolute_paths(load_job(_write_job(home, _JOB)))
    assert job.model.name == f"{home}/mm"
    assert job.data.train == (f"{home}/a.csv", "hub:~/b#train")  # expanded when it is loaded
    assert job.data.validation == (f"{home}/v",)
    assert job.data.cache is not None and job.data.cache.path == f"{home}/c"
    assert (job.output.storage, job.logging.mlflow) == (f"{home}/runs", f"{home}/mlruns")


def test_sweep_over_models_expands_the_tilde_too(home: Path) -> None:
    from launcher.tune.run import _with_absolute_models  # imports ray.tune

    spec = TuneSpec.model_validate({"space": {"model.name": {"choice": ["~/mm", "bert-base-uncased"]}}})
    assert _with_absolute_models(spec).space["model.name"].choice == (f"{home}/mm", "bert-base-uncased")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("validation: ~/v", "validation: $DATA/v", "first.yaml:4: data.validation contains $DATA, and job files do"),
        ("storage: ~/runs", "storage: '${OUT}/runs'", "first.yaml:5: output.storage contains ${OUT}, and job files do"),
        ("train: [~/a.csv, 'hub:~/b#train']", "mixture: {a: {train: $DATA/a}}", "data.mixture.a.train contains $DATA,"),
        ("validation: ~/v", "validation: ${DATA}/v", "first.yaml:4: job files do not expand environment variables"),
    ],
)
def test_error_names_an_environment_variable(
    home: Path, old: str, new: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_job(home, _JOB.replace(old, new))
    monkeypatch.chdir(home)
    with pytest.raises(SpecError) as caught:
        load_job(Path("first.yaml"))
    assert len(caught.value.problems) == 1
    assert message in caught.value.problems[0]


def test_error_names_a_merge_key(home: Path) -> None:
    text = _JOB.replace("model: {name: ~/mm}", "model: &m {name: ~/mm}\ntrain:\n  <<: *m")
    with pytest.raises(SpecError, match="train has a merge key <<, which job files do not support; write its keys out"):
        load_job(_write_job(home, text))
