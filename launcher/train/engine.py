"""DeepSpeed behind a small face: forward, backward, step, save, load. Runs in train workers.

`loop.py` is its user, `deepspeed_config.py` its configuration; what is saved is in `train/checkpoint/state_dict.py`,
`train/offload/nvme.py` and `train/checkpoint/universal.py`.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from launcher.errors import TrainingError, WeightDivergenceError
from launcher.models.adapters import add_adapters
from launcher.models.batch_norm import SyncBatchNorm, batch_norms, synchronize
from launcher.models.layers import freeze
from launcher.processes.preload import import_deepspeed
from launcher.spec.job import JobSpec
from launcher.tasks.base import Batch, Task
from launcher.train.checkpoint.state_dict import collect_state
from launcher.train.checkpoint.universal import MOMENTS, load_buffers, load_full, rename_moments
from launcher.train.deepspeed_config import deepspeed_config
from launcher.train.ema import EMA, FILE
from launcher.train.flat_gradients import (
    FlatGradients,
    step_master_weights,
    undo_initial_step,
    unify_gradient_dtype,
    use_sparse_embedding_update,
)
from launcher.train.offload.nvme import create_swap_dir, reading_back
from launcher.train.op_builders import prepare_op_builds
from launcher.train.param_groups import bitsandbytes_optimizer, check_shardable, parameter_groups

deepspeed = import_deepspeed()
_DIGESTED = 1 << 20
"""Numbers of a weight that `check_sync` looks at together."""


def _build(job: JobSpec, task: Task) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the model as it trains, and the one inside of its adapters; the same where there are none."""
    inner = task.build_model()
    if job.parallel.activation_checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if job.model.freeze is not None:
        freeze(inner, job.model.freeze)
    model = inner if job.model.lora is None else add_adapters(inner, task.auto_model, job.model, job.seed)
    if job.train.compile:
        model.compile(dynamic=True)  # in place: names and hooks stay as they are
    if job.model.syncs_batch_norm:
        synchronize(model)
    return model, inner


class Engine:
    """One worker's part of the model, its optimizer and the collectives between workers.

    Args:
        job: the resolved job.
        task: builds the model.
        micro_batch: largest micro-batch a worker will see.
    """

    def __init__(self, job: JobSpec, task: Task, micro_batch: int) -> None:
        self.job, self.rank, self.world_size = job, dist.get_rank(), dist.get_world_size()
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        model, inner = _build(job, task)
        self._unwrapped = model
        self._synchronised = [m for m in model.modules() if isinstance(m, SyncBatchNorm)]
        self._frozen = [m for m in batch_norms(model) if not isinstance(m, SyncBatchNorm)]
        self.zero = job.zero_stage
        self.num_forwards = 0
        """Forward passes so far, those of generation among them."""
        for module in {model, inner}:  # peft generates with the model inside
            module.register_forward_pre_hook(self._count)
        self.before_step: Callable[[], object] = bool
        """Waits for whoever still reads weights and states, which a step changes."""
        self.grad_norm: float | torch.Tensor | None = None
        """L2 norm of the last step's gradient before clipping; a tensor stays on its device until it is logged."""
        groups = parameter_groups(model, job.train)
        self._groups = groups
        self.trained_names = [name for group in groups for name in group.names]
        """Names of the trained parameters, in the optimizer's order."""
        prepare_op_builds()
        elements = sum(weight.numel() for group in groups for weight in group.parameters)
        self._swap = create_swap_dir(job.parallel.offload_path, elements // self.world_size)
        disk = None if self._swap is None else self._swap.path
        config = deepspeed_config(job, micro_batch, self.world_size, elements, disk)
        self.moments = MOMENTS.get(job.train.optimizer.type)
        """How the optimizer's states travel to another number of workers; None where they cannot."""
        with unify_gradient_dtype(deepspeed.DeepSpeedEngine):
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=bitsandbytes_optimizer(job),
                model_parameters=[group.as_dict() for group in groups],
                config=config,
                dist_init_required=False,
            )
        weights = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        self._flat: FlatGradients | None = None
        """Without ZeRO; else gradients are DeepSpeed's."""
        half = job.train.precision != "fp32"
        if self.zero == 0 and half:
            undo_initial_step(self._optimizer)
            self._optimizer.step = partial(step_master_weights, self._optimizer)
            self._flat = FlatGradients(weights, [weight for group in groups for weight in group.parameters])
        elif self.zero == 0:
            self._flat = FlatGradients(weights)
            if not (cuda or job.train.compile):  # which knows no gradients of rows
                use_sparse_embedding_update(model)
        self.ema: EMA | None = None
        """Of the weights, where the job file asks for one: what evaluations and `gathered_state` see."""
        if job.train.ema is not None:
            weights = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
            self.ema = EMA(job.train.ema, weights, sharded=self.zero == 3)
        if self._flat is not None:
            self._engine.enable_backward_allreduce = False  # it would copy all gradients, at one worker to themselves

    @property
    def model(self) -> torch.nn.Module:
        """The transformers model; under ZeRO-3 its weights are shards between uses."""
        return self._unwrapped

    def seed(self, step: int) -> None:
        """Noise (dropout) is a function of seed, step and rank, so a resumed run draws the same."""
        digest = hashlib.sha256(f"{self.job.seed}/{step}/{self.rank}".encode()).digest()
        number = int.from_bytes(digest[:7], "little")
        # Not `torch.manual_seed`: it notes this call's stack for each kind of device that is absent, 1 ms a step.
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def train_mode(self) -> None:
        """Dropout on; BatchNorm's statistics stay as they were pretrained, unless they are synchronised."""
        self._engine.train()
        for layer in self._frozen:
            layer.eval()

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Dropout off, no gradients, and averaged weights where there are some, inside the block."""
        self._engine.eval()
        with torch.no_grad(), self._averaged():
            yield
        self.train_mode()

    def _averaged(self) -> AbstractContextManager[None]:
        if self.ema is None:
            return nullcontext()
        return self.ema.swapped_in(self._optimizer.empty_partition_cache if self.zero == 3 else lambda: None)

    def _count(self, *_: object) -> None:
        self.num_forwards += 1

    def logits(self, batch: Batch) -> torch.Tensor:
        """The model's logits, (B, ...)."""
        for layer in self._synchronised:
            layer.mask = batch.mask
        return self._engine(**batch.inputs).logits  # type: ignore[no-any-return]  # deepspeed ships no types

    def backward(self, loss_sum: torch.Tensor, global_weight: float) -> None:
        """Add the gradient of `loss_sum / global_weight`.

        DeepSpeed averages gradients over workers, hence the world size; nothing is divided by accumulation steps.
        """
        times = 1 if self._flat is not None else self.world_size
        self._engine.backward(loss_sum / global_weight * times, scale_wrt_gas=False)

    @property
    def has_sync_batch_norm(self) -> bool:
        """Whether a forward pass already changes what is saved: running statistics."""
        return bool(self._synchronised)

    @property
    def saves_from_files(self) -> bool:
        """Whether `states` are mapped from files on a disk: a copy would bring all of them into memory."""
        return self._swap is not None

    @property
    def can_retry_step(self) -> bool:
        """Whether a step can be made again: before `step` nothing was exchanged, and gradients are the parameters'."""
        alone = self.zero == 1 or self._flat is not None
        return alone and not (self.job.parallel.offload_optimizer or self._synchronised)

    def reset_gradients(self) -> None:
        """Forget the gradients of a step that broke off; only where the engine `repeats`."""
        self._engine.zero_grad()
        if self._flat is not None:
            self._flat.clear()
        self._engine._unmanaged_backward_count = 0
        if self.zero == 1:
            # A backward pass that broke off leaves DeepSpeed (0.19.8, runtime/base_optimizer.py) inside of it.
            self._optimizer.zero_grad()
            self._optimizer._backward_active_depth = self._optimizer._remaining_grad_acc_hooks = 0
            self._optimizer._backward_hook_state.reset_for_new_step()
            self._optimizer._release_ipg_buffers()

    def step(self, learning_rate: float, step: int) -> None:
        """Reduce, clip and apply the accumulated gradient; the optimizer step number `step`, counted from 0."""
        self.before_step()
        self._apply(learning_rate)
        if self.ema is not None:
            self.ema.update(step + 1)

    def _apply(self, learning_rate: float) -> None:
        for group, own in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["lr"] = learning_rate * own.scale
        if self._flat is None:
            self._engine.step()
            self.grad_norm = self._engine.get_global_grad_norm()
            return
        if self.world_size > 1:
            self._flat.all_reduce()
        self.grad_norm = self._flat.clip(self.job.train.max_grad_norm)
        self._engine.step()
        self._flat.clear()  # DeepSpeed has put every gradient to None

    def local_state(self) -> dict[str, object]:
        """What this worker has to save, by file: the training's own tensors, not copies (a collective)."""
        found = collect_state(self._engine)
        if self.ema is not None:
            whole = self.ema.full_weights()
            found |= {FILE: whole} if whole else {}
        return found

    def load(self, directory: Path, weights_only: bool = False, universal: bool = False) -> None:
        """Read weights, and unless `weights_only` the optimizer's states, back (a collective)."""
        tag = "universal" if universal else "state"
        if universal:
            load_buffers(directory / tag, self._unwrapped)
            if self.zero == 0:
                load_full(directory / tag, self._unwrapped, self._optimizer, self.trained_names, self.moments or {})
                return
            if self.zero < 3:
                check_shardable(self._groups, self.world_size)
        # DeepSpeed takes the format from its config alone, yet the best checkpoint and the last may differ in it.
        self._engine._config.load_universal_checkpoint = universal
        # The job file's numbers, not the checkpoint's: a trial of a sweep may go on from another's with its own.
        numbers = [{k: v for k, v in g.items() if k != "params"} for g in self._optimizer.param_groups]
        # ZeRO-3 keeps its weights among the optimizer's states: the module alone would leave them as they were.
        module_only = weights_only and not universal and self.zero < 3
        with reading_back(self._engine, universal):
            path, _ = self._engine.load_checkpoint(
                str(directory), tag=tag, load_module_only=module_only, load_lr_scheduler_states=False
            )
        if path is None:
            raise TrainingError(f"{directory}: DeepSpeed found no checkpoint there; remove the directory")
        # Loading a universal ZeRO-3 checkpoint (DeepSpeed 0.19.8, load_hp_checkpoint_state_from_checkpoint_dir_stage3)
        # gives every group the first one's weight decay, and one step counter, shared, which AdamW then advances once
        # per group: both would bend the curve of a run that goes on with another number of workers.
        for group, own in zip(self._optimizer.param_groups, numbers, strict=True):
            group.update(own)
        # torch's optimizers count in a tensor beside the weights, DeepSpeed's on the CPU in an int.
        for weight, state in getattr(self._optimizer, "optimizer", self._optimizer).state.items():
            if universal and self.moments is not None:
                rename_moments(state, self.moments)
            if "step" in state:
                step = torch.as_tensor(state["step"], dtype=torch.float32).clone()
                state["step"] = int(step) if self.job.parallel.offload_optimizer else step.to(weight.device)

    def close(self) -> None:
        """Let go of hooks and buffers that would keep the model in memory: a sweep builds many in one process."""
        self._engine.destroy()
        self.remove_swap_dir()

    def remove_swap_dir(self) -> None:
        """Remove the files of offloaded states, without which there are no steps."""
        if self._swap is not None:
            self._swap.close()

    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """All weights, averaged where they are, on the CPU of rank 0, None elsewhere (a collective)."""
        with self._averaged():
            return self._gathered()

    def _gathered(self) -> dict[str, torch.Tensor] | None:
        state: dict[str, torch.Tensor] = {}
        sharded = self.zero == 3
        for name, tensor in self._unwrapped.named_parameters():
            with deepspeed.zero.GatheredParameters([tensor], enabled=sharded):
                if self.rank == 0:
                    state[name] = tensor.detach().cpu().clone()
        if self.rank != 0:
            return None
        parameters = set(dict(self._unwrapped.named_parameters(remove_duplicate=False)))
        kept = self._unwrapped.state_dict().keys() - parameters  # persistent buffers are whole on every rank
        buffers = {name: value for name, value in self._unwrapped.named_buffers() if name in kept}
        return state | {name: value.detach().cpu().clone() for name, value in buffers.items()}

    def check_sync(self, step: int) -> None:
        """Compare the weights all workers hold whole; one worker has nobody to compare with.

        Under ZeRO-3 most weights exist once, as shards, and cannot differ; the small ones kept whole are compared.

        Raises:
            WeightDivergenceError: workers train apart; names the ranks.
        """
        if self.world_size == 1:
            return
        mine = torch.from_numpy(np.frombuffer(self._digest(), dtype=np.int64).copy()).to(self.device)
        digests = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(digests, mine)
        seen = [tuple(digest.tolist()) for digest in digests]
        common = max(seen, key=seen.count)
        apart = [str(rank) for rank, digest in enumerate(seen) if digest != common]
        if apart:
            raise WeightDivergenceError(
                f"after step {step} rank {', '.join(apart)} of {self.world_size} holds other weights than the rest: "
                "the workers train apart; check that all nodes run the same versions and healthy hardware"
            )

    def _digest(self) -> bytes:
        digest = hashlib.sha256()
        for name, tensor in self._unwrapped.named_parameters():
            if self.zero == 3 and not getattr(tensor, "ds_persist", False):
                continue
            digest.update(name.encode())
            # A sum of the raw bits, weighted by position, sees any flipped bit and moves eight bytes to the CPU. In
            # pieces: as int64 a large embedding would take four times its own memory.
            bits = tensor.detach().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
            total = torch.zeros((), dtype=torch.int64, device=bits.device)
            for number, piece in enumerate(bits.flatten().split(_DIGESTED)):
                begin = number * _DIGESTED + 1
                places = torch.arange(begin, begin + len(piece), device=bits.device)
                total += (piece.to(torch.int64) * places).sum()
            digest.update(int(total.item()).to_bytes(8, "little", signed=True))
        return digest.digest()
