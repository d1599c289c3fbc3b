"""DeepSpeed configuration of a job: pure functions. Runs in train workers; `engine.py` passes it to DeepSpeed.

DeepSpeed has defaults that change the result (it clips gradients at 1.0, for example), so every value that the result
depends on is written out.
"""

from pathlib import Path

from launcher.spec.job import JobSpec

# DeepSpeed's default of offload_optimizer.buffer_count: fp32 buffers per sub-group while it is not on the disk.
_SWAP_BUFFERS = 4
_SUB_GROUP = 100_000_000
"""Weights of a worker that ZeRO-3 updates at once; states on a disk pass through buffers of this size."""
_MAX_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default


def swap_buffer_bytes(elements: int) -> int:
    """Return the bytes of locked memory that states on a disk pass through.

    Args:
        elements: Number of trained weights in a worker's shard.
    """
    return _SWAP_BUFFERS * 4 * min(elements, _SUB_GROUP)


def deepspeed_config(
    job: JobSpec, micro_batch: int, world_size: int, trained: int, swap: Path | None = None
) -> dict[str, object]:
    """Return the configuration for `deepspeed.initialize`.

    Args:
        job: Resolved job.
        micro_batch: Largest micro-batch of a worker; only DeepSpeed's own counters use it.
        world_size: Number of train workers.
        trained: Number of elements of all trained parameters.
        swap: Directory for this worker's offloaded states; None if the job does not offload to a disk.
    """
    precision = job.train.precision
    return {
        # DeepSpeed asserts that the batch size is micro-batch * accumulation * ranks (runtime/config.py).
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch * world_size,
        # `engine.step` ends a global batch, whose number of micro-batches may differ from step to step.
        "managed_gradient_accumulation": False,
        "steps_per_print": None,
        # `flat_gradients.py` clips what it adds.
        "gradient_clipping": 0.0 if job.adds_in_one_order else job.train.max_grad_norm or 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        # Gradients are exchanged and accumulated in fp32: a long sum in half precision loses small terms. DeepSpeed
        # supports this with ZeRO only; without ZeRO, `flat_gradients.py` accumulates them.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32" if job.zero_stage or precision == "fp32" else None},
        **_optimizer(job),
        "zero_optimization": _zero(job, trained, swap),
        "bf16": {"enabled": precision == "bf16"},
        # A loss scale of 0 is a dynamic one. It starts at 2**16 and comes down by overflows, whose steps are skipped.
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        # DeepSpeed refuses optimizers that it has not tested with ZeRO; tests/train covers both.
        "zero_allow_untested_optimizer": job.train.optimizer.type in ("sgd", "adamw_8bit"),
        "wall_clock_breakdown": False,
    }


def reference_config(job: JobSpec) -> dict[str, object]:
    """Return the configuration that shards a frozen model by ZeRO-3, without an optimizer."""
    zero = _zero(job, 0, None)
    return {
        # DeepSpeed refuses a configuration without it; nothing depends on its value.
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "zero_optimization": {key: value for key, value in zero.items() if key != "offload_optimizer"},
        "bf16": {"enabled": job.train.precision == "bf16"},
        "fp16": {"enabled": job.train.precision == "fp16"},
    }


def _optimizer(job: JobSpec) -> dict[str, object]:
    """Return the section of an optimizer of torch.optim; {} if `engine.py` builds it (`bitsandbytes_optimizer`)."""
    chosen = job.train.optimizer
    params: dict[str, object] = {"lr": job.train.learning_rate, "weight_decay": chosen.weight_decay}
    if chosen.type == "adamw_8bit":
        return {}
    if chosen.type == "sgd":
        params |= {"momentum": chosen.momentum, "nesterov": chosen.nesterov, "dampening": 0.0}
        return {"optimizer": {"type": "SGD", "params": params}}
    if chosen.type == "adafactor":
        params |= {"beta2_decay": chosen.beta2_decay, "d": chosen.clip_threshold, "eps": [None, chosen.min_scale]}
        return {"optimizer": {"type": "Adafactor", "params": params}}
    params |= {"betas": [chosen.beta1, chosen.beta2], "eps": chosen.eps, "adam_w_mode": True}
    # torch's fused AdamW needs no compilation; offloaded states need DeepSpeed's CPU kernel, which is compiled once.
    kernel = {} if job.parallel.offload_optimizer else {"torch_adam": True, "fused": True}
    return {"optimizer": {"type": "AdamW", "params": params | kernel}}


def _zero(job: JobSpec, trained: int, swap: Path | None) -> dict[str, object]:
    parallel = job.parallel
    section: dict[str, object] = {
        "stage": job.zero_stage,
        # DeepSpeed's default depends on the stage: it overlaps under stage 3 only (runtime/zero/config.py). Stage 1
        # refuses to, with accumulation that DeepSpeed does not manage (runtime/engine.py).
        "overlap_comm": False,
        "contiguous_gradients": True,
        # With Gloo, DeepSpeed reduces to one rank at a time where NCCL scatters; an all-reduce takes half the time.
        "reduce_scatter": job.cluster.gpus_per_worker > 0,
        "round_robin_gradients": False,
        # DeepSpeed allocates the whole bucket, by default 2 GB in fp32 even for a small model. A bucket that holds all
        # gradients is filled and reduced in the same way.
        "reduce_bucket_size": max(1, min(trained, _MAX_BUCKET_ELEMENTS)),
    }
    if job.zero_stage == 3:
        # DeepSpeed's default is ten times this, and so would be the buffers of states on a disk.
        section["sub_group_size"] = _SUB_GROUP
    if parallel.offload_optimizer:
        # Pinned memory needs CUDA: a worker without a GPU cannot allocate it.
        device = {"device": "cpu"} if swap is None else {"device": "nvme", "nvme_path": str(swap)}
        section["offload_optimizer"] = {**device, "pin_memory": job.cluster.gpus_per_worker > 0}
    if parallel.offload_parameters:
        section["offload_param"] = {"device": "cpu", "pin_memory": job.cluster.gpus_per_worker > 0}
    return section
