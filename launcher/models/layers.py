"""Layers of a model by their order: which to freeze, and how deep each parameter is.

Runs in train workers, and on the meta device where `check` counts parameters. Works for any architecture: the layers
are the largest list of modules, parameters before it are embeddings, and parameters after it are the head.
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
    """List of a model's layers: blocks of a transformer, stages of a ResNet.

    Args:
        name: Name of the module list.
        layers: Number of layers in it.
    """

    name: str
    layers: int


def find_stack(model: torch.nn.Module, key: str) -> Stack:
    """Return the list of modules with the most parameters that is not inside another list.

    Args:
        model: Model on any device, meta too.
        key: Key of the job file that needs the layers, for the message.

    Raises:
        ModelError: The model has no list of layers.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    # A list inside another, such as the experts of each layer, is not the list of layers.
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    # By parameters, not by length: a list of many small modules may be longer than the layers.
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in outer.items()}
    if not any(sizes.values()):
        raise ModelError(f"{key}: {type(model).__name__} has no list of layers to count; drop {key}")
    name = max(sizes, key=lambda n: sizes[n])
    return Stack(name, len(outer[name]))


def parameter_depths(model: torch.nn.Module, stack: Stack) -> dict[str, int]:
    """Return the depth of each parameter by name: 0 before the n layers, 1 to n in them, n + 1 after them."""
    depth_of: dict[str, int] = {}
    outside = 0
    # In the order of registration, which is that of the forward pass.
    for name, _ in model.named_parameters():
        if name.startswith(f"{stack.name}."):
            outside = stack.layers + 1
            depth_of[name] = int(name[len(stack.name) + 1 :].split(".")[0]) + 1
        else:
            depth_of[name] = outside
    return depth_of


def freeze(model: "PreTrainedModel", spec: FreezeSpec) -> None:
    """Set `requires_grad` of all parameters to what the job file says.

    Raises:
        ModelError: The job file names layers or parameters that the model lacks, or leaves nothing to train.
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
        depth = parameter_depths(model, stack)
        frozen |= {name for name in names if (depth[name] == 0 and spec.embeddings) or 1 <= depth[name] <= spec.layers}
    for name, parameter in model.named_parameters():
        # Sets both values: a model may come with frozen parameters of its own.
        parameter.requires_grad_(name not in frozen)
    # `named_parameters` lists a tied weight once, by its first name: freezing the embeddings freezes a tied head too.
    if len(frozen) == len(names):
        raise ModelError(
            f"model.freeze leaves nothing of {type(model).__name__} to train"
            + ("; its head shares the embeddings' weights" if spec.backbone else "")
            + "; freeze less"
        )


def _matching(pattern: str, names: list[str], model: torch.nn.Module) -> list[str]:
    matches = [name for name in names if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
    if matches:
        return matches
    choices = [*names, *(name for name, _ in model.named_modules() if name)]
    near = difflib.get_close_matches(pattern.rstrip("*."), choices, 3)
    remedy = f"did you mean {', '.join(near)}?" if near else f"its parameters are called {names[0]}, {names[-1]} ..."
    raise ModelError(f"model.freeze.names: no parameter of {type(model).__name__} matches {pattern}; {remedy}")


def frozen_modules(model: torch.nn.Module) -> list[str]:
    """Return the names of the largest modules that are frozen as a whole, and of other frozen parameters, in order."""
    frozen: list[str] = []
    waiting: list[tuple[str, torch.nn.Module]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            frozen.append(name)
            continue
        prefix = f"{name}." if name else ""
        frozen += [prefix + n for n, p in module.named_parameters(recurse=False) if not p.requires_grad]
        waiting += [(prefix + child, inner) for child, inner in module.named_children()]
    order = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    return sorted(frozen, key=order.index)
