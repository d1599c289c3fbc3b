"""Log of a run, metrics.jsonl: validate it, truncate it at the resumed step, summarize it. Runs in every process.

A run of a million steps has hundreds of MiB: the log is read some MiB at a time, and most lines are matched by a
regular expression instead of being parsed.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from launcher.errors import RunError
from launcher.rundir.directory import RunDir, read_line
from launcher.rundir.records import EvaluationRecord

# These rely on the order of the fields in `records.py`, which pydantic keeps: `kind` first, and no free text before
# `step`, as a text could contain `"step":`. `step` is the second field of a step.
_FORM = re.compile(rb'^\{"kind":"\w+",[^\n]*?"step":(\d+),[^\n]*\}$', re.MULTILINE)
"""A line as `model_dump_json` writes it, and its step. Matching takes a tenth of the time of parsing."""
_TRAINED = re.compile(rb'^\{"kind":"step","step":(\d+)', re.MULTILINE)
_EVALUATION = re.compile(rb'^\{"kind":"evaluation",[^\n]*$', re.MULTILINE)
_PARSED_LINES = 1000
_LONG_BYTES = 1 << 24


@dataclass(frozen=True)
class LogSummary:
    """Progress and evaluations of a run, from its log."""

    step: int
    """Last trained step; 0 before the first."""
    evaluations: tuple[EvaluationRecord, ...]
    """All evaluations, oldest first."""


@dataclass(frozen=True)
class _Block:
    """A block of whole lines of one file."""

    content: bytes
    first: int
    """Number of the first line in its file, from 1."""
    where: str


def validate_log(run: RunDir) -> None:
    """Check that the log is intact: parse the first 1,000 lines, match the rest.

    Of a local file above 16 MiB only beginning and end are read; `truncate_after` reads the rest.

    Raises:
        RunError: A line is not a record. Names the line.
    """
    for part in run.metrics_parts():
        try:
            for block in _read_ends(run, part):
                _read_steps(block)
                if block.first == 1:
                    for number, line in enumerate(block.content.splitlines()[:_PARSED_LINES], 1):
                        read_line(block.where, number, line)
        except RunError:
            # Read from the start, to name the line.
            for block in _read_blocks(run, part):
                _read_steps(block)
            raise


def truncate_after(run: RunDir, step: int) -> None:
    """Remove all lines of steps after `step`: the resumed run repeats those steps.

    Raises:
        RunError: A line is not a record. Names the line.
    """
    for part in run.metrics_parts():
        # A part of an object store is small, and never incomplete.
        if run.local is None:
            blocks = list(_read_blocks(run, part))
            # Without a later line nothing is uploaded.
            if any(max(_read_steps(block)) > step for block in blocks):
                run.write_bytes(part, b"".join(_lines_until(block, step) for block in blocks))
            continue
        size, is_scattered = _find_cut(run, part, step)
        if is_scattered:
            run.write_bytes(part, (_lines_until(block, step) for block in _read_blocks(run, part)))
        else:
            # In place, at no cost however long the log is. Also removes an incomplete last line: the next append would
            # join it to a complete one, and both would be unreadable.
            os.truncate(run.local / part, size)


def summarize(run: RunDir) -> LogSummary:
    """Return the last step and all evaluations.

    Raises:
        RunError: A line is not a record. Names the line.
    """
    step = 0
    evaluations: list[EvaluationRecord] = []
    for part in run.metrics_parts():
        for block in _read_blocks(run, part):
            _read_steps(block)
            # The 0 is for a block without steps: `max` of one number is an error.
            step = max(step, *map(int, _TRAINED.findall(block.content)), 0)
            evaluations += [EvaluationRecord.model_validate_json(line) for line in _EVALUATION.findall(block.content)]
    return LogSummary(step, tuple(evaluations))


def _find_cut(run: RunDir, part: str, step: int) -> tuple[int, bool]:
    """Return the bytes before the first line of a later step, and whether lines to keep follow it.

    They can follow: an attempt that did not know it was stale may have written between another's lines.
    """
    size = 0
    has_later = False
    for block in _read_blocks(run, part):
        lines = _lines_until(block, step)
        # Lines to keep after a later step, in an earlier block or in this one: no single cut separates them.
        if (has_later and lines) or not block.content.startswith(lines):
            return size, True
        size += len(lines)
        has_later = has_later or len(lines) < len(block.content)
    return size, False


def _lines_until(block: _Block, step: int) -> bytes:
    """Return the lines of a block that belong to steps up to `step`."""
    steps = _read_steps(block)
    # Nearly all blocks: without splitting them into lines.
    if max(steps) <= step:
        return block.content
    lines = block.content.splitlines(keepends=True)
    return b"".join(line for line, of in zip(lines, steps, strict=True) if of <= step)


def _read_blocks(run: RunDir, part: str) -> Iterator[_Block]:
    first = 1
    for content in run.blocks(part):
        yield _Block(content, first, run.path(part))
        first += content.count(b"\n")


def _read_ends(run: RunDir, part: str) -> Iterator[_Block]:
    """Yield the blocks of a file; of a long one only those at its beginning and end."""
    if run.local is None or (run.local / part).stat().st_size < _LONG_BYTES:
        yield from _read_blocks(run, part)
        return
    # The end is what a killed process may have damaged; the beginning tells whether it is a log at all.
    yield from islice(_read_blocks(run, part), 1)
    with (run.local / part).open("rb") as stream:
        stream.seek(-_LONG_BYTES // 2, os.SEEK_END)
        end = stream.read()
    # It starts within a line. Its number is unknown (0), so an error in it makes `validate_log` read the whole file.
    yield _Block(end[end.find(b"\n") + 1 : end.rfind(b"\n") + 1], 0, run.path(part))


def _read_steps(block: _Block) -> list[int]:
    """Return the step of each line.

    Raises:
        RunError: A line is not a record.
    """
    steps = list(map(int, _FORM.findall(block.content)))
    # A line that does not match may still be valid, as from another version with other spacing: parse them all.
    if len(steps) == block.content.count(b"\n"):
        return steps
    lines = enumerate(block.content.splitlines(), block.first)
    return [read_line(block.where, number, line).step for number, line in lines]
