"""The job file as a DeepSpeed configuration: pure, and complete.

DeepSpeed fills what its config does not say with values of its own (it clips gradients at 1.0, for one), so every
value the result depends on is written out. Runs in train workers; `engine.py` passes it on.
"""

from pathlib import Path

from launcher.spec.job import JobSpec

# Numbers of 4 bytes a weight has while its group is off the disk, DeepSpeed's own (offload_optimizer.buffer_count).
_SWAP_BUFFERS = 4
SUB_GROUP = 100_000_000
"""Weights of a worker that ZeRO-3 updates at once: what is offloaded to a disk passes through buffers of this size."""


def swap_buffers(elements: int) -> int:
    """Bytes of locked memory that offloaded states pass through.

    Args:
        elements: of the trained weights that are this worker's.
    """
    return _SWAP_BUFFERS * 4 * min(elements, SUB_GROUP)


def deepspeed_config(
    job: JobSpec, micro_batch: int, world_size: int, trained: int, swap: Path | None = None
) -> dict[str, object]:
    """The configuration for `deepspeed.initialize`.

    Args:
        job: the resolved job.
        micro_batch: largest micro-batch of a worker; informs DeepSpeed's own counters only.
        world_size: train workers.
        trained: elements of all trained parameters.
        swap: this worker's own directory on a disk, where the job offloads to one.
    """
    precision = job.train.precision
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch * world_size,
        # The loop says when a global batch is whole; its number of micro-batches may differ from step to step.
        "managed_gradient_accumulation": False,
        "steps_per_print": None,
        # Without ZeRO `flat_gradients.py` clips.
        "gradient_clipping": job.train.max_grad_norm or 0.0 if job.zero_stage else 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        # Gradients are exchanged, and those of micro-batches added, in fp32: in half precision a sum of many loses the
        # small ones. DeepSpeed has it with ZeRO alone; without, `flat_gradients.py` adds them.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32" if job.zero_stage or precision == "fp32" else None},
        **_optimizer(job),
        "zero_optimization": _zero(job, trained, swap),
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "zero_allow_untested_optimizer": job.train.optimizer.type in ("sgd", "adamw_8bit"),  # tested by us
        "wall_clock_breakdown": False,
    }


def _optimizer(job: JobSpec) -> dict[str, object]:
    """By its name in torch.optim; nothing where `engine.py` builds it, from what is not torch's."""
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
    # torch's AdamW needs no compiled kernel; offloaded states are updated by DeepSpeed's CPU kernel.
    kernel = {} if job.parallel.offload_optimizer else {"torch_adam": True, "fused": True}
    return {"optimizer": {"type": "AdamW", "params": params | kernel}}


def reduce_bucket(trained: int) -> int:
    """Elements of the buffer that gradients are reduced in.

    DeepSpeed allocates it whole, 2 GB of fp32 by its own default however small the model is. A bucket that holds all
    gradients is filled and reduced just as that one.
    """
    return max(1, min(trained, 500_000_000))


def _zero(job: JobSpec, trained: int, swap: Path | None) -> dict[str, object]:
    parallel = job.parallel
    section: dict[str, object] = {
        "stage": job.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        # Gloo reduces to one rank at a time where NCCL scatters; a plain all-reduce takes half the time there.
        "reduce_scatter": job.cluster.gpus_per_worker > 0,
        "round_robin_gradients": False,
        "reduce_bucket_size": reduce_bucket(trained),
    }
    if job.zero_stage == 3:
        section["sub_group_size"] = SUB_GROUP
    if parallel.offload_optimizer:
        place = {"device": "cpu"} if swap is None else {"device": "nvme", "nvme_path": str(swap)}
        section["offload_optimizer"] = {**place, "pin_memory": job.cluster.gpus_per_worker > 0}
    if parallel.offload_parameters:
        section["offload_param"] = {"device": "cpu", "pin_memory": job.cluster.gpus_per_worker > 0}
    return section
