"""Does the launcher reach what transformers' own Trainer reaches? Runs on the client; needs no GPU.

Trains each task with `launcher train` and with the Trainer under torchrun, in turn for each seed, and compares the
metric on dev (validation) and test. What a side and a seed reached is stored, so a benchmark that was interrupted
goes on where it stopped. The last line of the output is one JSON object.
"""

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.commands import call, last_object, torchrun  # noqa: E402

SIDES = ("ours", "trainer")
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "ray", "tokenizers", "numpy")
# What some peers need beside the launcher's own environment; `make .venv-peers/.installed`.
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
PEERS_REQUIREMENTS = HERE / "requirements-peers.txt"


@dataclass(frozen=True)
class Task:
    """One comparison; a new task is a job file and a peer script here, and a line in TASKS."""

    name: str
    """Name of our job file here; its name, seed and storage come from this driver."""
    metric: str
    """Key in scores-validation.json and scores-test.json that both sides are compared by."""
    peer: str
    """Script for torchrun that takes --seed and --scratch and prints {"dev": ..., "test": ...} on its last line."""
    peer_options: tuple[str, ...] = ()
    """Further options of the peer's script, where it is the peer of several job files."""
    prepare: Path = ROOT / "jobs" / "quickstart" / "prepare.py"
    """Script that gets the model, if it is not there yet."""
    prepare_options: tuple[str, ...] = ()
    workers: int = 2
    """Processes of the peer: as many as the job file says, or one where its curve depends on their number."""
    python: Path = Path(sys.executable)
    """Interpreter of the peer: that of the launcher, or PEERS_PYTHON."""

    @property
    def job(self) -> Path:
        return HERE / f"{self.name}.yaml"


_E5, _TWICE, _PREFERENCE = (HERE / f"prepare_{name}.py" for name in ("e5", "encoder_decoder", "preference"))
TASKS = {
    task.name: task
    for task in (
        Task("text-classification", "accuracy", "trainer_text_classification.py", ("--language=en",)),
        Task("text-classification-zh", "accuracy", "trainer_text_classification.py", ("--language=zh",), _E5),
        Task("token-classification", "f1", "trainer_token_classification.py"),
        Task("causal-lm", "perplexity", "trainer_causal_lm.py", prepare=HERE / "prepare_smollm2.py"),
        Task("image-classification", "accuracy", "trainer_image_classification.py"),
        Task("question-answering", "f1", "trainer_question_answering.py", ("--language=en",)),
        Task("question-answering-zh", "f1", "trainer_question_answering.py", ("--language=zh",), _E5),
        Task("seq2seq", "loss", "trainer_seq2seq.py", ("--source=de",), _TWICE, ("minilm-twice",), python=PEERS_PYTHON),
        Task("seq2seq-zh", "loss", "trainer_seq2seq.py", ("--source=zh",), _TWICE, ("e5-twice",), python=PEERS_PYTHON),
        Task("masked-lm", "loss", "trainer_masked_lm.py"),
        Task("sentence-embedding", "recall_at_1", "trainer_sentence_embedding.py", workers=1, python=PEERS_PYTHON),
        *(
            Task(
                f"preference-{loss}", "loss", "trainer_preference.py", (f"--loss={loss}",), _PREFERENCE,
                workers=1, python=PEERS_PYTHON,
            )
            for loss in ("dpo", "kto")
        ),
    )
}  # fmt: skip


class Scores(NamedTuple):
    """What one training reached on the validation and the test data."""

    dev: float
    test: float


class Benchmark(NamedTuple):
    """A task and the folder of its runs and results."""

    task: Task
    storage: Path

    def path(self, side: str, seed: int, suffix: str) -> Path:
        return self.storage / f"{self.task.name}-{side}-seed-{seed}{suffix}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--storage", type=Path, default=ROOT / "runs" / "bench-accuracy", help="folder of runs and results"
    )
    parser.add_argument("--side", choices=[*SIDES, "both"], default="both")
    options = parser.parse_args()
    benchmark = Benchmark(TASKS[options.task], options.storage.resolve())
    benchmark.storage.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, str(benchmark.task.prepare), *benchmark.task.prepare_options], check=True)
    sides = SIDES if options.side == "both" else (options.side,)
    results: dict[str, list[Scores]] = {side: [] for side in sides}
    for seed in options.seeds:
        for side in sides:
            scores = stored_or_run(benchmark, side, seed)
            results[side].append(scores)
    print_table(benchmark.task, options.seeds, results)
    print(json.dumps(summary(benchmark.task, results)))
    return 0


def stored_or_run(benchmark: Benchmark, side: str, seed: int) -> Scores:
    """Return the result of an earlier start of this benchmark, or train."""
    result = benchmark.path(side, seed, ".json")
    made_by = {
        "settings": settings(benchmark.task, side),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    if result.exists():
        record = json.loads(result.read_text(encoding="utf-8"))
        if record["made_by"] != made_by:
            sys.exit(
                f"error: {result} was made by another job file, script, launcher or package; give another --storage"
            )
        scores, origin = Scores(record["dev"], record["test"]), "stored"
    else:
        started = time.monotonic()
        scores = (run_ours if side == "ours" else run_trainer)(benchmark, seed)
        seconds = round(time.monotonic() - started, 1)
        record = {"task": benchmark.task.name, "side": side, "seed": seed, **scores._asdict(), "seconds": seconds}
        unfinished = result.with_suffix(".tmp")
        unfinished.write_text(json.dumps(record | {"made_by": made_by}, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(result)
        origin = f"{seconds:.0f} s"
    print(f"seed {seed} {side:<7} dev {scores.dev:.4f}  test {scores.test:.4f}  ({origin})", flush=True)
    return scores


def settings(task: Task, side: str) -> str:
    """Return a digest of all in this repository that a side's result depends on, data and model aside."""
    sources = (
        [task.job, *sorted((ROOT / "launcher").rglob("*.py"))]
        if side == "ours"
        else [HERE / task.peer, HERE / "peer.py"]
    )
    if side == "trainer" and task.python == PEERS_PYTHON:
        sources.append(PEERS_REQUIREMENTS)
    digest = hashlib.sha256(repr((task.workers, task.metric, task.peer_options)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def run_ours(benchmark: Benchmark, seed: int) -> Scores:
    """Start `launcher train`, which resumes a run that was interrupted."""
    task, name = benchmark.task, f"{benchmark.task.name}-seed-{seed}"
    runs = benchmark.storage / "runs"
    command = [sys.executable, "-m", "launcher", "train", str(task.job)]
    command += [f"name={name}", f"seed={seed}", f"output.storage={runs}"]
    # The launcher of this checkout, in the workers too, whichever one is installed.
    call(command, benchmark.path("ours", seed, ".log"), {"PYTHONPATH": str(ROOT)})
    records = [json.loads((runs / name / f"scores-{split}.json").read_text()) for split in ("validation", "test")]
    return Scores(*({"loss": scores["loss"], **scores["metrics"]}[task.metric] for scores in records))


def run_trainer(benchmark: Benchmark, seed: int) -> Scores:
    """Start the peer's script under torchrun, two threads in all; from the start if it was interrupted."""
    task, scratch = benchmark.task, benchmark.storage / "scratch"
    words = (HERE / task.peer, f"--seed={seed}", f"--scratch={scratch}", *task.peer_options)
    threads = {"OMP_NUM_THREADS": str(max(1, 2 // task.workers))}
    command = torchrun(task.workers, *words, python=task.python)
    scores = last_object(call(command, benchmark.path("trainer", seed, ".log"), threads))
    return Scores(scores["dev"], scores["test"])


def print_table(task: Task, seeds: list[int], results: dict[str, list[Scores]]) -> None:
    """Print a line per seed, then mean and standard deviation."""
    print(f"\n{task.name}: {task.metric}\n" + " " * 6 + "".join(f"{side + ' dev':>14}{'test':>10}" for side in results))
    columns = [[scores[i] for scores in rows] for rows in results.values() for i in range(len(Scores._fields))]
    lines: list[tuple[str, Iterable[float | None]]] = [
        (str(seed), row) for seed, row in zip(seeds, zip(*columns, strict=True), strict=True)
    ]
    lines += [("mean", map(statistics.mean, columns)), ("std", map(deviation, columns))]
    for head, values in lines:
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        print(f"{head:<6}" + "".join(f"{cell:>{10 if i % 2 else 14}}" for i, cell in enumerate(cells)))
    print()


def summary(task: Task, results: dict[str, list[Scores]]) -> dict[str, object]:
    """Return figures to compare over time; the last two are null without both sides, the noise also with one seed."""
    report: dict[str, object] = {"task": task.name}
    for side, rows in results.items():
        report[side] = {"dev": [round(s.dev, 6) for s in rows], "test": [round(s.test, 6) for s in rows]}
    difference = noise = None
    if len(results) == len(SIDES):
        ours, trainer = ([scores.dev for scores in results[side]] for side in SIDES)
        difference = round(statistics.mean(ours) - statistics.mean(trainer), 6)
        deviations = deviation(ours), deviation(trainer)
        if None not in deviations:
            # Pooled: as many seeds on either side, so the variances count the same.
            noise = round(math.sqrt(statistics.mean(d * d for d in deviations if d is not None)), 6)
    return report | {"difference_dev": difference, "noise_dev": noise}


def deviation(values: list[float]) -> float | None:
    """Return the sample standard deviation over seeds; None with one seed."""
    return statistics.stdev(values) if len(values) > 1 else None


if __name__ == "__main__":
    sys.exit(main())
