"""metrics.jsonl of a run: looked over, cut where the run goes on from, and what a glance at it tells. Any process.

A run of a million steps has hundreds of MiB of it: it is read line by line, and most lines are not made records of.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from launcher.errors import RunError
from launcher.records import EvaluationRecord, MetricsLine
from launcher.rundir import RESTORE, RunDir

_FORM = re.compile(rb'\{"kind":"(\w+)","step":(\d+),.*\}\n')
"""A line as records are written; to match it takes a third of the time of reading the record."""
_READ_WHOLE = 1000
_LINE: TypeAdapter[MetricsLine] = TypeAdapter(MetricsLine)


@dataclass(frozen=True)
class Overview:
    """What a glance at a run's log tells."""

    step: int
    """The last one trained; 0 before the first."""
    evaluations: tuple[EvaluationRecord, ...]
    """In order."""


@dataclass(frozen=True)
class _Line:
    content: bytes
    kind: bytes
    step: int


def look_over(run: RunDir) -> None:
    """Refuse a file that is damaged: the first lines are read, the rest must look like records.

    Raises:
        RunError: a line is not a record; names it.
    """
    for part in run.metrics_parts():
        for _ in _lines(run, part, _READ_WHOLE):
            pass


def cut(run: RunDir, step: int) -> None:
    """Forget what was logged after `step`: those steps are done again.

    Raises:
        RunError: a line is not a record; names it.
    """
    for part in run.metrics_parts():
        # An object is never torn; of a local file the last line may be.
        if run.local is not None or any(line.step > step for line in _lines(run, part)):
            run.write_bytes(part, (line.content for line in _lines(run, part) if line.step <= step))


def overview(run: RunDir) -> Overview:
    """The last step and all evaluations.

    Raises:
        RunError: a line is not a record; names it.
    """
    step, evaluations = 0, []
    for part in run.metrics_parts():
        for line in _lines(run, part):
            if line.kind == b"step":
                step = max(step, line.step)
            elif line.kind == b"evaluation":
                evaluations.append(EvaluationRecord.model_validate_json(line.content))
    return Overview(step, tuple(evaluations))


def _lines(run: RunDir, part: str, read_whole: int = 0) -> Iterator[_Line]:
    for number, content in enumerate(run.lines(part), 1):
        form = _FORM.fullmatch(content) if number > read_whole else None
        if form is not None:
            yield _Line(content, form[1], int(form[2]))
            continue
        try:
            record = _LINE.validate_json(content)
        except ValidationError as error:
            raise RunError(f"{run.path(part)}:{number}: not a record of a run; {RESTORE}") from error
        yield _Line(content, record.kind.encode(), record.step)
