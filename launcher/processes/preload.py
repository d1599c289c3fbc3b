"""Import what workers will need, and record what the imports looked at. Runs in the fork server, before it serves."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# What a command and its workers import alike: loaded once, before the server is forked off the command.
SHARED = (
    "numpy", "pyarrow", "pyarrow.parquet", "pyarrow.dataset", "pyarrow.fs", "pyarrow.compute", "fsspec", "pydantic",
    "filelock", "yaml", "jsonschema", "psutil", "requests", "click", "rich.progress", "ruamel.yaml",
    "google.protobuf.json_format", "google.protobuf.any_pb2", "google.protobuf.struct_pb2", "grpc", "grpc.aio",
    "torch", "torch.distributed", "torch.utils.data", "transformers", "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers", "transformers.models.bert.modeling_bert", "tokenizers",
    "safetensors.torch", "launcher.tasks.base", "launcher.models.pretrained", "launcher.data.stream",
)  # fmt: skip
# What workers alone import, but for ray: loaded by the server, while the command goes on. What is missing here costs a
# worker some time, no more.
SERVER = (
    "pyarrow.acero", "pandas", "fsspec.implementations.local", "msgpack", "logging.config", "pdb", "html", "colorful",
    "pydantic.dataclasses", "pydantic.deprecated.class_validators", "google.protobuf.wrappers_pb2", "aiohttp",
    "packaging.version", "opentelemetry.trace", "tqdm.auto", "jinja2", "PIL.Image", "deepspeed", "deepspeed.ops.adam",
    "deepspeed.runtime.engine", "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer",
    "launcher.train.checkpoint.reader", "launcher.train.engine", "launcher.train.checkpoint.writer",
    "launcher.train.validate", "torch.utils.cpp_extension", "torch.nn.parallel", "tensorboardX",
    "torch.utils.tensorboard", "torchmetrics.classification", "transformers.generation",
    "transformers.models.auto.image_processing_auto", "transformers.models.llama.modeling_llama",
    "transformers.models.vit.modeling_vit", )  # fmt: skip

# Read by C libraries when they are loaded, where Python does not see it.
_C_PREFIXES = (
    "LD_",
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "OPENBLAS_",
    "MALLOC_",
    "ARROW_",
    "PYTHON",
    "CUDA_HOME",
    "GLIBC_",
)
# Looked at by imports, without bearing on what they make: paths of Python's own, which a fork sets anew, terminals,
# and what a process asks for each time that it needs it.
_WITHOUT_EFFECT = frozenset(
    ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONBREAKPOINT", "CUDA_VISIBLE_DEVICES", "PATH", "PWD", "OLDPWD", "COLUMNS",
     "LINES", "TERM", "SHLVL", "_", "DEBUG", "USER", "LOGNAME")
)  # fmt: skip


class _RecordingEnviron(type(os.environ)):  # type: ignore[misc]  # os._Environ has no public name
    """`os.environ` that notes which variables are asked for by name."""

    names: set[str] = set()  # noqa: RUF012 -- one environment per process

    def __getitem__(self, key: str) -> str:
        self.names.add(key)
        return super().__getitem__(key)  # type: ignore[no-any-return]

    def items(self):  # type: ignore[no-untyped-def]
        return {self.decodekey(key): self.decodevalue(value) for key, value in self._data.items()}.items()


@dataclass(frozen=True)
class Loaded:
    """What the imports of this process depended on.

    Args:
        names: Environment variables that they asked for.
        environment: All variables as they were before.
        added: Variables that imports have set, which a new process would set likewise.
    """

    names: frozenset[str]
    environment: dict[str, str]
    added: dict[str, str]


def load(modules: tuple[str, ...], before: "Loaded | None" = None) -> Loaded:
    """Import modules that are installed, in order.

    Args:
        modules: Their names.
        before: What earlier imports of this process depended on.

    Returns:
        What all of them depended on.
    """
    plain, environment = type(os.environ), dict(os.environ) if before is None else before.environment
    # torch then asks NVML whether there is a GPU, where it would initialise CUDA, which no fork could use.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.__class__ = _RecordingEnviron
    try:
        for name in modules:
            if name.split(".")[0] == "deepspeed":
                import_deepspeed()
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # an optional package, or one that lays its modules out otherwise
    finally:
        os.environ.__class__ = plain
    added = {name: value for name, value in os.environ.items() if environment.get(name) != value}
    return Loaded(frozenset(_RecordingEnviron.names), environment, added)


def import_deepspeed() -> Any:
    """Import DeepSpeed for the device that this process sees, without what its autotuner alone would use.

    Returns:
        The module `deepspeed`.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it tries, and prints, every accelerator it knows
    is_loaded = "deepspeed" in sys.modules
    with _hidden("mlflow"):  # deepspeed 0.19.8, autotuning/autotuner.py: 1.2 s; it does without
        deepspeed = importlib.import_module("deepspeed")
    if is_loaded and not has_gpu and deepspeed.accelerator.get_accelerator().device_name() != "cpu":
        # A fork that Ray gives no GPU, of a server that saw one.
        cpu = importlib.import_module("deepspeed.accelerator.cpu_accelerator")
        deepspeed.accelerator.set_accelerator(cpu.CPU_Accelerator())
    return deepspeed


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Make a module look uninstalled inside the block, unless it is loaded already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # documented: such an import raises ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules[name]


def difference(loaded: Loaded, wanted: Mapping[str, str]) -> str | None:
    """Return a variable that the imports depend on and that has another value in `wanted`, or None.

    The value that an import has set itself is the same to it: the command hands it on to its workers.
    """
    here = loaded.environment
    from_c = {name for name in (*here, *wanted) if name.startswith(_C_PREFIXES)}
    # What differs in RAY_* has a zygote of its own (fork_server.py).
    decisive = sorted(n for n in (loaded.names | from_c) - _WITHOUT_EFFECT if not n.startswith("RAY_"))
    return next((n for n in decisive if wanted.get(n) not in (here.get(n), loaded.added.get(n, here.get(n)))), None)
