"""DeepSpeed wrapped: forward, backward, optimizer step, save and load. Runs in train workers; used by `loop.py`.

Its configuration is `deepspeed_config.py`; what a checkpoint holds is in `train/checkpoint/state_dict.py`,
`train/offload/nvme.py` and `train/checkpoint/universal.py`.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.errors import ClusterError, TrainingError
from launcher.models.adapters import add_adapters, borrowed_parameters
from launcher.models.batch_norm import PartBatchNorm, add_over_ranks, convert_to_part_batch_norm, find_batch_norms
from launcher.models.layers import freeze
from launcher.models.quantization import dequantize, is_quantized, set_compute_dtype
from launcher.processes.preload import import_deepspeed
from launcher.spec.job import JobSpec
from launcher.tasks.base import Task
from launcher.tasks.samples import Batch, Outputs
from launcher.train.checkpoint.state_dict import collect_state, load_trained
from launcher.train.checkpoint.universal import MOMENTS, load_buffers, load_full, rename_moments
from launcher.train.deepspeed_config import deepspeed_config, reference_config
from launcher.train.ema import EMA, EMA_FILE
from launcher.train.flat_gradients import (
    FlatGradients,
    step_master_weights,
    undo_initial_step,
    unify_gradient_dtype,
    use_sparse_embedding_update,
)
from launcher.train.fused_tails import FusedTails
from launcher.train.offload.nvme import create_swap_dir, reading_back
from launcher.train.op_builders import prepare_op_builds
from launcher.train.param_groups import bitsandbytes_optimizer, build_param_groups, check_shardable

deepspeed = import_deepspeed()
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses  # noqa: E402

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _build(job: JobSpec, task: Task) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the model to train, and the model inside its adapters; the same one without adapters."""
    inner = task.build_model()
    if job.parallel.activation_checkpointing:
        # The reentrant variant needs an input that requires a gradient (torch/utils/checkpoint.py). With frozen
        # embeddings, or with LoRA, none does, and the layers would get no gradient.
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if job.model.quantization is not None:
        set_compute_dtype(inner, _DTYPES[job.train.precision])
    if job.model.freeze is not None:
        freeze(inner, job.model.freeze)
    model = inner if job.model.lora is None else add_adapters(inner, task.auto_model, job.model, job.seed)
    if job.train.compile:
        # In place: names and hooks stay as they are, where `torch.compile` would wrap the model in another module.
        # Dynamic, as micro-batches differ in size and length.
        model.compile(dynamic=True)
    # After `freeze`: layers whose weights are frozen keep their pretrained statistics.
    if job.model.trains_batch_norm:
        convert_to_part_batch_norm(model)
    return model, inner


def _restore_linear(zero: int) -> None:
    """Undo what a ZeRO-3 engine leaves behind in a process that trains several jobs, for a job of a lower stage.

    It replaces torch's linear function, for good, by one that rounds otherwise (DeepSpeed 0.19.8,
    runtime/zero/partition_parameters.py).
    """
    original = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if original is not None and zero < 3:
        torch.nn.functional.linear = original


class Engine:
    """One rank's part of the model and its optimizer, with the collectives between ranks.

    Args:
        job: Job with absolute paths and inferred labels.
        task: Task that builds the model.
        micro_batch: Largest micro-batch of a rank, in samples.
    """

    def __init__(self, job: JobSpec, task: Task, micro_batch: int) -> None:
        _restore_linear(job.zero_stage)
        self.job = job
        self.rank, self.world_size, self.virtual_ranks = dist.get_rank(), dist.get_world_size(), job.virtual_ranks
        has_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu")
        model, inner = _build(job, task)
        self.model = model
        """Model of transformers; under ZeRO-3 its weights are sharded between uses."""
        self._couples = task.couples
        self._batch_norms = [m for m in model.modules() if isinstance(m, PartBatchNorm)]
        for layer in self._batch_norms:
            layer.sums = torch.zeros(self.virtual_ranks, 2 * layer.num_features + 1, device=self.device)
        self._frozen_batch_norms = [m for m in find_batch_norms(model) if not isinstance(m, PartBatchNorm)]
        self.zero = job.zero_stage
        self.num_forwards = 0
        """Forward passes so far, including those of generation; the heartbeat reports them as progress."""
        # generate() of a peft model calls the inner model alone. A set: without adapters both are the same module.
        for module in {model, inner}:
            module.register_forward_pre_hook(self._count_forward)
        self.before_step: Callable[[], object] = bool
        """Called before a step changes the weights: waits until the checkpoint writer has copied them."""
        self.grad_norm: float | torch.Tensor | None = None
        """L2 norm of the last gradient before clipping; a tensor stays on its device until it is logged."""
        groups = build_param_groups(model, job.train)
        self._groups = groups
        self.trained_names = [name for group in groups for name in group.names]
        """Names of the trained parameters, in the optimizer's order."""
        trained = [weight for group in groups for weight in group.parameters]
        self._position = {id(weight): i for i, weight in enumerate(trained)}
        """Position of each trained weight in the optimizer's order, by its identity."""
        self.moments = MOMENTS.get(job.train.optimizer.type)
        """Names of the optimizer states that can be resharded for another number of workers; None if they cannot."""
        elements = sum(weight.numel() for weight in trained)
        self._swap = create_swap_dir(job.parallel.offload_path, elements // self.world_size)
        self._engine, self._optimizer = self._initialize_deepspeed(micro_batch, elements)
        # Read from DeepSpeed's optimizer, not from the model: in half precision it has replaced the weights in its
        # groups with fp32 masters (runtime/fp16/unfused_optimizer.py).
        self._stepped = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        self._flat: FlatGradients | None = None
        """Gradient sums in the order of the parts; None where DeepSpeed adds them, in another order."""
        if self.zero == 0 and job.train.precision != "fp32":
            undo_initial_step(self._optimizer)
            # Workaround, DeepSpeed 0.19.8 (runtime/fp16/unfused_optimizer.py, step): it replaces the masters' gradients
            # by those of the half-precision weights. These are None here, so it would step with zeros.
            self._optimizer.step = partial(step_master_weights, self._optimizer)
        if job.adds_in_one_order:
            self._flat = self._add_in_one_order(trained)
        self.ema = self._build_ema()
        """Moving average of the weights, if the job asks for one: used by evaluation and by `full_state_dict`."""
        self._sharded_reference: Any = None
        if task.reference_model is not None:
            # Collective under ZeRO-3. After the trained model, whose initialisation has the larger peak of memory.
            task.reference = self._build_reference(task)

    def _initialize_deepspeed(self, micro_batch: int, trained: int) -> tuple[Any, Any]:
        """Return DeepSpeed's engine and optimizer. Collective: it broadcasts the initial weights from rank 0.

        Args:
            micro_batch: Largest micro-batch of a rank, in samples.
            trained: Number of elements of all trained weights.

        Raises:
            ClusterError: This node cannot compute in the job's precision.
        """
        # DeepSpeed asks too, in words that name neither the key nor a remedy (runtime/engine.py).
        if self.job.train.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise ClusterError(
                "train.precision is fp16, which takes a GPU or a processor with AVX512-FP16, and a worker's node has "
                "neither; set train.precision: bf16 or fp32"
            )
        prepare_op_builds()
        swap = None if self._swap is None else self._swap.path
        with unify_gradient_dtype(deepspeed.DeepSpeedEngine):
            engine, optimizer, _, _ = deepspeed.initialize(
                model=self.model,
                optimizer=bitsandbytes_optimizer(self.job),
                model_parameters=[group.as_dict() for group in self._groups],
                config=deepspeed_config(self.job, micro_batch, self.world_size, trained, swap),
                # The process group exists already.
                dist_init_required=False,
            )
        if self.zero == 3 and self.job.model.lora is not None:
            for reader, parameter in borrowed_parameters(self.model):  # type: ignore[arg-type]  # a PeftModel
                deepspeed.zero.register_external_parameter(reader, parameter)
        return engine, optimizer

    def _add_in_one_order(self, trained: list[torch.nn.Parameter]) -> FlatGradients:
        """Take the addition of gradients from DeepSpeed."""
        # DeepSpeed would reduce in its `step`, through buckets (runtime/engine.py); FlatGradients needs no copy.
        self._engine.enable_backward_allreduce = False
        # Hooks that prepare the reduction of ZeRO 1 (runtime/zero/stage_1_and_2.py): they copy each gradient.
        for hook in getattr(self._optimizer, "_grad_acc_hooks", ()):
            hook.remove()
        optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        if self.device.type == "cpu" and isinstance(optimizer, torch.optim.AdamW):
            FusedTails(optimizer)
        # torch.compile cannot trace the custom embedding gradient. In half precision a dense gradient rounds rows that
        # occur twice, as it does under ZeRO 2 and 3.
        if self.device.type == "cpu" and not self.job.train.compile and self.job.train.precision == "fp32":
            use_sparse_embedding_update(self.model)
        return FlatGradients(trained, -(-self.virtual_ranks // self.world_size), self.world_size)

    def _build_reference(self, task: Task) -> torch.nn.Module:
        """Load a task's frozen model in the precision of the training, sharded under ZeRO-3."""
        reference = task.build_reference()
        # Transformers' own `to` is untyped.
        torch.nn.Module.to(reference, device=self.device, dtype=_DTYPES[self.job.train.precision])
        if self.zero < 3:
            return reference
        # Without an optimizer DeepSpeed shards the weights and gathers them in each forward pass, and does no more.
        config = reference_config(self.job)
        self._sharded_reference, *_ = deepspeed.initialize(model=reference, config=config, dist_init_required=False)
        self._sharded_reference.eval()
        sharded: torch.nn.Module = self._sharded_reference
        return sharded

    def _build_ema(self) -> EMA | None:
        if self.job.train.ema is None:
            return None
        # The model's own weights: what evaluation and export use. Without ZeRO the fp32 masters are not averaged.
        weights = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        return EMA(self.job.train.ema, weights, sharded=self.zero == 3)

    def seed(self, step: int, part: int, micro_batch: int) -> None:
        """Seed the dropout noise of a micro-batch: the same on any number of workers, and after a resume.

        Args:
            step: Number of optimizer steps completed before this one.
            part: Number of its part of the global batch.
            micro_batch: Number of the micro-batch in its part.
        """
        digest = hashlib.sha256(f"{self.job.seed}/{step}/{part}/{micro_batch}".encode()).digest()
        number = int.from_bytes(digest[:7], "little")
        # Not `torch.manual_seed`: it records a stack trace for each absent device type, 1 ms a step (torch 2.13).
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def train_mode(self) -> None:
        """Enable dropout. BatchNorm statistics stay as pretrained, unless they are trained."""
        self._engine.train()
        for layer in self._frozen_batch_norms:
            layer.eval()

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Disable dropout and gradients inside the block, and use the averaged weights if there are any."""
        self._engine.eval()
        with torch.no_grad(), self._ema_weights():
            yield
        self.train_mode()

    def _ema_weights(self) -> AbstractContextManager[None]:
        if self.ema is None:
            return nullcontext()
        return self.ema.swapped_in(self._optimizer.empty_partition_cache if self.zero == 3 else lambda: None)

    def _count_forward(self, *_: object) -> None:
        self.num_forwards += 1

    def forward(self, task: Task, batch: Batch, part: int = -1) -> Outputs:
        """Return the task's outputs for a micro-batch. Collective under ZeRO-3, which gathers weights.

        In `evaluation_mode` these are its outputs for evaluations, which may hold generated text.

        Args:
            task: Task that calls the model.
            batch: Micro-batch, or a filler.
            part: Part whose BatchNorm statistics it adds to; -1 to add to none.
        """
        for layer in self._batch_norms:
            # A micro-batch has rows or one filler, never both. The first row of a filler is -1.
            layer.part = part if batch.rows[0] >= 0 else -1
        # The model's mode: DeepSpeed's engine stays in training mode itself (0.19.8, runtime/engine.py, `eval`).
        forward = task.forward if self.model.training else task.evaluation_forward
        return forward(self._engine, batch)

    def backward(self, loss_sum: torch.Tensor, divisor: float, ends_part: bool) -> None:
        """Add the gradient of `loss_sum / divisor` to that of the step. Collective under ZeRO 2 and 3.

        Args:
            loss_sum: Sum of the sample losses of a micro-batch, scalar.
            divisor: Weight of the whole global batch (`GlobalBatch.divisor`).
            ends_part: True if it is the last micro-batch of its part.
        """
        for layer in self._batch_norms:
            # Activation checkpointing runs layers again in this pass, which must not count twice.
            layer.part = -1
        if self._flat is None:
            # DeepSpeed averages gradients over ranks, hence the factor.
            self._engine.backward(loss_sum / divisor * self.world_size, scale_wrt_gas=False)
            return
        self._flat.begin(ends_part)
        self._engine.backward(loss_sum / divisor, scale_wrt_gas=False)
        if ends_part:
            self._flat.end_part()

    @property
    def saves_from_files(self) -> bool:
        """Return True if `local_state` is memory-mapped from files: copying it would load all of it."""
        return self._swap is not None

    @property
    def can_retry_step(self) -> bool:
        """Return True if a step can be repeated before `step`: no gradient has been exchanged or offloaded yet."""
        # A coupled loss gathers outputs in the middle of the step, where the other ranks already wait.
        is_local = (self.zero == 1 or self._flat is not None) and not self._couples
        return is_local and not self.job.parallel.offload_optimizer

    def reset_gradients(self) -> None:
        """Discard the gradients of an aborted step; requires `can_retry_step`."""
        for layer in self._batch_norms:
            assert layer.sums is not None
            layer.sums.zero_()
        self._engine.zero_grad()
        if self._flat is not None:
            self._flat.clear()
        # DeepSpeed counts backward passes for its number of samples (runtime/engine.py); aborted ones do not count.
        self._engine._unmanaged_backward_count = 0
        if self.zero == 1:
            # DeepSpeed 0.19.8 is still "inside backward" after an aborted pass (runtime/base_optimizer.py).
            self._optimizer.zero_grad()
            self._optimizer._backward_active_depth = self._optimizer._remaining_grad_acc_hooks = 0
            self._optimizer._backward_hook_state.reset_for_new_step()
            self._optimizer._release_ipg_buffers()

    def step(self, learning_rate: float, step: int) -> None:
        """Reduce, clip and apply the accumulated gradient. Collective.

        Args:
            learning_rate: Learning rate of this step.
            step: Number of optimizer steps completed before this one.
        """
        # The checkpoint writer copies weights and states during forward and backward passes. The step changes both in
        # place, so it must not begin before the copy has ended.
        self.before_step()
        add_over_ranks(self._batch_norms)
        for layer in self._batch_norms:
            layer.move_running_statistics()
        self._apply(learning_rate)
        if self.ema is not None:
            self.ema.update(step + 1)

    def _apply(self, learning_rate: float) -> None:
        # DeepSpeed has no scheduler here: the rate is a function of the step alone, so a resume needs no scheduler
        # state. Groups are paired by position; DeepSpeed keeps their order and drops empty ones, which are never built.
        for group, own in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["lr"] = learning_rate * own.scale
        if self._flat is None:
            # Collective: finishes the reduction of the gradients, agrees on the norm, and gathers updated weights.
            self._engine.step()
            self.grad_norm = self._engine.get_global_grad_norm()
            return
        self._flat.finish()
        # Collective, and the only exchange of gradients in the step. Before clipping: the norm must be that of the
        # whole gradient, or each rank would scale by another factor.
        self._flat.all_reduce()
        self.grad_norm = self._flat.clip(self.job.train.max_grad_norm)
        if self.zero:
            self._hand_over(self._flat.views)
        else:
            for weight, gradient in zip(self._stepped, self._flat.views, strict=True):
                weight.grad = gradient
        self._engine.step()

    def _hand_over(self, gradients: list[torch.Tensor]) -> None:
        """Give the optimizer of ZeRO 1 this rank's share of the complete gradient, as its own reduction would."""
        optimizer = self._optimizer
        for i, owned in enumerate(optimizer.params_in_partition):
            optimizer.all_grad_tensors[i] = [gradients[self._position[id(weight)]] for weight in owned]
            optimizer.averaged_gradients[i] = optimizer.get_flat_partition(
                owned,
                optimizer.first_offset[i],
                optimizer.partition_size[i],
                dtype=torch.float32,
                device=self.device,
                param_group_idx=i,
                return_tensor_list=True,
            )

    def local_state(self) -> dict[str, object]:
        """Return what this rank saves, by file name: the live tensors, not copies. Collective."""
        state = collect_state(self._engine)
        if self.ema is not None:
            # On all ranks, although only rank 0 gets the averages: gathering shards is collective.
            averages = self.ema.full_weights()
            state |= {EMA_FILE: averages} if averages else {}
        return state

    def load(self, directory: Path, weights_only: bool = False, universal: bool = False) -> None:
        """Load a checkpoint. Collective.

        Args:
            directory: Local directory with the files of the checkpoint.
            weights_only: True to leave out the optimizer states.
            universal: True if the files are in DeepSpeed's universal format, for another number of workers.

        Raises:
            TrainingError: DeepSpeed finds no checkpoint there.
        """
        tag = "universal" if universal else "state"
        if universal:
            load_buffers(directory / tag, self.model)
            if self.zero == 0:
                load_full(directory / tag, self.model, self._optimizer, self.trained_names, self.moments or {})
                return
            if self.zero < 3:
                # Fails on all ranks alike. DeepSpeed would fail only on ranks with an empty shard.
                check_shardable(self._groups, self.world_size)
        # DeepSpeed reads the format from its config, but the best checkpoint and the last one may differ in it.
        self._engine._config.load_universal_checkpoint = universal
        # Hyperparameters come from the job, not the checkpoint: a pbt trial resumes from another trial's checkpoint.
        hyperparameters = [{k: v for k, v in g.items() if k != "params"} for g in self._optimizer.param_groups]
        # With ZeRO 1 `FlatGradients` clips and DeepSpeed does not, with ZeRO 2 DeepSpeed does.
        clip_grad = getattr(self._optimizer, "clip_grad", None)
        # ZeRO-3 keeps the weights among the optimizer states: loading the module alone would not change them.
        module_only = weights_only and not universal and self.zero < 3
        with reading_back(self._engine, universal):
            path, _ = self._engine.load_checkpoint(
                str(directory),
                tag=tag,
                load_module_only=module_only,
                load_lr_scheduler_states=False,
                custom_load_fn=load_trained,
            )
        if path is None:
            raise TrainingError(f"{directory}: DeepSpeed found no checkpoint there; remove the directory")
        # Loading a universal ZeRO-3 checkpoint (DeepSpeed 0.19.8, load_hp_checkpoint_state_from_checkpoint_dir_stage3)
        # gives every group the first one's weight decay, and one step counter, shared, which AdamW then advances once
        # per group: both would change the curve of a run that resumes with another number of workers.
        for group, own in zip(self._optimizer.param_groups, hyperparameters, strict=True):
            group.update(own)
        if clip_grad is not None:
            self._optimizer.clip_grad = clip_grad
        # torch's optimizers count steps in a tensor on the device of the weights, DeepSpeed's CPU Adam in an int.
        for weight, state in getattr(self._optimizer, "optimizer", self._optimizer).state.items():
            if universal and self.moments is not None:
                rename_moments(state, self.moments)
            if "step" in state:
                step = torch.as_tensor(state["step"], dtype=torch.float32).clone()
                state["step"] = int(step) if self.job.parallel.offload_optimizer else step.to(weight.device)

    def close(self) -> None:
        """Remove hooks and buffers that would keep the model in memory: a sweep builds many in one process."""
        self._engine.destroy()
        if self._sharded_reference is not None:
            self._sharded_reference.destroy()
        self.remove_swap_dir()

    def remove_swap_dir(self) -> None:
        """Remove the files of offloaded states; no step is possible afterwards."""
        if self._swap is not None:
            self._swap.close()

    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """Return all weights (the averages, if there are any) on the CPU of rank 0, None on other ranks. Collective."""
        with self._ema_weights():
            return self._gather_weights()

    def _gather_weights(self) -> dict[str, torch.Tensor] | None:
        state: dict[str, torch.Tensor] = {}
        is_sharded = self.zero == 3
        for name, tensor in self.model.named_parameters():
            # Collective under ZeRO-3. One weight at a time: a device holds one whole weight, and only rank 0's host
            # memory all of them. All ranks must iterate in the same order.
            with deepspeed.zero.GatheredParameters([tensor], enabled=is_sharded):
                if self.rank == 0:
                    owner = name.rpartition(".")[0]
                    whole = dequantize(self.model.get_submodule(owner)) if is_quantized(tensor) else tensor
                    # A clone: on a CPU, `cpu()` returns the live storage, where the training weights are swapped in.
                    state[name] = whole.detach().cpu().clone()
        if self.rank != 0:
            return None
        parameters = set(dict(self.model.named_parameters(remove_duplicate=False)))
        # Buffers are replicated on every rank. `named_buffers` also lists those that are not saved (persistent=False).
        persistent = self.model.state_dict().keys() - parameters
        buffers = {name: value for name, value in self.model.named_buffers() if name in persistent}
        return state | {name: value.detach().cpu().clone() for name, value in buffers.items()}
