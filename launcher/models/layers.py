"""The layers of a model, told apart by where they stand: which to freeze, how deep each parameter is.

Runs in train workers, and on the meta device where `check` counts parameters. Nothing here knows a model by name: the
layers are the largest list of modules, what stands before it are embeddings, what stands behind it is the head.
"""

import difflib
import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from launcher.errors import ModelError
from launcher.spec.model import FreezeSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stack:
    """The list of a model's layers (blocks of a transformer, stages of a ResNet)."""

    name: str
    layers: int


def find_stack(model: torch.nn.Module, key: str) -> Stack:
    """The largest list of modules that stands in no other list.

    Args:
        model: whose layers.
        key: of the job file, that needs them.

    Raises:
        ModelError: there is none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in outer.items()}
    if not any(sizes.values()):
        raise ModelError(f"{key}: {type(model).__name__} has no list of layers, so they cannot be told; drop {key}")
    name = max(sizes, key=lambda n: sizes[n])
    return Stack(name, len(outer[name]))


def depths(model: torch.nn.Module, stack: Stack) -> dict[str, int]:
    """Each parameter's depth by name: 0 before the layers, 1 to n in them, n + 1 behind them (pooler, norm, head)."""
    found, behind = {}, 0
    for name, _ in model.named_parameters():
        inside = name.startswith(f"{stack.name}.")
        if inside:
            behind = stack.layers + 1
        found[name] = int(name[len(stack.name) + 1 :].split(".")[0]) + 1 if inside else behind
    return found


def freeze(model: "PreTrainedModel", spec: FreezeSpec) -> None:
    """Take the gradients from what the job file says is frozen.

    Raises:
        ModelError: it names what the model has not, or leaves nothing to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = {name for pattern in spec.names for name in _matching(pattern, names, model)}
    if spec.backbone:
        frozen |= {name for name in names if name.startswith(f"{model.base_model_prefix}.")}
    if spec.embeddings or spec.layers:
        key = "model.freeze.layers" if spec.layers else "model.freeze.embeddings"
        stack = find_stack(model, key)
        if spec.layers > stack.layers:
            raise ModelError(
                f"model.freeze.layers: {spec.layers} is more than the {stack.layers} layers of {stack.name}; lower it"
            )
        depth = depths(model, stack)
        frozen |= {name for name in names if (depth[name] == 0 and spec.embeddings) or 1 <= depth[name] <= spec.layers}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if len(frozen) == len(names):
        raise ModelError(
            f"model.freeze leaves nothing of {type(model).__name__} to train"
            + ("; its head shares the embeddings' weights" if spec.backbone else "")
            + "; freeze less"
        )


def _matching(pattern: str, names: list[str], model: torch.nn.Module) -> list[str]:
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
    if found:
        return found
    places = [*names, *(name for name, _ in model.named_modules() if name)]
    near = difflib.get_close_matches(pattern.rstrip("*."), places, 3)
    remedy = f"did you mean {', '.join(near)}?" if near else f"its parameters are called {names[0]}, {names[-1]} ..."
    raise ModelError(f"model.freeze.names: no parameter of {type(model).__name__} matches {pattern}; {remedy}")


def frozen_modules(model: torch.nn.Module) -> list[str]:
    """Names of the modules (or lone parameters) that are frozen as a whole, as few as say it."""
    found: list[str] = []
    waiting: list[tuple[str, torch.nn.Module]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            found.append(name)
            continue
        prefix = f"{name}." if name else ""
        found += [prefix + n for n, p in module.named_parameters(recurse=False) if not p.requires_grad]
        waiting += [(prefix + child, inner) for child, inner in module.named_children()]
    order = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    return sorted(found, key=order.index)
