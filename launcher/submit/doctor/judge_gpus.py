"""Judges the GPUs: counts, memory errors, clocks held down, memory that others use. Pure; runs on the client."""

from collections.abc import Iterator, Mapping

from launcher.submit.doctor.complaints import Issue, group_issues
from launcher.submit.doctor.facts import Finding, Gpu, Imports, Node, NodeFacts
from launcher.submit.doctor.words import size

_IN_USE = 0.1  # of its memory; a desktop or a monitor takes less


def gpus(
    nodes: Mapping[str, NodeFacts], tables: Mapping[str, Node], imports: Mapping[str, Imports], wanted: bool
) -> list[Finding]:
    """Compare what Ray hands out with what torch and the driver see, and look at each GPU's health.

    Args:
        nodes: what each says of itself.
        tables: what Ray says of it.
        imports: what torch sees there.
        wanted: whether the job asks for GPUs.
    """
    complaints: list[Issue] = []
    for name, facts in nodes.items():
        if facts.gpu_error:
            remedy = "`nvidia-smi` must work on {who}: look at the driver and at the container's GPU runtime"
            complaints.append(Issue(name, "problem", "driver", facts.gpu_error, remedy))
        complaints += _count(name, facts, tables[name], imports.get(name))
        for gpu in facts.gpus:
            complaints += _gpu(name, gpu)
    if complaints:
        return group_issues("gpus", complaints)
    every = [gpu for facts in nodes.values() for gpu in facts.gpus]
    if not every and wanted:
        remedy = "add GPU nodes, start Ray where the driver is installed, or set cluster.gpus_per_worker to 0"
        return [Finding(check="gpus", level="problem", found="none, and the job asks for some", remedy=remedy)]
    kinds = ", ".join(sorted({f"{gpu.name} {size(gpu.memory_bytes)}" for gpu in every}))
    found = f"{len(every)}: {kinds}; no memory errors, no clock held down" if every else "none: trains on the CPU"
    return [Finding(check="gpus", level="ok", found=found)]


def _count(name: str, facts: NodeFacts, table: Node, imports: Imports | None) -> Iterator[Issue]:
    torch_sees = imports.torch_gpus if imports is not None else None
    if torch_sees is None or torch_sees == table.ray_gpus:
        return
    text = f"Ray hands out {table.ray_gpus:g} GPUs, torch sees {torch_sees}, nvidia-smi {len(facts.gpus)}"
    remedy = (
        "on {who}: a torch build for the CUDA driver there (torch.cuda.is_available()), and `ray start --num-gpus` of "
        "as many as there are"
    )
    yield Issue(name, "problem", "count", text, remedy)


def _gpu(name: str, gpu: Gpu) -> Iterator[Issue]:
    which = f"GPU {gpu.index} ({gpu.name})"
    if gpu.ecc_errors:
        text = f"{which} has {gpu.ecc_errors} uncorrected memory errors"
        remedy = "take {who} out of the cluster, reset the GPU (`nvidia-smi -r`), replace it if they come again"
        yield Issue(name, "problem", "ecc", text, remedy)
    if gpu.slowed_by:
        text = f"{which} is held down by {', '.join(gpu.slowed_by)}: the whole group waits for it"
        yield Issue(name, "warning", "slow", text, "look at cooling and power of {who}, or train without it")
    if gpu.memory_bytes and gpu.memory_used_bytes > _IN_USE * gpu.memory_bytes:
        text = f"{which}: {size(gpu.memory_used_bytes)} of {size(gpu.memory_bytes)} are in use already"
        yield Issue(name, "warning", "in use", text, "`nvidia-smi` on {who} shows by whom")
