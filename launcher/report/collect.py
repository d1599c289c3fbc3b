"""What a run directory tells, gathered into one frozen value. Runs on the client or the head.

Everything but job.yaml may be missing: a report is made of runs that have begun, stopped or finished.
Read `report/summary.py` for the numbers on top, `report/charts.py` for the curves, `report/render.py` for the page.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from launcher.errors import RunError
from launcher.rundir.directory import RESTORE, RunDir, read_job
from launcher.rundir.events import Event, read_events
from launcher.rundir.leakage import LeakageRecord
from launcher.rundir.records import (
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
from launcher.spec.job import JobSpec

# Test first: it is the number a reader came for.
_SPLIT_ORDER = {"test": 0, "validation": 1}
_LINKED = ("model/README.md", "job.yaml", "plan.json", "environment.json", "metrics.jsonl", "result.json")


@dataclass(frozen=True)
class ReportData:
    """All that the report shows, as found in the run directory; `None` or empty is what is not there."""

    name: str
    location: str
    job: JobSpec
    job_text: str
    plan: tuple[tuple[str, str], ...]
    """The plan's values by dotted key."""
    environment: EnvironmentRecord | None
    memory: tuple[MemoryUsage, ...]
    """Of each worker that told, by rank."""
    memory_reductions: tuple[MicroBatchReduction, ...]
    """Of the micro-batch, where memory ran out."""
    events: tuple[Event, ...]
    """What happened beside the curve: lost workers, damaged checkpoints, batches left out."""
    steps: tuple[StepRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]
    """Evaluations of the validation split, in order."""
    generations: tuple[GenerationRecord, ...]
    """What the model wrote at each of them."""
    times: tuple[TimesRecord, ...]
    """Where the time went, in order."""
    scores: tuple[ScoresRecord, ...]
    """One per scored split: test, validation, then any other by name."""
    leakage: LeakageRecord | None
    """Rows that the splits have in common."""
    result: ResultRecord | None
    files: tuple[str, ...]
    """Files worth a link, relative to the run directory."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps done so far."""
        if self.result is not None:
            return self.result.steps
        return self.steps[-1].step if self.steps else 0

    @property
    def best(self) -> EvaluationRecord | None:
        """The evaluation whose weights are kept, so far."""
        if self.result is not None:
            return next((line for line in self.evaluations if line.step == self.result.best_step), None)
        return next((line for line in reversed(self.evaluations) if line.best), None)

    @property
    def main_metric(self) -> str | None:
        """The metric that decides: the job's own, else the first one of the records (tasks put theirs first)."""
        tables = [scores.metrics for scores in self.scores] + [line.metrics for line in self.evaluations]
        tables = [table for table in tables if table]
        if not tables:
            return None
        chosen = self.job.evaluation.metric
        return chosen if chosen in tables[0] else next(iter(tables[0]))


def collect(run: RunDir) -> ReportData:
    """Read a run directory.

    Raises:
        RunError: there is no job.yaml, or a file that is there cannot be read.
    """
    job_text = run.read_bytes("job.yaml").decode()
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
        elif line.split == "validation":
            evaluations.append(line)
    return ReportData(
        name=run.name,
        location=without_credentials(run.uri),
        job=read_job(run),
        job_text=job_text,
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
        files=tuple(path for path in _LINKED if run.exists(path)),
    )


def missing(data: ReportData) -> tuple[str, ...]:
    """One sentence per part of the run that is not there yet."""
    found = []
    if not data.steps:
        found.append("No training step is logged yet (metrics.jsonl).")
    elif data.result is None:
        found.append(f"Training is not over: step {data.steps_done:,} is the last one logged (result.json).")
    if data.job.data.validation and not data.evaluations:
        found.append("The validation data has not been evaluated yet (metrics.jsonl).")
    scored = {record.split for record in data.scores}
    for split, rows in (("test", data.job.data.test), ("validation", data.job.data.validation)):
        if rows and split not in scored:
            found.append(f"The {split} data has not been scored yet (scores-{split}.json).")
    if data.environment is None:
        found.append("The environment is not recorded yet (environment.json).")
    if not data.plan:
        found.append("There is no plan yet (plan.json).")
    return tuple(found)


def without_credentials(uri: str) -> str:
    """The URI less user, password and query: storage URIs may carry keys there, and reports are passed around."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _read_scores(run: RunDir) -> tuple[ScoresRecord, ...]:
    names = [name for name in run.list("") if name.startswith("scores-") and name.endswith(".json")]
    records = [run.read_record(name, ScoresRecord) for name in names]
    return tuple(sorted(records, key=lambda record: (_SPLIT_ORDER.get(record.split, 2), record.split)))


def _read_memory(run: RunDir) -> tuple[MemoryUsage, ...]:
    names = [name for name in run.list("workers") if name.startswith("memory-")]
    return tuple(sorted((run.read_record(f"workers/{n}", MemoryUsage) for n in names), key=lambda used: used.rank))


def _read_plan(run: RunDir) -> tuple[tuple[str, str], ...]:
    if not run.exists("plan.json"):
        return ()
    try:
        plan = json.loads(run.read_bytes("plan.json"))
    except ValueError as error:
        raise RunError(f"{run.path('plan.json')}: not valid JSON ({error}); {RESTORE}") from error
    return tuple(_flatten("", plan))


def _flatten(prefix: str, value: object) -> list[tuple[str, str]]:
    """Nested JSON as dotted keys; a list of plain values stays on one line."""
    if isinstance(value, Mapping) and value:
        parts = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        parts = [(str(index), child) for index, child in enumerate(value)]
    else:
        return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
    return [row for key, child in parts for row in _flatten(f"{prefix}.{key}" if prefix else key, child)]
