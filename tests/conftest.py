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

from collections.abc import Generator, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent

# Tests that may be skipped, and why; any other skip fails, as what nobody runs shows nothing (tests/README.md).
_MAY_SKIP = {
    "*": "needs ../shared",
    "tests/cluster/test_dockerfile.py*": "is in Python 3.11 and newer",
    "tests/cluster/test_ray_cluster.py*": "needs shellcheck",
    "tests/cluster/test_slurm.py*": "needs shellcheck",
    "tests/cluster/test_slurm.py::test_a_run_that_is_stopped_goes_on_in_the_next_start": "`make test-slurm` runs it",
    "tests/faults/test_nodes.py*": "needs ",
    "tests/submit/kubernetes/test_kubectl.py*": "needs kubectl",
    "tests/models/test_quantization.py*": "needs bitsandbytes",
    "tests/processes/*": "for Linux alone",
    "tests/processes/test_fork_server.py::test_another_user_is_refused": "needs root",
    "tests/refusals/test_storages.py*": "needs to mount a tmpfs",
    "tests/submit/doctor/test_live.py*": "needs ",
    "tests/submit/test_live.py*": "needs ",
    "tests/tasks/test_contract.py*": "its head is pretrained",
    "tests/train/test_drawn.py*": "too many for the job's smallest group of weights",
    "tests/train/test_promise.py*": "the processor has no fp16",
    "tests/train/test_op_builders.py*": "there is a GPU",
    "tests/train/loggers/test_prometheus.py*": "needs promtool",
    "tests/train/offload/test_nvme.py*": "no libaio-dev here",
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that is skipped for a reason that `_MAY_SKIP` does not name."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        may = (fnmatch(item.nodeid, name) and why in reason for name, why in _MAY_SKIP.items())
        if not any(may):
            report.outcome = "failed"
            report.longrepr = f"skipped, which tests/conftest.py does not allow: {reason}"
    return report


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

    address = local_ray.start_for_command(8).address()
    import ray

    ray.init(
        address=address, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": f"{_ROOT}:{user_modules}"}},
    )  # fmt: skip
    yield
    ray.shutdown()
    local_ray.stop_current()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained-looking BERT without a head: random weights, words w0..w199, dropout 0.1."""
    from tests.support.tiny_models import make_tiny_bert

    return make_tiny_bert(tmp_path_factory.mktemp("model") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> dict[str, Path]:
    """A pretrained-looking model for each task, by the task's name."""
    from tests.support.tiny_models import make_tiny_gpt, make_tiny_masked_bert, make_tiny_t5, make_tiny_vit

    folder = tmp_path_factory.mktemp("models")
    gpt = make_tiny_gpt(folder / "tiny-gpt")
    return {
        "text-classification": tiny_bert,
        "sentence-embedding": tiny_bert,
        "reranking": tiny_bert,
        "token-classification": tiny_bert,
        "question-answering": tiny_bert,
        "causal-lm": gpt,
        "preference": gpt,
        "reward": gpt,
        "image-classification": make_tiny_vit(folder / "tiny-vit"),
        "masked-lm": make_tiny_masked_bert(folder / "tiny-masked-bert", tiny_bert),
        "seq2seq": make_tiny_t5(folder / "tiny-t5"),
    }
