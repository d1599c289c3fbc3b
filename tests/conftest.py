"""Settings and fixtures of all tests. The environment is pinned before ray, torch or transformers are imported."""

import os

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_ENABLE_STATE_TRACKING="0",
    DS_ACCELERATOR="cpu",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)

from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data sets and tools beside the repository."""
    folder = _ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs ../shared/data (real data sets), which is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def user_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user's own modules, on PYTHONPATH in every process of the cluster."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture(scope="session")
def ray_cluster(user_modules: Path) -> Iterator[None]:
    """One local Ray for the whole test session, whose workers are forks as those of a command are."""
    from launcher.processes import local_ray

    address = local_ray.begin(8).address()
    import ray

    ray.init(
        address=address, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": f"{_ROOT}:{_ROOT / 'tests'}:{user_modules}"}},
    )  # fmt: skip
    yield
    ray.shutdown()
    local_ray.end()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained-looking BERT without a head: random weights, words w0..w199, dropout 0.1."""
    from tiny import make_tiny_bert

    return make_tiny_bert(tmp_path_factory.mktemp("model") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> dict[str, Path]:
    """A pretrained-looking model for each task, by the task's name."""
    from tiny import make_tiny_gpt, make_tiny_vit

    folder = tmp_path_factory.mktemp("models")
    return {
        "text-classification": tiny_bert,
        "token-classification": tiny_bert,
        "causal-lm": make_tiny_gpt(folder / "tiny-gpt"),
        "image-classification": make_tiny_vit(folder / "tiny-vit"),
    }
