"""Class of the hardware that a worker computes on: machines of one class give the same bits. Runs in train workers."""

import platform
from pathlib import Path

import torch


def describe_hardware(device: torch.device) -> str:
    """Return the name of a GPU, or the CPU's model and the vector extension that torch's kernels use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # ATEN_CPU_CAPABILITY lowers the extension, so the model alone does not tell it.
    return f"{_read_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"


def _read_cpu_model() -> str:
    # `platform.processor` is empty on most Linux systems, and the file exists on Linux alone.
    source = Path("/proc/cpuinfo")
    lines = source.read_text(encoding="utf-8").splitlines() if source.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
