"""Checks that a model's weights are complete and fit its configuration, before any of them is loaded.

Runs on the client and the head, on the headers of the files, which have the names and shapes of the tensors; only
`check_loaded` runs in train workers. transformers loads what fits by name and leaves the rest random with a warning:
training would then start from noise.
"""

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
# Parts of names added by DistributedDataParallel, torch.compile, FSDP, activation checkpointing and Lightning.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
OPTIONAL_PARTS = frozenset(("pooler", "mask_token", "mask_emb", "masked_spec_embed"))
"""Parts of a body that may be missing: checkpoints of pretraining heads lack the pooler or the mask embedding."""
_LFS_MAGIC = b"version https://git-lfs"
# A zip archive, or a bare pickle as torch.save wrote before 1.6.
_TORCH_MAGIC = (b"PK", b"\x80")
_LAYER = re.compile(r"(.+?\.)\d+\.")


def check_place(spec: ModelSpec) -> None:
    """Refuse a local path that cannot be a model directory.

    Raises:
        ModelError: The path is a file, or a directory without a valid config.json; or a directory has a revision.
    """
    place = Path(spec.name)
    if place.is_file():
        gguf = "GGUF files cannot be trained; " if place.suffix == ".gguf" else ""
        raise ModelError(f"model.name: {spec.name} is a file ({gguf}give the directory that holds config.json)")
    if not place.is_dir():
        return
    if not (place / "config.json").is_file():
        names = sorted(path.name for path in place.iterdir())
        content = f"it holds {', '.join(names[:5])}{' ...' * (len(names) > 5)}" if names else "it is empty"
        raise ModelError(
            f"model.name: {spec.name} has no config.json ({content}); give the directory that `save_pretrained` wrote"
        )
    try:
        is_object = isinstance(json.loads((place / "config.json").read_bytes()), dict)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"model.name: {place / 'config.json'} is not JSON ({reason}); {_AGAIN}") from error
    if not is_object:
        raise ModelError(f"model.name: {place / 'config.json'} is not a JSON object; {_AGAIN}")
    if spec.revision is not None and spec.from_config is None:
        raise ModelError(
            f"model.revision: {spec.revision} is the hub's, but {spec.name} is a directory; drop it, or give a hub name"
        )


def check_weights(spec: ModelSpec, model: "PreTrainedModel") -> None:
    """Refuse a model directory without weights that may be loaded and fit the configuration.

    Args:
        spec: Model section of the job.
        model: Model of its configuration without storage (`pretrained.without_weights`).

    Raises:
        ModelError: The weights are missing, damaged, or another model's; names the file.
    """
    if spec.from_config is not None:
        return
    # Reading headers would copy whole files first.
    if "://" in spec.name:
        _check_names(spec, [info.base_name for info in remote_files(spec.name)])
        return
    folder = Path(spec.name)
    if not folder.is_dir():
        return
    _check_names(spec, [file.name for file in folder.iterdir()])
    # transformers 5.23 prefers safetensors where a directory holds both.
    is_pickle = not any(folder.glob("*.safetensors"))
    read = _pickle_shapes if is_pickle else _safetensors_shapes
    files = _files(folder, "pytorch_model.bin" if is_pickle else "model.safetensors")
    _check_shapes(spec, model, {name: shape for file in files for name, shape in read(file).items()})


def check_loaded(spec: ModelSpec, model: "PreTrainedModel", missing: Collection[str], is_whole: bool) -> None:
    """Refuse a loaded model with random values in parameters other than a new head's.

    Args:
        spec: Model section of the job.
        model: Loaded model.
        missing: Names of the parameters that the weights lack.
        is_whole: True if all of it must be pretrained, the head too.

    Raises:
        ModelError: There are such parameters; names the first.
    """
    names = [name for name, _ in model.named_parameters()]
    body = [name for name in names if name.startswith(f"{model.base_model_prefix}.")]
    needed = names if is_whole or set(names) <= set(missing) else body
    gaps = [name for name in needed if name in missing and OPTIONAL_PARTS.isdisjoint(name.split("."))]
    if gaps:
        more = f" and {len(gaps) - 1} more" if len(gaps) > 1 else ""
        raise ModelError(
            f"model.name: the weights of {spec.name} have nothing for {gaps[0]}{more}, which would stay random; "
            f"{_TOGETHER}"
        )


def _check_names(spec: ModelSpec, names: list[str]) -> None:
    # transformers 5.23 would load the adapters too (`find_adapter_config_file` in its auto classes), in silence.
    if "adapter_config.json" in names:
        raise ModelError(
            f"model.name: {spec.name} holds adapters (adapter_config.json) next to a model; merge them into its "
            "weights (`merge_and_unload` of peft), or remove that file to train without them"
        )
    loadable = (".safetensors", ".bin") if spec.allow_pickle else (".safetensors",)
    if not any(name.endswith(loadable) for name in names):
        raise ModelError(
            f"model.name: {spec.name} has no safetensors weights; a pickle can run code when loaded: convert it, "
            "or set model.allow_pickle: true if you trust it"
        )


def _files(folder: Path, name: str) -> list[Path]:
    """Return the files that transformers would load: the one of this name, or the shards in its index."""
    whole, index = folder / name, folder / f"{name}.index.json"
    # A link is taken even if broken, as in a cache of the hub whose blob is gone: reading it names the file.
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
            raise ModelError(f"model.name: {folder / name} is missing, but {index.name} names it; {_AGAIN}")
    return [folder / name for name in names]


def _read_magic(file: Path) -> bytes:
    """Return the first bytes of a file, unless it is a pointer of Git LFS."""
    try:
        with file.open("rb") as stream:
            magic = stream.read(len(_LFS_MAGIC))
    except OSError as error:
        raise ModelError(f"model.name: {file} cannot be read ({describe_os_error(error)}); {_AGAIN}") from error
    if magic == _LFS_MAGIC:
        raise ModelError(f"model.name: {file} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`")
    return magic


def _safetensors_shapes(file: Path) -> Shapes:
    """Return the shapes in the header of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    _read_magic(file)
    try:
        # Reads the header, which also shows a file that was cut short: its length is checked against the offsets.
        with safe_open(file, "np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"model.name: {file} is not a whole safetensors file ({reason}); {_AGAIN}") from error


def _pickle_shapes(file: Path) -> Shapes:
    """Return the shapes in a file of torch.save. `weights_only` runs no code, `meta` and `mmap` read no values."""
    import torch

    if not _read_magic(file).startswith(_TORCH_MAGIC):
        raise ModelError(f"model.name: {file} is not a file of torch.save; {_AGAIN}")
    try:
        state = torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))
    except (UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"model.name: {file} is not a whole file of weights ({reason}); {_AGAIN}") from error
    entries = state if isinstance(state, dict) else {}
    shapes = {str(name): tuple(tensor.shape) for name, tensor in entries.items() if isinstance(tensor, torch.Tensor)}
    if not shapes:
        holds = list_names([*map(str, entries)]) if entries else f"a {type(state).__name__}"
        raise ModelError(
            f"model.name: {file} holds {holds} instead of tensors by name; save the model's state_dict() alone, as "
            "`save_pretrained` does"
        )
    return shapes


def _check_wrapper(spec: ModelSpec, wanted: Collection[str], shapes: Shapes, prefix: str) -> None:
    """Refuse weights with the names of a wrapped model: torch.compile's, for one, begin with `_orig_mod.`."""
    for name in shapes:
        wrapper = next((part for part in name.split(".") if part in _WRAPPERS), None)
        if wrapper is not None and not {name, name.removeprefix(prefix), f"{prefix}{name}"} & set(wanted):
            raise ModelError(
                f"model.name: {name} in the weights of {spec.name} has the name of a wrapped model; remove "
                f"'{wrapper}.' from the names, or save the model inside the wrapper"
            )


def _check_shapes(spec: ModelSpec, model: "PreTrainedModel", shapes: Shapes) -> None:
    """Refuse weights with other names or shapes than the model's; the prefix of the body (`bert.`) may be missing."""
    prefix = f"{model.base_model_prefix}."
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_wrapper(spec, wanted, shapes, prefix)
    body = [name for name in wanted if name.startswith(prefix)] or list(wanted)
    matches = 0
    for name in wanted:
        shape = next((shapes[n] for n in (name, name.removeprefix(prefix), f"{prefix}{name}") if n in shapes), None)
        # Only the body counts: a head of the right shape proves nothing about the model.
        matches += shape is not None and name in body
        if shape is not None and shape != wanted[name]:
            raise ModelError(
                f"model.name: {name} is {_size(shape)} in the weights of {spec.name}, but {_size(wanted[name])} by its "
                f"config.json{_about_head(name, prefix)}"
            )
    gap = _find_missing_layer(body, shapes, prefix)
    if gap is not None:
        raise ModelError(
            f"model.name: the weights of {spec.name} have nothing for {gap}, which its config.json asks for; "
            f"{_TOGETHER}"
        )
    if not matches:
        expected, actual = next(iter(body), "nothing"), next(iter(shapes), "nothing")
        raise ModelError(
            f"model.name: the weights of {spec.name} are not those of the {_kind(model)} that its config.json "
            f"describes (they hold {actual}, not {expected}); {_TOGETHER}"
        )


def _find_missing_layer(wanted: list[str], shapes: Shapes, prefix: str) -> str | None:
    """Return a parameter of the first layer that the weights lack, although they have layer 0 of its stack."""
    layers = {match[0] for name in shapes if (match := _LAYER.match(name.removeprefix(prefix)))}
    for name in wanted:
        match = _LAYER.match(name.removeprefix(prefix))
        if match is not None and match[0] not in layers and f"{match[1]}0." in layers:
            return name
    return None


def _about_head(name: str, prefix: str) -> str:
    if name.startswith(prefix):
        return f"; {_TOGETHER}"
    return " and the task's classes; start from the model without this head, or give the classes it has"


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _kind(model: "PreTrainedModel") -> str:
    return str(model.config.model_type)
