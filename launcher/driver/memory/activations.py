"""What a micro-batch keeps in memory, measured on tensors without content: exact for any model, at no cost of memory.

PyTorch's fake tensors (FakeTensorMode) run the model's own code, its loss and its backward pass on shapes
alone; a dispatch mode counts the bytes of the storages that are alive. Runs on the client and the head.
"""

import logging
import weakref
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from launcher.driver.memory.estimate import Activations, ParameterCounts
from launcher.models.adapters import add_adapters
from launcher.models.batch_norm import batch_norms, synchronize
from launcher.models.pretrained import empty_model, load_config
from launcher.spec.job import JobSpec
from launcher.tasks.base import Batch, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# DeepSpeed's ZeRO-3 keeps parameters smaller than this whole on every worker (its param_persistence_threshold).
_PERSISTENT = 100_000


def meta_model(job: JobSpec, task: Task) -> "PreTrainedModel":
    """The model as the engine trains it, on the meta device.

    Raises:
        RuntimeError: the model cannot be made without its weights.
    """
    if type(task).build_model is not Task.build_model:
        raise RuntimeError("the task builds its model in a way of its own")
    with torch.device("meta"):
        model = empty_model(task.auto_model, load_config(task.model, **task.head()))
        task.add_adapters(model)
        if job.parallel.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if job.model.lora is not None:
            model = add_adapters(model, task.auto_model, job.model, job.seed)  # type: ignore[assignment]  # a PeftModel forwards alike
        model.train()
        if job.model.syncs_batch_norm:
            synchronize(model)
        else:
            for layer in batch_norms(model):
                layer.eval()
    torch.nn.Module.to(model, dtype=_DTYPES[job.train.precision])  # transformers leaves its own untyped
    return model


def count_parameters(model: torch.nn.Module) -> ParameterCounts:
    """Sizes of a model's parameters and buffers."""
    trained = [p for p in model.parameters() if p.requires_grad]
    sizes = [p.numel() for p in trained]
    return ParameterCounts(
        trained=sum(sizes),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        persistent=sum(p.numel() for p in model.parameters() if p.numel() < _PERSISTENT),
        buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
    )


def measure_activations(model: "PreTrainedModel", task: Task, train: Batch, evaluation: Batch) -> Activations:
    """Bytes a micro-batch keeps alive beside the model.

    Args:
        model: a `meta_model`; it is given fake weights.
        task: its losses.
        train: the largest micro-batch, on the CPU.
        evaluation: the largest evaluation batch.

    Raises:
        RuntimeError: the model's code looks at values, which fake tensors do not have.
    """
    quiet = logging.getLogger("torch._subclasses.fake_tensor")
    level, quiet.level = quiet.level, logging.CRITICAL
    labelled = int((train.labels != -100).sum())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model.to_empty(device="cpu")
            tracker = LiveTensorTracker(model, labelled, train.labels.shape)
            hooks = [
                p.register_post_accumulate_grad_hook(tracker.to_gradients)
                for p in model.parameters()
                if p.requires_grad
            ]
            with tracker:
                _micro_step(model, task, _fake(mode, train, model.dtype))
                joint, backward = tracker.joint, tracker.backward
                forward = tracker.forward
            for hook in hooks:
                hook.remove()
            looked = LiveTensorTracker(model, evaluation.labels.numel(), evaluation.labels.shape)
            model.eval()
            with looked, torch.no_grad():
                _score(model, task, _fake(mode, evaluation, model.dtype))
    finally:
        quiet.level = level
    return Activations(forward=forward, backward=backward, joint=joint, evaluation=looked.forward)


def _micro_step(model: "PreTrainedModel", task: Task, batch: Batch) -> None:
    """As `train/loop.py` and `train/engine.py` run it."""
    losses_B = task.sample_losses(model(**batch.inputs).logits, batch.labels)
    loss_sum = (losses_B * batch.mask).sum()
    (loss_sum / 1.0 * 1).backward()


def _score(model: "PreTrainedModel", task: Task, batch: Batch) -> None:
    """As `train/validate.py` runs it: the samples that are no fillers are taken out of the logits."""
    logits = model(**batch.inputs).logits
    chosen = logits.clone()
    task.sample_losses(chosen, batch.labels)


def _fake(mode: FakeTensorMode, batch: Batch, dtype: torch.dtype) -> Batch:
    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    inputs = {
        name: value if isinstance(value, bool) else fake(value).to(dtype) if value.is_floating_point() else fake(value)
        for name, value in batch.inputs.items()
    }
    return Batch(inputs, fake(batch.labels), fake(batch.mask))


class LiveTensorTracker(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they live; gradients apart.

    Args:
        model: whose own tensors do not count.
        labelled: how many of the labels count; a mask of the labels' shape chooses that many.
        labels: their shape.
    """

    def __init__(self, model: torch.nn.Module, labelled: int, labels: torch.Size) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._labelled, self._labels = labelled, labels
        self._live = self._gradients = 0
        own = [*model.parameters(), *model.buffers()]
        self._kept = own
        self._seen = {tensor.untyped_storage()._cdata: 0 for tensor in own}
        self.forward = self.backward = self.joint = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
        chosen = self._choose(func, args)
        out = func(*args, **(kwargs or {})) if chosen is None else chosen
        tree_map_only(torch.Tensor, self._see, out)
        if self._gradients:
            self.backward = max(self.backward, self._live)
        else:
            self.forward = max(self.forward, self._live)
        self.joint = max(self.joint, self._live + self._gradients)
        return out

    def to_gradients(self, parameter: torch.nn.Parameter) -> None:
        """A gradient is whole: from now on it counts as one."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        size, self._seen[key] = self._seen.get(key, 0), 0
        self._live -= size
        self._gradients += size

    def _choose(self, func: object, args: tuple[object, ...]) -> torch.Tensor | None:
        """What a mask chooses, whose number of values only the real labels tell."""
        if func is torch.ops.aten.index.Tensor:
            tensor, indices = args[:2]
            assert isinstance(tensor, torch.Tensor) and isinstance(indices, list | tuple)
            mask = indices[0]
            if len(indices) != 1 or not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
                return None
            return tensor.new_empty((self._count(mask), *tensor.shape[mask.dim() :]))
        if func is torch.ops.aten.masked_select.default:
            tensor, mask = args[:2]
            assert isinstance(tensor, torch.Tensor) and isinstance(mask, torch.Tensor)
            return tensor.new_empty((self._count(mask),))
        return None

    def _count(self, mask: torch.Tensor) -> int:
        return self._labelled if mask.shape == self._labels else mask.numel()

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = storage.nbytes()
            self._live += self._seen[key]
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._live -= self._seen.pop(key, 0)
