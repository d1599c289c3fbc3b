"""`~`, environment variables and merge keys in a job file (BUGS.md q68 and the YAML rows)."""

from pathlib import Path

import pytest

from launcher.driver.prepare import with_absolute_paths
from launcher.errors import SpecError
from launcher.spec.loader import load_job

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


def _job(folder: Path, text: str) -> Path:
    (folder / "first.yaml").write_text(text)
    return folder / "first.yaml"


def test_a_tilde_is_the_home_directory_in_every_path(home: Path) -> None:
    """q68."""
    job = with_absolute_paths(load_job(_job(home, _JOB)))
    assert job.model.name == f"{home}/mm"
    assert job.data.train == (f"{home}/a.csv", "hub:~/b#train")  # expanded where it is loaded
    assert job.data.validation == (f"{home}/v",)
    assert job.data.cache is not None and job.data.cache.path == f"{home}/c"
    assert (job.output.storage, job.logging.mlflow) == (f"{home}/runs", f"{home}/mlruns")


def test_a_sweep_over_models_expands_them_too(home: Path) -> None:
    """q68."""
    from launcher.spec.tune import TuneSpec
    from launcher.tune.run import _with_absolute_models

    spec = TuneSpec.model_validate({"space": {"model.name": {"choice": ["~/mm", "bert-base-uncased"]}}})
    assert _with_absolute_models(spec).space["model.name"].choice == (f"{home}/mm", "bert-base-uncased")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("validation: ~/v", "validation: $DATA/v", "first.yaml:4: data.validation contains $DATA, and job files do"),
        ("storage: ~/runs", "storage: '${OUT}/runs'", "first.yaml:5: output.storage contains ${OUT}, and job files do"),
        ("validation: ~/v", "validation: ${DATA}/v", "first.yaml:4: job files do not expand environment variables"),
    ],
)
def test_an_environment_variable_is_named(
    home: Path, old: str, new: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """YAML: `train: ${DATA}/x`."""
    _job(home, _JOB.replace(old, new))
    monkeypatch.chdir(home)
    with pytest.raises(SpecError) as caught:
        load_job(Path("first.yaml"))
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]


def test_a_merge_key_is_named(home: Path) -> None:
    """YAML: `<<`."""
    text = _JOB.replace("model: {name: ~/mm}", "model: &m {name: ~/mm}\ntrain:\n  <<: *m")
    with pytest.raises(SpecError, match="train has a merge key <<, which job files do not support; write its keys out"):
        load_job(_job(home, text))
