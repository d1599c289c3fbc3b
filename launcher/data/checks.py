"""Checks that the rows are what the task reads: columns, labels, and the first rows, encoded as the run would.

Runs on the client and the head, before Ray starts. Read `driver/prepare.py` next.
"""

import difflib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from launcher.data.row_order import epoch_sampler
from launcher.data.splits import Split, is_numbered
from launcher.data.stream import BAD_ROW_REMEDY, handle_bad_rows
from launcher.errors import DataError
from launcher.formatting import list_names
from launcher.spec.job import JobSpec
from launcher.tasks import build_task
from launcher.tasks.base import Task
from launcher.tasks.params import item_type

_CHECKED_ROWS = 256
"""First rows of a split whose labels are checked for lost ones."""
_MIN_CLASSES_FRACTION = 0.5
"""Fraction of the classes that a shuffle pool should hold."""
_MAX_LOST_FRACTION = 0.2
"""Fraction of labels. Fewer lost labels are slips of annotators; more, and the tokenizer or the offsets do not fit."""


def check_columns(split: Split, task: Task) -> None:
    """Check that a split has all columns that the task reads.

    Raises:
        DataError: A column is missing, or the task takes one column as both input and label.
    """
    both = sorted(set(task.input_columns) & set(task.target_columns))
    if both:
        raise DataError(f"task: column {both[0]!r} is both input and label, so there is nothing to learn; name two")
    for column in task.input_columns + task.target_columns:
        if column not in split.schema.names:
            near = difflib.get_close_matches(column, split.schema.names, 1)
            hint = f"did you mean {near[0]}?" if near else f"the file has {', '.join(split.schema.names)}"
            raise DataError(f"{split.locate(0)[0]}: has no column {column!r}, which the task reads; {hint} (see task:)")


def with_class_names(job: JobSpec, splits: dict[str, Split]) -> dict[str, Split]:
    """Return splits whose numbered classes are read as the names that their files give them.

    Each file numbers classes in its own way, so a number means nothing outside of its file. If task.labels has names
    that no file has, it renames the classes of the files in order, and numbers stay numbers.

    Args:
        job: Job; task.labels are those of the job file, or of the run.
        splits: Splits as they were opened, the training data first.

    Raises:
        DataError: Files disagree on what a number means, and nothing tells which of them task.labels follows.
    """
    task = build_task(job)
    if not has_classes(task):
        return splits
    labels = set(getattr(task.params, "labels", None) or ())
    columns: dict[str, tuple[str, ...]] = {}
    for column in task.target_columns:
        owns = [(split, own[column]) for split in splits.values() for own in split.numberings if column in own]
        first = next(iter(splits.values()))
        own = dict(first.class_names).get(column)
        is_text = column in first.schema.names and not is_numbered(first.schema.field(column).type)
        if not owns or (own is None and not is_text):
            continue
        if labels and labels.isdisjoint(name for _, names in owns for name in names):
            _check_same_numbering(column, owns)
            continue
        columns[column] = own or owns[0][1]
    return {name: _name_classes(split, columns) for name, split in splits.items()}


def _name_classes(split: Split, columns: dict[str, tuple[str, ...]]) -> Split:
    present = {column: names for column, names in columns.items() if column in split.schema.names}
    for column, names in present.items():
        # A bare 1 may be the class "1" or the class at position 1.
        is_ambiguous = any(name.isdigit() and int(name) != i for i, name in enumerate(names))
        is_bare = is_numbered(split.schema.field(column).type) and any(column not in own for own in split.numberings)
        if is_bare and is_ambiguous:
            raise DataError(
                f"{split.locate(0)[0]}: column {column!r} holds numbers without names, and its classes "
                f"{list_names(names)} are numbers themselves; write names instead of numbers"
            )
    return split.with_named_classes(present)


def _check_same_numbering(column: str, owns: list[tuple[Split, tuple[str, ...]]]) -> None:
    (first, names), *others = owns
    for split, other in others:
        if other != names:
            raise DataError(
                f"task.labels: renames the classes of column {column!r}, but files number them differently "
                f"({list_names(names)} in data.{first.name}, {list_names(other)} in data.{split.name}); give "
                "task.labels the names of the files, or null"
            )


def has_classes(task: Task) -> bool:
    """Return whether a task learns classes from a column of labels."""
    return "labels" in type(task.params).model_fields and getattr(task.params, "kind", "") != "regression"


def note_sorted_rows(job: JobSpec, task: Task, train: Split) -> list[str]:
    """Return a note if rows are sorted by class and a shuffle pool holds few of the classes; reads the first pool."""
    names = getattr(task.params, "labels", None) or () if has_classes(task) else ()
    # A mixture draws from each of its sources all the time, whatever its classes.
    if not names or train.sources:
        return []
    label = task.target_columns[0]
    kind = train.schema.field(label).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        return []  # no single class per row
    order = epoch_sampler(job, train, 0)
    if len(order.pool_starts) < 3:  # one pool holds all rows
        return []
    # Costs the label column of one pool, which is what training will see mixed; sorted, so that each file is read
    # forwards.
    ids = np.sort(order.pool_ids(0))
    encoded = train.read(ids, (label,)).column(0).combine_chunks().dictionary_encode()
    values = encoded.indices.fill_null(-1).to_numpy()
    counts = np.bincount(values[values >= 0])
    # Rows with consecutive ids have the same class more often than two random rows: the rows are sorted.
    is_adjacent = np.diff(ids) == 1
    same_fraction = float((np.diff(values) == 0)[is_adjacent].mean()) if is_adjacent.any() else 0.0
    chance = float(((counts / max(1, counts.sum())) ** 2).sum())
    has_enough = len(counts) >= _MIN_CLASSES_FRACTION * min(len(names), len(ids))
    if has_enough or (len(counts) > 1 and same_fraction < 2 * chance):
        return []
    pool = job.data.shuffle_pool_mib
    return [
        f"data.train: rows are sorted by {label}: of {len(names)} classes a shuffle pool of {pool} MiB holds "
        f"{len(counts)}, so that batches hold few of them; write the files once in random order, or raise "
        f"data.shuffle_pool_mib to {pool * -(-len(names) // max(1, len(counts)))} MiB, which each data worker holds"
    ]


def check_label_types(job: JobSpec, task: Task, splits: dict[str, Split]) -> None:
    """Check that no split has numbers where the training data has names: they could match classes by chance.

    Raises:
        DataError: A split has numbers, and the job file does not say which name a number means.
    """
    if not has_classes(task) or job.task.parameters().get("labels"):
        return
    for column in task.target_columns:
        kinds = {name: item_type(split.schema.field(column).type) for name, split in splits.items()}
        if not (pa.types.is_string(kinds["train"]) or pa.types.is_large_string(kinds["train"])):
            continue
        for name, split in splits.items():
            if pa.types.is_integer(kinds[name]) or pa.types.is_floating(kinds[name]):
                raise DataError(
                    f"{split.locate(0)[0]}: column {column!r} holds numbers, but names in "
                    f"{splits['train'].locate(0)[0]}; write names, or say in task.labels which name each number means"
                )


def check_targets(task: Task, splits: Sequence[Split]) -> None:
    """Check all labels of evaluation data: a label unknown in training would end the run hours later.

    Raises:
        DataError: A label cannot be used; names the file and the row.
    """
    for split in splits:
        for column in task.target_columns:
            invalid = task.find_invalid_target(split.iter_column(column), split.schema.field(column).type)
            if invalid is not None:
                file, row = split.locate(invalid[0])
                raise DataError(f"{file}: row {row}: {invalid[1]}; {BAD_ROW_REMEDY}")


def note_lost_labels(task: Task, splits: Sequence[Split]) -> list[str]:
    """Return a note for each split with labels in its first rows that are neither learned nor scored.

    Raises:
        DataError: So many are lost that the scores would be about other data.
    """
    notes: list[str] = []
    if type(task).lost_labels is Task.lost_labels:  # the task loses none, and its rows may be pictures
        return notes
    for split in splits:
        ids = np.arange(min(_CHECKED_ROWS, split.rows), dtype=np.int64)
        result = task.lost_labels(split.read(ids, task.input_columns + task.target_columns))
        if not result.lost:
            continue
        position, reason = result.lost[0]
        file, row = split.locate(int(ids[position]))
        text = (
            f"{file}: row {row}: {reason}; {len(result.lost)} of {result.labels} {result.kind} in the first {len(ids)} "
            f"rows are lost"
        )
        if len(result.lost) > _MAX_LOST_FRACTION * result.labels:
            raise DataError(f"{text}; {result.remedy}")
        notes.append(f"{text}, neither learned nor scored; {result.remedy}")
    return notes


def check_first_rows(job: JobSpec, splits: dict[str, Split], rows: int = 256) -> None:
    """Run `check_first_rows_of_split` on every split of a resolved job; `rows` and errors are its."""
    task = build_task(job)
    for split in splits.values():
        check_first_rows_of_split(job, task, split, rows)


def check_first_rows_of_split(
    job: JobSpec, task: Task, split: Split, rows: int = 256, with_targets: bool = True
) -> None:
    """Encode the first rows as the run would, so that unknown labels and null texts show before it starts.

    If bad rows are skipped, rows of the middle and of the end are tried too until one can be used.

    Args:
        job: Resolved job.
        task: Task of the job.
        split: Split of the job, or other data.
        rows: Number of rows at each of these places.
        with_targets: True to read and check the labels too.

    Raises:
        DataError: A row cannot be used and the job file says `error`, or no row can be used.
    """
    names = split.schema.names
    columns = task.input_columns + task.target_columns if with_targets else task.prediction_inputs(names)
    rows = min(rows, split.rows)
    # A file may begin with unusable rows; only if three places have no usable one, a wrong column is the likely reason.
    begins = (0,) if job.data.on_bad_row == "error" else (0, (split.rows - rows) // 2, split.rows - rows)
    for begin in begins:
        ids = np.arange(begin, begin + rows, dtype=np.int64)
        encoded = task.encode(split.read(ids, columns), with_targets)
        if len(encoded.valid_rows) or begin == begins[-1]:
            return handle_bad_rows(split, ids, encoded, job.data.on_bad_row)
