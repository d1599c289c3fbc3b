"""Measures the memory of a micro-batch on fake tensors: exact for any model, without allocating anything.

PyTorch's FakeTensorMode runs the model's own code, its loss and its backward pass on shapes alone; a dispatch mode
counts the bytes of the storages that are alive. Runs on the client and the head; `auto.py` calls it.
"""

import logging
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any  # a PeftModel or the model in it

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from launcher.driver.memory.estimate import Activations, ParameterCounts
from launcher.models.adapters import add_adapters
from launcher.models.batch_norm import convert_to_part_batch_norm, find_batch_norms
from launcher.models.pretrained import add_embeddings, load_config, untrained_model
from launcher.models.quantization import BYTES_PER_WEIGHT, quantized_layers
from launcher.spec.job import JobSpec
from launcher.tasks.base import Task
from launcher.tasks.samples import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Elements. ZeRO-3 keeps smaller parameters whole on every worker (DeepSpeed's stage3_param_persistence_threshold).
_PERSISTENCE_THRESHOLD = 100_000


def meta_model(job: JobSpec, task: Task) -> "PreTrainedModel":
    """Return the model as the engine trains it, on the meta device.

    Raises:
        RuntimeError: The model cannot be made without its weights.
    """
    if type(task).build_model is not Task.build_model:
        raise RuntimeError("the task builds its model itself")
    with torch.device("meta"):
        model = untrained_model(task.auto_model, load_config(task.model, **task.head()))
        task.add_adapters(model)
        add_embeddings(model, job.model, job.seed)
        if job.parallel.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if job.model.lora is not None:
            model = add_adapters(model, task.auto_model, job.model, job.seed)  # type: ignore[assignment]  # a PeftModel forwards alike
        model.train()
        if job.model.trains_batch_norm:
            convert_to_part_batch_norm(model)
        else:
            for layer in find_batch_norms(model):
                layer.eval()
    torch.nn.Module.to(model, dtype=_DTYPES[job.train.precision])  # transformers' own `to` is untyped
    return model


def meta_reference(job: JobSpec, task: Task) -> torch.nn.Module | None:
    """Return the frozen model that the task's losses compare with, on the meta device; None if there is none."""
    if task.reference_model is None:
        return None
    with torch.device("meta"):
        model = untrained_model(task.auto_model, load_config(task.reference_model, **task.head()))
    model.eval().requires_grad_(False)
    torch.nn.Module.to(model, dtype=_DTYPES[job.train.precision])  # transformers' own `to` is untyped
    return model


def count_parameters(
    model: "PreTrainedModel", is_quantized: bool, reference: torch.nn.Module | None = None
) -> ParameterCounts:
    """Count the parameters of a model and of its reference, and the bytes of the model's buffers.

    Args:
        model: Model of `meta_model`.
        is_quantized: True if the frozen weights of its linear layers will have 4 bits.
        reference: Model of `meta_reference`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    layers: list[Any] = [inner.get_submodule(name) for name in (quantized_layers(inner) if is_quantized else ())]
    quantized = [layer.weight.numel() for layer in layers if not layer.weight.requires_grad]
    return ParameterCounts(
        trained=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad) - sum(quantized),
        quantized_bytes=int(sum(quantized) * BYTES_PER_WEIGHT),
        dequantized=max(quantized, default=0),
        persistent=sum(p.numel() for p in model.parameters() if p.numel() < _PERSISTENCE_THRESHOLD),
        buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        reference=0 if reference is None else sum(p.numel() for p in reference.parameters()),
    )


def measure_activations(model: "PreTrainedModel", task: Task, train: Batch, evaluation: Batch) -> Activations:
    """Measure the bytes that a micro-batch keeps alive in addition to the model.

    Args:
        model: Model of `meta_model`; its weights become fake tensors, and so do those of `task.reference`.
        task: Task with the loss.
        train: Largest micro-batch, on the CPU.
        evaluation: Largest evaluation batch, on the CPU.

    Raises:
        RuntimeError: The model's code reads values, which fake tensors do not have.
    """
    fake_logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = fake_logger.level
    # It logs code that reads values, which the caller reports itself.
    fake_logger.setLevel(logging.CRITICAL)
    # Before the fake mode, in which labels have no values to count.
    num_labelled = int((train.labels != -100).sum())
    try:
        # Without `allow_non_fake_inputs` constants that the model's code makes on its own would be refused.
        with FakeTensorMode(allow_non_fake_inputs=True):
            # Inside the mode, so that the new storages are fake and nothing is allocated.
            models = torch.nn.ModuleList([model] if task.reference is None else [model, task.reference])
            models.to_empty(device="cpu")
            tracker = LiveTensorTracker(models, num_labelled, train.labels.shape)
            trained = [p for p in model.parameters() if p.requires_grad]
            hooks = [p.register_post_accumulate_grad_hook(tracker.count_as_gradient) for p in trained]
            with tracker:
                _run_micro_batch(model, task, _fake(train, model.dtype))
                forward, backward, joint = tracker.forward, tracker.backward, tracker.joint
            for hook in hooks:
                hook.remove()
            evaluation_tracker = LiveTensorTracker(models, evaluation.labels.numel(), evaluation.labels.shape)
            model.eval()
            with evaluation_tracker, torch.no_grad():
                _run_evaluation(model, task, _fake(evaluation, model.dtype))
    finally:
        fake_logger.setLevel(level)
    return Activations(forward=forward, backward=backward, joint=joint, evaluation=evaluation_tracker.forward)


def _run_micro_batch(model: "PreTrainedModel", task: Task, batch: Batch) -> None:
    """Run forward and backward with the same operations as `train/loop.py` and `train/engine.py`."""
    outputs = task.forward(model, batch)
    losses_B = task.coupled_losses(outputs) if task.couples else task.sample_losses(outputs, batch)
    loss_sum = (losses_B * batch.mask).sum()
    (loss_sum / 1.0 * 1).backward()


def _run_evaluation(model: "PreTrainedModel", task: Task, batch: Batch) -> None:
    """Score a batch like `train/validate.py`."""
    outputs = task.forward(model, batch)
    if not task.couples:
        task.sample_losses(outputs, batch)


def _fake(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return the batch as fake tensors, inside a FakeTensorMode; floating-point inputs in the model's dtype."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    def fake_input(value: torch.Tensor | bool) -> torch.Tensor | bool:
        if isinstance(value, bool):
            return value
        return fake(value).to(dtype) if value.is_floating_point() else fake(value)

    inputs = {name: fake_input(value) for name, value in batch.inputs.items()}
    targets = {name: fake(value) for name, value in batch.targets.items()}
    return replace(batch, inputs=inputs, labels=fake(batch.labels), mask=fake(batch.mask), targets=targets)


class LiveTensorTracker(TorchDispatchMode):
    """Counter of the bytes of live tensors that operations have made; gradients are counted apart.

    Args:
        model: Model, or list of models, whose own tensors do not count.
        num_labelled: Number of labels that are not ignored; a mask of the labels' shape selects that many values.
        labels_shape: Shape of the labels.
    """

    def __init__(self, model: torch.nn.Module, num_labelled: int, labels_shape: torch.Size) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._num_labelled = num_labelled
        self._labels_shape = labels_shape
        self._live_bytes = self._gradient_bytes = 0
        # The list keeps the model's storages alive: their addresses, which are the keys, must not be used again.
        self._model_tensors = [*model.parameters(), *model.buffers()]
        self._bytes_by_storage = {tensor.untyped_storage()._cdata: 0 for tensor in self._model_tensors}
        self.forward = self.backward = self.joint = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
        selected = self._select(func, args)
        out = func(*args, **(kwargs or {})) if selected is None else selected
        tree_map_only(torch.Tensor, self._track, out)
        if self._gradient_bytes:
            self.backward = max(self.backward, self._live_bytes)
        else:
            self.forward = max(self.forward, self._live_bytes)
        self.joint = max(self.joint, self._live_bytes + self._gradient_bytes)
        return out

    def count_as_gradient(self, parameter: torch.nn.Parameter) -> None:
        """Count the parameter's complete gradient as one from now on (a post-accumulate-grad hook)."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        size = self._bytes_by_storage.get(key, 0)
        # Not removed: the release of this storage must not be subtracted a second time.
        self._bytes_by_storage[key] = 0
        self._live_bytes -= size
        self._gradient_bytes += size

    def _select(self, func: object, args: tuple[object, ...]) -> torch.Tensor | None:
        """Return the values that a boolean mask selects; None if the operation is another.

        Their number depends on the mask's values, for which FakeTensorMode raises.
        """
        if func is torch.ops.aten.index.Tensor:
            tensor, indices = args[:2]
            assert isinstance(tensor, torch.Tensor) and isinstance(indices, list | tuple)
            mask = indices[0]
            if len(indices) != 1 or not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
                return None
            return tensor.new_empty((self._num_selected(mask), *tensor.shape[mask.dim() :]))
        if func is torch.ops.aten.masked_select.default:
            tensor, mask = args[:2]
            assert isinstance(tensor, torch.Tensor) and isinstance(mask, torch.Tensor)
            return tensor.new_empty((self._num_selected(mask),))
        return None

    def _num_selected(self, mask: torch.Tensor) -> int:
        # Any other mask may select everything.
        return self._num_labelled if mask.shape == self._labels_shape else mask.numel()

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        # Views share a storage, which counts once.
        if key not in self._bytes_by_storage:
            self._bytes_by_storage[key] = storage.nbytes()
            self._live_bytes += storage.nbytes()
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self._live_bytes -= self._bytes_by_storage.pop(key, 0)
