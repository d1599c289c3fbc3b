"""metrics.jsonl of a run: looked over, cut where the run goes on from, and what a glance at it tells. Any process.

A run of a million steps has hundreds of MiB of it: it is read some MiB at a time, and of most lines no record is made.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from launcher.errors import RunError
from launcher.rundir.directory import RunDir, read_line
from launcher.rundir.records import EvaluationRecord

_FORM = re.compile(rb'^\{"kind":"\w+",[^\n]*?"step":(\d+),[^\n]*\}$', re.MULTILINE)
"""A line as records are written, and its step; to match it takes a tenth of the time of reading the record."""
_TRAINED = re.compile(rb'^\{"kind":"step","step":(\d+)', re.MULTILINE)
_EVALUATION = re.compile(rb'^\{"kind":"evaluation",[^\n]*$', re.MULTILINE)
_READ_WHOLE = 1000
_LONG_BYTES = 1 << 24


@dataclass(frozen=True)
class LogSummary:
    """What a glance at a run's log tells."""

    step: int
    """The last one trained; 0 before the first."""
    evaluations: tuple[EvaluationRecord, ...]
    """In order."""


@dataclass(frozen=True)
class _Block:
    """Some whole lines."""

    content: bytes
    first: int
    """Number of the first line in its file, from 1."""
    where: str


def validate_log(run: RunDir) -> None:
    """Refuse a file that is damaged: the first lines are read, the rest must look like records.

    Of a long local file only beginning and end are looked at; `truncate_after` sees the rest.

    Raises:
        RunError: a line is not a record; names it.
    """
    for part in run.metrics_parts():
        try:
            for block in _ends_of(run, part):
                _steps(block)
                if block.first == 1:
                    for number, line in enumerate(block.content.splitlines()[:_READ_WHOLE], 1):
                        read_line(block.where, number, line)
        except RunError:
            for block in _blocks_of(run, part):  # which line it is
                _steps(block)
            raise


def truncate_after(run: RunDir, step: int) -> None:
    """Forget what was logged after `step`: those steps are done again.

    Raises:
        RunError: a line is not a record; names it.
    """
    for part in run.metrics_parts():
        if run.local is None:  # small, and never torn
            blocks = list(_blocks_of(run, part))
            if any(max(_steps(block)) > step for block in blocks):
                run.write_bytes(part, b"".join(_until(block, step) for block in blocks))
            continue
        kept, scattered = _kept(run, part, step)
        if scattered:
            run.write_bytes(part, (_until(block, step) for block in _blocks_of(run, part)))
        else:
            os.truncate(run.local / part, kept)  # a torn last line goes, too


def summarize(run: RunDir) -> LogSummary:
    """The last step and all evaluations.

    Raises:
        RunError: a line is not a record; names it.
    """
    step, evaluations = 0, []
    for block in _blocks(run):
        _steps(block)
        step = max(step, *map(int, _TRAINED.findall(block.content)), 0)
        evaluations += [EvaluationRecord.model_validate_json(line) for line in _EVALUATION.findall(block.content)]
    return LogSummary(step, tuple(evaluations))


def _kept(run: RunDir, part: str, step: int) -> tuple[int, bool]:
    """Bytes of the lines before the first later one, and whether there are others to keep behind it."""
    kept, later = 0, False
    for block in _blocks_of(run, part):
        lines = _until(block, step)
        if (later and lines) or not block.content.startswith(lines):
            return kept, True
        kept += len(lines)
        later = later or len(lines) < len(block.content)
    return kept, False


def _until(block: _Block, step: int) -> bytes:
    """The lines of a block that belong to steps up to `step`."""
    steps = _steps(block)
    if max(steps) <= step:
        return block.content
    lines = block.content.splitlines(keepends=True)
    return b"".join(line for line, of in zip(lines, steps, strict=True) if of <= step)


def _blocks(run: RunDir) -> Iterator[_Block]:
    for part in run.metrics_parts():
        yield from _blocks_of(run, part)


def _blocks_of(run: RunDir, part: str) -> Iterator[_Block]:
    first = 1
    for content in run.blocks(part):
        yield _Block(content, first, run.path(part))
        first += content.count(b"\n")


def _ends_of(run: RunDir, part: str) -> Iterator[_Block]:
    """All of a file, or the beginning and the end of a long one."""
    if run.local is None or (run.local / part).stat().st_size < _LONG_BYTES:
        yield from _blocks_of(run, part)
        return
    yield from islice(_blocks_of(run, part), 1)
    with (run.local / part).open("rb") as stream:
        stream.seek(-_LONG_BYTES // 2, os.SEEK_END)
        end = stream.read()
    yield _Block(end[end.find(b"\n") + 1 : end.rfind(b"\n") + 1], 0, run.path(part))


def _steps(block: _Block) -> list[int]:
    """The step of each line.

    Raises:
        RunError: one is not a record.
    """
    steps = list(map(int, _FORM.findall(block.content)))
    if len(steps) == block.content.count(b"\n"):
        return steps
    lines = enumerate(block.content.splitlines(), block.first)
    return [read_line(block.where, number, line).step for number, line in lines]
