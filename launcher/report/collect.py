"""The content of a run directory as one frozen value. Runs on the client or the head.

Only job.yaml must exist: a report can be written of a run that has begun, stopped or finished.
Read `summary.py` next for the numbers on top, `charts.py` for the curves, `render.py` for the page.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import RunError
from launcher.rundir.certificate import CERTIFICATE, Certificate, find_certificate
from launcher.rundir.directory import RunDir, read_job
from launcher.rundir.events import Event, read_events
from launcher.rundir.leakage import LeakageRecord
from launcher.rundir.records import (
    RESTORE,
    EnvironmentRecord,
    EvaluationRecord,
    GenerationRecord,
    MemoryUsage,
    ResultRecord,
    ScoresRecord,
    StepRecord,
    TimesRecord,
)
from launcher.rundir.recovery import MicroBatchReduction, read_reductions
from launcher.rundir.uri import redact_uri
from launcher.spec.job import JobSpec

# The test score is what most readers look for.
_SPLIT_ORDER = {"test": 0, "validation": 1}
_LINKED = ("model/README.md", "job.yaml", "plan.json", "environment.json", "metrics.jsonl", "result.json", CERTIFICATE)


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows. A part that the run directory does not have is `None` or empty."""

    name: str
    location: str
    """Path or URI of the run directory, without credentials: reports are passed on."""
    job: JobSpec
    job_text: str
    plan: tuple[tuple[str, str], ...]
    """Values of plan.json by dotted key."""
    environment: EnvironmentRecord | None
    memory: tuple[MemoryUsage, ...]
    """Memory of each worker that reported it, by rank."""
    memory_reductions: tuple[MicroBatchReduction, ...]
    """Reductions of the micro-batch after an OOM."""
    events: tuple[Event, ...]
    """Incidents of the run: lost workers, corrupt checkpoints, skipped batches."""
    steps: tuple[StepRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]
    """Evaluations of the validation split, in order."""
    generations: tuple[GenerationRecord, ...]
    """Texts that the model generated at each evaluation."""
    times: tuple[TimesRecord, ...]
    """Time spent by each worker, in order."""
    scores: tuple[ScoresRecord, ...]
    """Final scores of each split: test, validation, then the others by name."""
    leakage: LeakageRecord | None
    """Duplicate rows across splits."""
    result: ResultRecord | None
    certificate: Certificate | None
    """Proof that other shapes train the same run; None if there is none that can be read."""
    files: tuple[str, ...]
    """Files that the report links to, relative to the run directory."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps completed so far."""
        if self.result is not None:
            return self.result.steps
        return self.steps[-1].step if self.steps else 0

    @property
    def elapsed_s(self) -> float:
        """Training time over all attempts, in seconds."""
        if self.result is not None:
            return self.result.elapsed_s
        return self.steps[-1].elapsed_s if self.steps else 0.0

    @property
    def best_evaluation(self) -> EvaluationRecord | None:
        """Best evaluation so far: the one whose weights are kept."""
        if self.result is not None:
            # None without evaluations: `best_step` is then the last step, which no line has.
            return next((line for line in self.evaluations if line.step == self.result.best_step), None)
        # The last one that was the best so far: each of them was when it was logged.
        return next((line for line in reversed(self.evaluations) if line.best), None)

    @property
    def main_metric(self) -> str | None:
        """Metric that the job file names, else the first one of the records (a task lists its main metric first)."""
        tables = [scores.metrics for scores in self.scores] + [line.metrics for line in self.evaluations]
        tables = [table for table in tables if table]
        if not tables:
            return None
        chosen = self.job.evaluation.metric
        return chosen if chosen in tables[0] else next(iter(tables[0]))


def collect(run: RunDir) -> ReportData:
    """Read a run directory.

    Raises:
        RunError: The directory has no job.yaml, or one of its files is invalid.
    """
    # The run may still be training: files are read one after the other, so a result may be newer than the last step
    # read here.
    job = read_job(run)
    steps: list[StepRecord] = []
    evaluations: list[EvaluationRecord] = []
    generations: list[GenerationRecord] = []
    times: list[TimesRecord] = []
    for line in run.read_metrics():
        if isinstance(line, StepRecord):
            steps.append(line)
        elif isinstance(line, GenerationRecord):
            generations.append(line)
        elif isinstance(line, TimesRecord):
            times.append(line)
        # Other splits are scored once, with their own files (`_read_scores`).
        elif line.split == "validation":
            evaluations.append(line)
    return ReportData(
        name=run.name,
        location=redact_uri(run.uri),
        job=job,
        job_text=run.read_bytes("job.yaml").decode(),
        plan=_read_plan(run),
        environment=run.find_record("environment.json", EnvironmentRecord),
        memory=_read_memory(run),
        memory_reductions=read_reductions(run),
        events=read_events(run),
        steps=tuple(steps),
        evaluations=tuple(evaluations),
        generations=tuple(generations),
        times=tuple(times),
        scores=_read_scores(run),
        leakage=run.find_record("leakage.json", LeakageRecord),
        result=run.find_record("result.json", ResultRecord),
        certificate=find_certificate(run),
        # Checked one by one: a link to a file that is not there yet would be dead.
        files=tuple(path for path in _LINKED if run.exists(path)),
    )


def list_missing_parts(data: ReportData) -> tuple[str, ...]:
    """Return one sentence for each part of the run that does not exist yet."""
    sentences = []
    if not data.steps:
        sentences.append("No training step is logged yet (metrics.jsonl).")
    elif data.result is None:
        sentences.append(f"Training has not finished: the last logged step is {data.steps_done:,} (result.json).")
    if data.job.data.locations("validation") and not data.evaluations:
        sentences.append("The validation data has not been evaluated yet (metrics.jsonl).")
    scored = {record.split for record in data.scores}
    for split in ("test", "validation"):
        if data.job.data.locations(split) and split not in scored:
            sentences.append(f"The {split} data has not been scored yet (scores-{split}.json).")
    if data.environment is None:
        sentences.append("The environment is not recorded yet (environment.json).")
    if not data.plan:
        sentences.append("There is no plan yet (plan.json).")
    if data.certificate is None and CERTIFICATE in data.files:
        sentences.append(f"The certificate cannot be read; {Certificate.damage_remedy} ({CERTIFICATE}).")
    return tuple(sentences)


def _read_scores(run: RunDir) -> tuple[ScoresRecord, ...]:
    names = [name for name in run.list("") if name.startswith("scores-") and name.endswith(".json")]
    records = [run.read_record(name, ScoresRecord) for name in names]
    return tuple(sorted(records, key=lambda record: (_SPLIT_ORDER.get(record.split, 2), record.split)))


def _read_memory(run: RunDir) -> tuple[MemoryUsage, ...]:
    # A file that is being written, or was left by a killed worker, has another ending.
    names = [name for name in run.list("workers") if name.startswith("memory-") and name.endswith(".json")]
    return tuple(sorted((run.read_record(f"workers/{n}", MemoryUsage) for n in names), key=lambda usage: usage.rank))


def _read_plan(run: RunDir) -> tuple[tuple[str, str], ...]:
    if not run.exists("plan.json"):
        return ()
    try:
        plan = json.loads(run.read_bytes("plan.json"))
    except ValueError as error:
        raise RunError(f"{run.path('plan.json')}: not valid JSON ({error}); {RESTORE}") from error
    return tuple(_flatten("", plan))


def _flatten(prefix: str, value: object) -> list[tuple[str, str]]:
    """Return nested JSON as (dotted key, text). A list of plain values stays on one line."""
    if isinstance(value, Mapping) and value:
        parts = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        parts = [(str(index), child) for index, child in enumerate(value)]
    else:
        # Empty lists and mappings too, which would otherwise leave no row.
        return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
    return [row for key, child in parts for row in _flatten(f"{prefix}.{key}" if prefix else key, child)]
