"""Whether a local model directory has weights that fit its configuration, by the headers of its files. Client, head.

Nothing is loaded: a header names tensors and their shapes. What is wrong would else show in the train workers.
"""

import difflib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING
from zipfile import is_zipfile

from launcher.errors import ModelError
from launcher.formatting import list_names
from launcher.models.remote import remote_files
from launcher.rundir.uri import describe_os_error
from launcher.spec.model import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]

_AGAIN = "copy or download it again"
_TOGETHER = "put the files of one model together"
# What wrappers put into names: DistributedDataParallel, torch.compile, FSDP, activation checkpointing, Lightning.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
# Of a body, and yet of no use to most heads; checkpoints of pretraining heads lack the pooler, others the masks.
_DISPENSABLE = frozenset(("pooler", "mask_token", "mask_emb", "masked_spec_embed"))
_LFS = b"version https://git-lfs"
# How torch.save's files begin: a zip archive, or a pickle as it was before torch 1.6.
_PICKLES = (b"PK", b"\x80")
# Conv1D is GPT-2's linear layer.
_LAYER = re.compile(r"(.+?\.)\d+\.")
_LINEAR = ("Linear", "Conv1D")
_ADAPTABLE = (*_LINEAR, "Embedding", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention")


def check_place(spec: ModelSpec) -> None:
    """Refuse a local path at which no model can be.

    Raises:
        ModelError: it is a file, or a directory without a configuration; or a hub's revision of a directory.
    """
    place = Path(spec.name)
    if place.is_file():
        gguf = "GGUF files cannot be trained; " if place.suffix == ".gguf" else ""
        raise ModelError(f"model.name: {spec.name} is a file ({gguf}give the directory that holds config.json)")
    if not place.is_dir():
        return
    if not (place / "config.json").is_file():
        held = sorted(path.name for path in place.iterdir())
        found = f"it holds {', '.join(held[:5])}{' ...' * (len(held) > 5)}" if held else "it is empty"
        raise ModelError(
            f"model.name: {spec.name} has no config.json ({found}); give the directory that `save_pretrained` wrote"
        )
    try:
        is_object = isinstance(json.loads((place / "config.json").read_bytes()), dict)
    except (OSError, ValueError) as error:
        what = f"not JSON ({' '.join(str(error).split())})"
        raise ModelError(f"model.name: {place / 'config.json'} is {what}; {_AGAIN}") from error
    if not is_object:
        raise ModelError(f"model.name: {place / 'config.json'} is not a JSON object; {_AGAIN}")
    if spec.revision is not None and spec.from_config is None:
        raise ModelError(
            f"model.revision: {spec.revision} is the hub's, but {spec.name} is a directory; drop it, or give a hub name"
        )


def check_weights(spec: ModelSpec, model: "PreTrainedModel") -> None:
    """Look whether a local model directory has weights that may be loaded, and that they are this model's.

    Args:
        spec: which model.
        model: of its configuration, without storage (`pretrained.blank`).

    Raises:
        ModelError: they are missing, damaged, or another model's; names the file.
    """
    if spec.from_config is not None:
        return
    if "://" in spec.name:  # whole files would have to come here first
        _check_names(spec, [info.base_name for info in remote_files(spec.name)])
        return
    folder = Path(spec.name)
    if not folder.is_dir():
        return
    _check_names(spec, [file.name for file in folder.iterdir()])
    is_pickle = not any(folder.glob("*.safetensors"))
    read = _pickled if is_pickle else _header
    files = _files(folder, "pytorch_model.bin" if is_pickle else "model.safetensors")
    _check_shapes(spec, model, {name: shape for file in files for name, shape in read(file).items()})


def check_loaded(spec: ModelSpec, model: "PreTrainedModel", missing: Collection[str], is_whole: bool) -> None:
    """Refuse a model of which parameters beside a new head kept random values: it would train from these, and badly.

    Args:
        spec: Which model.
        model: Model as it was loaded.
        missing: Parameters that its weights do not have.
        is_whole: Whether the head, too, is a pretrained one.

    Raises:
        ModelError: It has such; names the first.
    """
    names = [name for name, _ in model.named_parameters()]
    body = [name for name in names if name.startswith(f"{model.base_model_prefix}.")]
    needed = names if is_whole or set(names) <= set(missing) else body
    gaps = [name for name in needed if name in missing and _DISPENSABLE.isdisjoint(name.split("."))]
    if gaps:
        more = f" and {len(gaps) - 1} more" if len(gaps) > 1 else ""
        raise ModelError(
            f"model.name: the weights of {spec.name} have nothing for {gaps[0]}{more}, which would stay random; "
            f"{_TOGETHER}"
        )


def _check_names(spec: ModelSpec, names: list[str]) -> None:
    if "adapter_config.json" in names:
        raise ModelError(
            f"model.name: {spec.name} holds adapters (adapter_config.json) beside a model; merge them into its weights "
            "(`merge_and_unload` of peft), or take that file out to train without them"
        )
    loadable = (".safetensors", ".bin") if spec.allow_pickle else (".safetensors",)
    if not any(name.endswith(loadable) for name in names):
        raise ModelError(
            f"model.name: {spec.name} has no safetensors weights; a pickle can run code when loaded: convert it, "
            "or set model.allow_pickle: true if you trust it"
        )


def _files(folder: Path, name: str) -> list[Path]:
    """Return the files that transformers would load: the one of this name, or those of its index."""
    whole, index = folder / name, folder / f"{name}.index.json"
    if whole.exists() or whole.is_symlink():
        return [whole]
    if not index.exists():
        return sorted(folder.glob("*.safetensors")) if whole.suffix == ".safetensors" else []
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model.name: {index} names no weights ({' '.join(str(error).split())}); {_AGAIN}") from error
    for name in names:
        if not (folder / name).exists():
            raise ModelError(f"model.name: {folder / name} is not there, which {index.name} names; {_AGAIN}")
    return [folder / name for name in names]


def _start(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(len(_LFS))
    except OSError as error:
        raise ModelError(f"model.name: {file} cannot be read ({describe_os_error(error)}); {_AGAIN}") from error


def _header(file: Path) -> Shapes:
    from safetensors import SafetensorError, safe_open

    if _start(file) == _LFS:
        raise ModelError(f"model.name: {file} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`")
    try:
        with safe_open(file, "np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        what = " ".join(str(error).split())
        raise ModelError(f"model.name: {file} is not a whole safetensors file ({what}); {_AGAIN}") from error


def _pickled(file: Path) -> Shapes:
    """Return the tensors of a file of torch.save; neither code of it is run nor are values read."""
    import torch

    start = _start(file)
    if start == _LFS:
        raise ModelError(f"model.name: {file} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`")
    if not start.startswith(_PICKLES):
        raise ModelError(f"model.name: {file} is not a file of torch.save; {_AGAIN}")
    try:
        state = torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))
    except (UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        what = " ".join(str(error).split())[:200]
        raise ModelError(f"model.name: {file} is not a whole file of weights ({what}); {_AGAIN}") from error
    entries = state if isinstance(state, dict) else {}
    found = {str(name): tuple(tensor.shape) for name, tensor in entries.items() if isinstance(tensor, torch.Tensor)}
    if not found:
        holds = f"{list_names([*map(str, entries)])}" if entries else f"a {type(state).__name__}"
        raise ModelError(
            f"model.name: {file} holds {holds} instead of tensors by name; save the model's state_dict() alone, as "
            "`save_pretrained` does"
        )
    return found


def _check_wrapper(spec: ModelSpec, wanted: Collection[str], found: Shapes, prefix: str) -> None:
    """Refuse weights with the names that DistributedDataParallel, torch.compile or FSDP make of a model's."""
    for name in found:
        wrapper = next((part for part in name.split(".") if part in _WRAPPERS), None)
        if wrapper is not None and not {name, name.removeprefix(prefix), f"{prefix}{name}"} & set(wanted):
            raise ModelError(
                f"model.name: {name} in the weights of {spec.name} has the name of a wrapped model; take '{wrapper}.' "
                "out of the names, or save the model inside the wrapper"
            )


def _check_shapes(spec: ModelSpec, model: "PreTrainedModel", found: Shapes) -> None:
    """Names may lack or bear the prefix of the model without its head."""
    prefix = f"{model.base_model_prefix}."
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_wrapper(spec, wanted, found, prefix)
    body = [name for name in wanted if name.startswith(prefix)] or list(wanted)
    known = 0
    for name in wanted:
        shape = next((found[n] for n in (name, name.removeprefix(prefix), f"{prefix}{name}") if n in found), None)
        known += shape is not None and name in body
        if shape is not None and shape != wanted[name]:
            raise ModelError(
                f"model.name: {name} is {_size(shape)} in the weights of {spec.name}, but {_size(wanted[name])} by its "
                f"config.json{_about_head(name, prefix)}"
            )
    gap = _first_gap(body, found, prefix)
    if gap is not None:
        raise ModelError(
            f"model.name: the weights of {spec.name} have nothing for {gap}, which its config.json asks for; "
            f"{_TOGETHER}"
        )
    if not known:
        ours, theirs = next(iter(body), "nothing"), next(iter(found), "nothing")
        raise ModelError(
            f"model.name: the weights of {spec.name} are not those of the {_kind(model)} that its config.json tells of "
            f"(they hold {theirs}, not {ours}); {_TOGETHER}"
        )


def _first_gap(wanted: list[str], found: Shapes, prefix: str) -> str | None:
    """A parameter of the first layer of a stack of which the weights hold others, but nothing of this one."""
    there = {match[0] for name in found if (match := _LAYER.match(name.removeprefix(prefix)))}
    for name in wanted:
        match = _LAYER.match(name.removeprefix(prefix))
        if match is not None and match[0] not in there and f"{match[1]}0." in there:
            return name
    return None


def _about_head(name: str, prefix: str) -> str:
    if name.startswith(prefix):
        return f"; {_TOGETHER}"
    return " and the task's classes; start from the model without this head, or give the classes it has"


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def check_layers(targets: tuple[str, ...], model: "PreTrainedModel") -> None:
    """Look whether the layers that should get adapters are there.

    Args:
        targets: of the job file; a layer is meant by the end of its name.
        model: without storage (`pretrained.blank`).

    Raises:
        ModelError: one of them is the name of no layer, or of none that can have an adapter.
    """
    named = [(name, type(module).__name__) for name, module in model.named_modules()]
    linear = sorted({name.rpartition(".")[2] for name, kind in named if kind in _LINEAR})
    for target in targets:
        kinds = [kind for name, kind in named if name == target or name.endswith(f".{target}")]
        if any(kind in _ADAPTABLE for kind in kinds):
            continue
        what = (
            f"a {kinds[0]}, which takes no adapter" if kinds else f"the name of no layer of this {_kind(model)} model"
        )
        near = difflib.get_close_matches(target, linear, 1)
        remedy = f"did you mean {near[0]}?" if near else f"its linear layers are {', '.join(linear)}"
        raise ModelError(f"model.lora.target_modules: {target} is {what}; {remedy}")


def _kind(model: "PreTrainedModel") -> str:
    return str(model.config.model_type)
