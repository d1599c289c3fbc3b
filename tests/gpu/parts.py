"""The parts of the GPU checks. Each is a function that emits rows of the table as it goes; `run.py` gives it a process.

A part that fails, or takes too long, costs its own remaining rows only. What a part compares, it trains itself.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import HERE, Bench, Trained, largest_difference, last_words, note_failure, train
from workload import BERT, LARGE, LONG_TEXTS, PICTURES, TEXTS, VIT, mean_words, with_attention

_GIB = 2**30


@dataclass
class Report:
    """Where a part emits its rows.

    Args:
        bench: Where and on what device the part runs.
        write: Writes one row: what was checked, its figure, and whether it passed (None: a figure alone).
    """

    bench: Bench
    write: Callable[[str, str, bool | None], None]

    @contextmanager
    def row(self, what: str) -> Iterator[None]:
        """Turn an error inside the block into a failed row, so that the part continues with its next one."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # a row of the table, whatever went wrong
            note_failure(self.bench.folder, what, traceback.format_exc())
            self.write(what, f"{type(error).__name__}: {last_words(str(error))}", False)


def facts(report: Report) -> None:
    """Measure the ceilings of the device: a large matrix product, and a copy in its memory."""
    import torch

    size, repeats = (8192, 10) if report.bench.gpu else (1024, 3)
    device = "cuda" if report.bench.gpu else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty((4 if report.bench.gpu else 1) * 2**26, device=device, dtype=torch.float32)
    other = torch.empty_like(big)
    product_s = _seconds(lambda: a @ b, repeats, device)
    copy_s = _seconds(lambda: other.copy_(big), repeats, device)
    report.write(f"bf16 matrix product {size} x {size}", f"{2 * size**3 / product_s / 1e12:.3g} TFLOP/s", None)
    report.write("copy in memory, read and written", f"{2 * big.nbytes / copy_s / 1e9:.3g} GB/s", None)


def _seconds(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Return the median seconds of a call, by events on a GPU."""
    import statistics
    import time

    import torch

    taken = []
    for number in range(repeats + 3):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            seconds = begin.elapsed_time(end) / 1000
        else:
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
        if number >= 3:  # the first ones load kernels
            taken.append(seconds)
    return statistics.median(taken)


def precision(report: Report) -> None:
    """Train in fp32, bf16 and fp16 under Ray Train, one rank (NCCL on a GPU), and compare the curves."""
    bench = report.bench
    plain: Trained | None = None
    # The fp16 run's first steps may be skipped while its loss scale is found, so it is held to falling alone.
    for kind, tolerance in {"fp32": 0.0, "bf16": 0.05, "fp16": None}.items():
        with report.row(f"{kind}, 1 rank"):
            run = train(bench.job(f"precision-{kind}", train={"precision": kind}, parallel={"zero": 2}))
            plain = plain or run
            apart = largest_difference(run, plain)
            falls = run.losses[-1] < run.losses[0]
            report.write(
                f"{kind}, 1 rank, ZeRO-2",
                f"loss {run.losses[0]:.3f} to {run.losses[-1]:.3f}, {apart:.1e} from fp32",
                falls and (tolerance is None or apart <= tolerance),
            )


def ranks(report: Report) -> None:
    """Train with two ranks and compare with one; on a GPU they share it, over NCCL where that is allowed, and gloo."""
    bench = report.bench
    whole = train(bench.job("ranks-1", parallel={"zero": 0}))
    shared = {"workers": 2, "gpus_per_worker": 0.5 if bench.gpu else 0, "cpus_per_worker": 0.5}
    if bench.gpu:
        multi = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}  # of NCCL 2.29 and later; those before refuse
        with report.row("2 ranks on one GPU, NCCL"):
            cluster = {**shared, "pass_env": list(multi)}
            run = train(bench.job("ranks-2-nccl", cluster=cluster, parallel={"zero": 0}), environment=multi)
            _compare(report, "2 ranks on one GPU, NCCL, ZeRO-0", run, whole)
    for zero in (0, 2, 3) if bench.gpu else (0,):
        with report.row(f"2 ranks, gloo, ZeRO-{zero}"):
            job = bench.job(f"ranks-2-gloo-{zero}", cluster=shared, parallel={"zero": zero})
            entry = (str(HERE / "over_gloo.py"),) if bench.gpu else ("-m", "launcher")
            _compare(report, f"2 ranks, gloo, ZeRO-{zero}", train(job, entry=entry), whole)


def _compare(report: Report, what: str, run: Trained, reference: Trained, tolerance: float = 1e-5) -> None:
    apart = largest_difference(run, reference)
    report.write(what, f"{apart:.1e} apart over {len(run.losses)} steps", apart <= tolerance)


def fork_server(report: Report) -> None:
    """Train with workers forked from one server and with workers that import by themselves: the same bits."""
    bench = report.bench
    has_server = importlib.util.find_spec("launcher.processes.fork_server") is not None
    runs = {}
    # A folder of Ray's logs for this part alone; its path must be short, as sockets are in it.
    with tempfile.TemporaryDirectory(prefix="fork-", dir="/tmp", ignore_cleanup_errors=True) as logs:
        for name, environment in {"off": {"LAUNCHER_FORK_SERVER": "0"}, "on": {"RAY_TMPDIR": logs}}.items():
            job = bench.job(f"fork-{name}", train={"deterministic": True})
            runs[name] = train(job, environment=environment)
            report.write(f"fork server {name}", f"{runs[name].seconds:.1f} s for the whole command", None)
        errors = [path.read_text(encoding="utf-8", errors="replace") for path in Path(logs).rglob("raylet.err")]
    # A worker that cannot be forked starts as a plain process, and says so there.
    plain = sum(text.count("without the fork server") for text in errors)
    same = runs["on"].losses == runs["off"].losses
    used = f"{plain} workers were not forked" if errors and has_server else "whether workers were forked is not known"
    figure = f"{'the same bits' if same else 'differ'}; {used}"
    report.write("curves with and without", figure, same and has_server and not plain)


def zero(report: Report) -> None:
    """Train under ZeRO 0 to 3, with states and weights offloaded to the CPU, and compare the curves."""
    bench = report.bench
    # Two ranks on a CPU, so that there is something to shard; one on a GPU, where `ranks` has the two.
    cluster = {} if bench.gpu else {"workers": 2, "cpus_per_worker": 0.5}
    optimizer, parameters = {"offload_optimizer": True}, {"offload_parameters": True}
    cases: list[dict[str, Any]] = [{"zero": 0}, {"zero": 2, **optimizer}, {"zero": 3, **optimizer, **parameters}]
    if bench.gpu:
        plain = [{"zero": stage} for stage in range(4)]
        cases = [*plain, {"zero": 1, **optimizer}, *cases[1:], {"zero": 3, **parameters}]
    reference: Trained | None = None
    for number, parallel in enumerate(cases):
        what = ", ".join([f"ZeRO-{parallel['zero']}", *(key.replace("_", " ") for key in list(parallel)[1:])])
        with report.row(what):
            run = train(bench.job(f"zero-{number}", cluster=cluster, parallel=parallel))
            reference = reference or run
            # DeepSpeed's CPU optimizer rounds otherwise than torch's on a GPU.
            _compare(report, what, run, reference, tolerance=1e-4)


def packing(report: Report) -> None:
    """Train packed and padded in fp32, where torch picks the attention kernel, and compare the curves."""
    bench = report.bench
    with report.row("packed and padded"):
        padded, packed = (
            train(bench.job(f"packing-{packing}", task={"packing": packing}, parallel={"zero": 0}))
            for packing in (False, True)
        )
        _compare(report, "packed beside padded, sdpa, fp32", packed, padded, tolerance=1e-4)


def memory(report: Report) -> None:
    """Compare the memory plan with the peak of the device's allocator; on a CPU, only that both are there."""
    bench = report.bench
    label = {"type": "text-classification", "text": "text", "label": "label"}
    small = {"batch_size": 32 if bench.gpu else 16, "max_steps": 4}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "BERT with dropout, fp32, ZeRO-0": (BERT, {"task": label, "train": small, "parallel": {"zero": 0}}),
        "Llama, bf16, ZeRO-2": (LARGE, {"train": {**small, "precision": "bf16"}, "parallel": {"zero": 2}}),
    }
    if bench.gpu:
        pieces = {"zero": 1, "micro_batch": 8}
        cases |= {
            "Llama, fp32, ZeRO-1, micro-batches": (LARGE, {"train": small, "parallel": pieces}),
            "Llama, bf16, ZeRO-3, activation checkpointing": (
                LARGE,
                {
                    "train": {**small, "precision": "bf16"},
                    "parallel": {"zero": 3, "activation_checkpointing": True},
                },
            ),
            "Llama, bf16, LoRA, ZeRO-2": (
                LARGE,
                {"train": {**small, "precision": "bf16"}, "parallel": {"zero": 2}, "model": {"lora": {"rank": 16}}},
            ),
        }
    for number, (what, (model, sections)) in enumerate(cases.items()):
        with report.row(what):
            run = train(_with_task(bench, f"memory-{number}", model, sections))
            _memory_row(report, what, run)


def _with_task(bench: Bench, name: str, model: str, sections: dict[str, Any]) -> dict[str, Any]:
    """Return a job whose task may be of another type, and then keeps only `max_length` of the default's keys."""
    job = bench.job(name, model, **{key: values for key, values in sections.items() if key != "task"})
    task = sections.get("task")
    if task is not None:
        job["task"] = {**task, "max_length": job["task"]["max_length"]}
    return job


def _memory_row(report: Report, what: str, run: Trained) -> None:
    predicted, used = run.memory()
    if predicted is None or not used:
        report.write(f"memory, {what}", "not measured", False)
        return
    figure = f"predicted {predicted / _GIB:.2f} GiB, "
    if report.bench.gpu:
        figure += f"used {used / _GIB:.2f} GiB ({predicted / used - 1:+.0%})"
        report.write(f"memory, {what}", figure, 0.95 <= predicted / used <= 1.3)
    else:
        # Libraries are most of what a process with a tiny model grows by.
        report.write(f"memory, {what}", f"{figure}the process grew by {used / _GIB:.2f} GiB", None)


def throughput(report: Report) -> None:
    """Measure real tokens per second of full fine-tuning and of LoRA, and those of transformers' Trainer."""
    bench = report.bench
    warm, steps, batch = (32, 128, 128) if bench.gpu else (8, 32, 16)
    words = mean_words(bench.folder / TEXTS)
    kind = "bf16" if bench.gpu else "fp32"
    for name, model in {"full": {}, "LoRA": {"lora": {"rank": 16}}}.items():
        speeds = {}
        with report.row(f"tokens/s, {name}"):
            numbers = {"max_steps": steps, "batch_size": batch, "learning_rate": 2e-4, "log_every_steps": warm}
            run = train(
                bench.job(
                    f"throughput-{name}",
                    LARGE,
                    model=model,
                    # Batches of like mean length, so that samples stand for tokens; packing leaves no padding anyway.
                    data={"group_by_length": False},
                    train={**numbers, "precision": kind},
                    checkpoint={"background": False},
                )
            )
            speeds["ours"] = run.samples_per_s(warm) * words
            report.write(f"tokens/s, {name}, ours (packed)", f"{speeds['ours']:,.0f}", None)
            report.write(f"data wait, {name}", f"{run.data_wait():.1%} of the time", run.data_wait() < 0.05)
            _memory_row(report, f"{name} fine-tuning", run)
        with report.row(f"tokens/s, {name}, Trainer"):
            command = [sys.executable, str(HERE / "trainer.py"), f"--folder={bench.folder}", f"--steps={steps}"]
            command += [f"--warm={warm}", f"--batch={batch}", *(["--gpu"] if bench.gpu else [])]
            command += ["--lora"] if model else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(last_words(done.stderr))
            speeds["trainer"] = json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_s"]
            report.write(f"tokens/s, {name}, Trainer (grouped by length)", f"{speeds['trainer']:,.0f}", None)
        if len(speeds) == 2:
            ratio = speeds["ours"] / speeds["trainer"]
            report.write(f"tokens/s over Trainer's, {name}", f"{ratio:.2f}", None)


def attention(report: Report) -> None:
    """Train packed with each attention: torch's sdpa, variable lengths, flex and flash; the same curve, and its speed.

    On a CPU, which has none of the last three, the logits of the variable-length one over a plain kernel.
    """
    bench = report.bench
    if not bench.gpu:
        _varlen_logits(report)
        return
    warm, steps = 16, 48
    reference: Trained | None = None
    for kind in ("sdpa", "varlen", "flash_attention_2", "flex_attention"):
        if kind == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            report.write(f"{kind}, packed, bf16", "flash_attn is not installed", None)
            continue
        with report.row(f"{kind}, packed, bf16"):
            task = {"type": "gpu_tasks:VarlenLM"} if kind == "varlen" else {}
            numbers = {"max_steps": steps, "batch_size": 128, "precision": "bf16", "log_every_steps": warm}
            model = with_attention(bench.folder / LARGE, kind)
            run = train(bench.job(f"attention-{kind}", model, task=task, train=numbers, parallel={"zero": 2}))
            reference = reference or run
            apart = largest_difference(run, reference)
            speed = run.samples_per_s(warm) * mean_words(bench.folder / TEXTS)
            # Length groups differ between windows, not between kinds, so the speeds compare with each other alone.
            figure = f"{speed:,.0f} tokens/s, {apart:.1e} from sdpa"
            report.write(f"{kind}, packed, bf16", figure, apart <= 0.05)


def _varlen_logits(report: Report) -> None:
    """Compare logits of a packed batch: sdpa with transformers' mask, and `gpu_tasks.varlen_attention`."""
    import gpu_tasks  # noqa: F401  # registers `varlen`
    import torch
    import torch.nn.attention.varlen as varlen
    from transformers import AutoModelForCausalLM

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, *_: Any, **given: Any) -> Any:
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x[begin:end].transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=given["scale"]
            ).transpose(0, 1)
            for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]
        return torch.cat(parts)

    varlen.varlen_attn = plain  # the real one is a CUDA kernel
    places = torch.cat([torch.arange(n) for n in (5, 9, 2)] * 2).reshape(2, 16)
    ids = torch.randint(3, 200, places.shape)
    logits = {}
    for kind in ("sdpa", "varlen"):
        model = AutoModelForCausalLM.from_pretrained(with_attention(report.bench.folder / LARGE, kind))
        assert model.config._attn_implementation == kind
        with torch.no_grad():
            logits[kind] = model(input_ids=ids, position_ids=places, use_cache=False).logits
    apart = float((logits["sdpa"] - logits["varlen"]).abs().max())
    report.write("varlen's bounds over a plain kernel, logits beside sdpa's", f"{apart:.1e} apart", apart < 1e-5)


def compiled(report: Report) -> None:
    """Train with and without `train.compile`, and compare curve and speed."""
    bench = report.bench
    warm, steps = (32, 64) if bench.gpu else (4, 12)
    kind, tolerance = ("bf16", 0.05) if bench.gpu else ("fp32", 1e-4)
    runs = {}
    for compile in (False, True):
        numbers = {"max_steps": steps, "precision": kind, "log_every_steps": warm, "compile": compile}
        numbers["batch_size"] = 64 if bench.gpu else 16
        runs[compile] = train(bench.job(f"compile-{compile}", LARGE, train=numbers, parallel={"zero": 1}))
    apart = largest_difference(runs[True], runs[False])
    report.write(f"compiled beside plain, {kind}", f"{apart:.1e} apart", apart <= tolerance)
    speeds = {name: run.samples_per_s(warm) for name, run in runs.items()}
    longer = runs[True].seconds - runs[False].seconds
    report.write(
        "speed of compiled steps", f"{speeds[True] / speeds[False]:.2f} of plain; {longer:+.0f} s for the command", None
    )


def resume(report: Report) -> None:
    """Kill a worker, then stop the command and run it again: the undisturbed curve, bit by bit."""
    bench = report.bench
    # Long enough that the driver hears of step 6 before the last one is done.
    sections = {
        "train": {"deterministic": True, "max_steps": 180},
        "parallel": {"zero": 2},
        "checkpoint": {"every_steps": 20},
        "fault_tolerance": {"max_failures": 2},
    }
    plain = train(bench.job("resume-plain", **sections))
    with report.row("a killed worker"):
        run = train(bench.job("resume-killed", **sections), ("--chaos", "kill=0@step26"))
        same = run.losses == plain.losses
        apart = largest_difference(run, plain)
        figure = "the same bits" if same else f"{apart:.1e} apart"
        report.write("a worker killed after step 26", f"{figure}, {run.seconds - plain.seconds:+.1f} s", same)
    with report.row("a stopped command"):
        job = bench.job("resume-stopped", **sections)
        stopped = train(job, ("--chaos", "term=driver@step6"), exit_codes=(130,))
        run = train(job, resume=True)
        same = run.losses == plain.losses
        figure = "the same bits" if same else f"{largest_difference(run, plain):.1e} apart"
        at = max(stopped.steps)
        report.write("a command stopped by SIGTERM, run again", f"{figure}, stopped after step {at}", same)


def out_of_memory(report: Report) -> None:
    """Let memory run out in a step: the micro-batch is halved, in place and with a restart, on the same curve.

    On a GPU the allocator gets a fraction of the device; on a CPU the task says that memory ran out.
    """
    bench = report.bench
    tight: dict[str, str] = {}
    sections: dict[str, Any] = {"checkpoint": {"every_steps": 4}, "fault_tolerance": {"max_failures": 1}}
    batch = 16
    if bench.gpu:
        import torch

        # Logits of 4,096 words in fp32 are 16 MiB for each sequence of 1,024: 256 of them need several times 4 GiB.
        batch = 256
        fraction = 4 * _GIB / torch.cuda.get_device_properties(0).total_memory
        tight = {"PYTORCH_CUDA_ALLOC_CONF": f"per_process_memory_fraction:{fraction:.4f}"}
        sections["data"] = {"train": str(bench.folder / LONG_TEXTS)}
    else:
        sections["task"] = {"type": "gpu_tasks:TightLM"}
    # 256 sequences of 1,024 tokens are 4 steps of the long texts.
    sections["train"] = {"batch_size": batch, "max_steps": 4 if bench.gpu else 6, "epochs": 1}
    fits = {"zero": 0, "micro_batch": 8 if bench.gpu else 2}
    plain = train(bench.job("oom-fits", **{**sections, "parallel": fits}))
    for stage, how in {0: "in place", 2: "with a restart"}.items():
        with report.row(f"ZeRO-{stage}, {how}"):
            cluster = {"pass_env": list(tight)} if tight else {}
            job = bench.job(f"oom-{stage}", **{**sections, "parallel": {"zero": stage}, "cluster": cluster})
            run = train(job, environment=tight)
            file = run.directory / "micro-batch.json"
            halved = json.loads(file.read_text(encoding="utf-8"))["micro_batch"] if file.is_file() else None
            apart = largest_difference(run, plain)
            figure = f"micro-batch {batch} to {halved or batch}, {apart:.1e} apart"
            report.write(f"out of memory, ZeRO-{stage}, {how}", figure, halved is not None and apart <= 1e-4)


def data_wait(report: Report) -> None:
    """Train on JPEG pictures with augmentation, and tell how long the model waits for them."""
    bench = report.bench
    steps, batch = (48, 128) if bench.gpu else (16, 16)
    job = bench.job(
        "pictures",
        data={"train": str(bench.folder / PICTURES), "window_steps": 4},
        train={
            "max_steps": steps,
            "batch_size": batch,
            "log_every_steps": steps // 4,
            "precision": "bf16" if bench.gpu else "fp32",
        },
        cluster={"data_workers": max(1, (os.cpu_count() or 1) - 4)},
    )
    job["task"] = {"type": "image-classification", "augment": {"crop_scale_min": 0.5, "flip_fraction": 0.5}}
    job["model"] = {"name": str(bench.folder / VIT)}
    run = train(job)
    wait = run.data_wait()
    speed = run.samples_per_s(steps // 4)
    # How much is a matter of CPU cores for each GPU, so it is a figure alone.
    figure = f"{wait:.1%} of the time, {speed:,.0f} pictures/s, {os.cpu_count()} cores"
    report.write("data wait, augmented pictures", figure, None)


@dataclass(frozen=True)
class Part:
    """One part of the checks.

    Args:
        run: What it does.
        gpu_s: Limit on a GPU, seconds.
        cpu_s: Limit on a CPU, seconds.
        alone: Whether it is timed, so that nothing else may run beside it.
    """

    run: Callable[[Report], None]
    gpu_s: int
    cpu_s: int
    alone: bool = False


# In the order they are started; what matters most comes first, as the last ones may find no time left.
PARTS = {
    "facts": Part(facts, 40, 60, alone=True),
    "throughput": Part(throughput, 160, 600, alone=True),
    "precision": Part(precision, 120, 400),
    "ranks": Part(ranks, 200, 300),
    "fork_server": Part(fork_server, 100, 300),
    "zero": Part(zero, 240, 600),
    "resume": Part(resume, 160, 500),
    "out_of_memory": Part(out_of_memory, 160, 400),
    "memory": Part(memory, 160, 300),
    "packing": Part(packing, 100, 300),
    "attention": Part(attention, 150, 120, alone=True),
    "data_wait": Part(data_wait, 60, 200, alone=True),
    "compiled": Part(compiled, 170, 500, alone=True),
}
