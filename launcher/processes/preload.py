"""Imports of the fork server, and a record of the environment variables they read. Runs in the server at its start.

The result of an import may depend on the environment. The record lets the server refuse a request whose environment
would have led to other results.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Imports of both the command and its workers: done once, before the server is forked off the command.
SHARED = (
    "numpy", "pyarrow", "pyarrow.parquet", "pyarrow.dataset", "pyarrow.fs", "pyarrow.compute", "fsspec", "pydantic",
    "filelock", "yaml", "jsonschema", "psutil", "requests", "click", "rich.progress", "ruamel.yaml",
    "google.protobuf.json_format", "google.protobuf.any_pb2", "google.protobuf.struct_pb2", "grpc", "grpc.aio",
    "torch", "torch.distributed", "torch.utils.data", "transformers", "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers", "transformers.models.bert.modeling_bert", "tokenizers",
    "safetensors.torch", "launcher.tasks.base", "launcher.models.pretrained", "launcher.data.stream",
)  # fmt: skip
# Imports of workers only, without ray: done by the server while the command continues. A module that is missing here
# only costs each worker the time to import it.
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

# Read by C libraries when they are loaded, invisible to Python.
# Their effect lasts as long as the library is loaded: a fork cannot apply another value.
_C_PREFIXES = (
    "LD_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "ARROW_", "PYTHON", "CUDA_HOME", "GLIBC_",
)  # fmt: skip
# Read by imports without an effect on their results: paths that a fork sets itself, properties of the terminal, and
# variables that are read again at each use.
_WITHOUT_EFFECT = frozenset(
    ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONBREAKPOINT", "CUDA_VISIBLE_DEVICES", "PATH", "PWD", "OLDPWD", "COLUMNS",
     "LINES", "TERM", "SHLVL", "_", "DEBUG", "USER", "LOGNAME")
)  # fmt: skip


# Swapped in as the class of the one `os.environ`, which modules hold by reference (`from os import environ`): another
# object in its place would miss their reads.
class _RecordingEnviron(type(os.environ)):  # type: ignore[misc]  # os._Environ has no public name
    """`os.environ` that records which variables are read by name. Reading all of them (`items`) does not count."""

    names: set[str] = set()  # noqa: RUF012 -- one environment per process

    # `get`, `in`, `os.getenv` and `setdefault` all end here. So do `dict(os.environ)` and `copy()`, which therefore
    # count as reads of all variables and make the server refuse more than it must.
    def __getitem__(self, key: str) -> str:
        self.names.add(key)
        return super().__getitem__(key)  # type: ignore[no-any-return]

    def items(self):  # type: ignore[no-untyped-def]
        return {self.decodekey(key): self.decodevalue(value) for key, value in self._data.items()}.items()


@dataclass(frozen=True)
class Loaded:
    """Environment that the imports of this process depended on."""

    names: frozenset[str]
    """Names of variables that they read."""
    environment: dict[str, str]
    """All variables before the imports."""
    added: dict[str, str]
    """Variables set by imports, as they would be in a new process."""


def load(modules: tuple[str, ...], before: "Loaded | None" = None) -> Loaded:
    """Import modules in order and record the variables they read; skip those that are not installed.

    Args:
        modules: Module names.
        before: Record of earlier imports in this process, to which this one adds.

    Returns:
        Record of all imports so far.
    """
    original_class = type(os.environ)
    # Before the class is swapped, or this copy would count as a read of everything. The record compares with the state
    # before the first imports: what they have set since then is `added`, also by earlier calls.
    environment = dict(os.environ) if before is None else before.environment
    # Makes `torch.cuda.is_available()` ask NVML. By default it initialises CUDA, and CUDA cannot be used in a fork of a
    # process that has initialised it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.__class__ = _RecordingEnviron
    try:
        for name in modules:
            if name.split(".")[0] == "deepspeed":
                import_deepspeed()
            try:
                importlib.import_module(name)
            # Only this one: any other may leave a half-made import behind, which would be in all forks.
            except ImportError:
                continue  # an optional package, or a version with another layout
    finally:
        os.environ.__class__ = original_class
    added = {name: value for name, value in os.environ.items() if environment.get(name) != value}
    return Loaded(frozenset(_RecordingEnviron.names), environment, added)


def import_deepspeed() -> Any:
    """Import DeepSpeed for the device that this process sees, without the slow imports of its autotuner.

    Returns:
        The module `deepspeed`.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        # Otherwise DeepSpeed probes every accelerator and prints warnings.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # In a fork it is loaded already, and the import below returns the module as the server left it.
    is_loaded = "deepspeed" in sys.modules
    # An optional import of deepspeed 0.19.8 (autotuning/autotuner.py), which costs 1.2 s.
    with _hidden("mlflow"):
        deepspeed = importlib.import_module("deepspeed")
    if is_loaded and not has_gpu and deepspeed.accelerator.get_accelerator().device_name() != "cpu":
        # DeepSpeed chose the accelerator when the server saw a GPU; Ray has given this fork none.
        cpu = importlib.import_module("deepspeed.accelerator.cpu_accelerator")
        deepspeed.accelerator.set_accelerator(cpu.CPU_Accelerator())
    return deepspeed


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Make a module appear not installed inside the block, unless it is loaded already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # documented: such an import raises ModuleNotFoundError
    try:
        yield
    finally:
        # Later imports find the package again. A module that was imported meanwhile keeps believing that it is missing.
        del sys.modules[name]


def difference(loaded: Loaded, wanted: Mapping[str, str]) -> str | None:
    """Return the name of a variable that the imports depend on and that differs in `wanted`; None if there is none.

    A value that an import has set itself does not count as different: a command passes it on to its workers.
    """
    before = loaded.environment
    # From both sides: a variable that only the request sets would have been read by a new process.
    read_by_c = {name for name in (*before, *wanted) if name.startswith(_C_PREFIXES)}
    # RAY_* variables may differ: each set of values has its own zygote (fork_server.py).
    decisive = sorted(n for n in (loaded.names | read_by_c) - _WITHOUT_EFFECT if not n.startswith("RAY_"))
    return next((n for n in decisive if wanted.get(n) not in (before.get(n), loaded.added.get(n, before.get(n)))), None)
