"""Rows in common: the vectorised search finds what Python sets find, for all Arrow types and layouts."""

import datetime
import decimal
import math
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import launcher.driver.preflight as preflight
from launcher.data.leakage import duplicates
from launcher.data.leakage.duplicates import Limits, SearchStopped, find_duplicates
from launcher.data.leakage.hashes import hash_array
from launcher.data.splits import Split, open_split
from launcher.driver.prepare import PreparedJob, prepare
from launcher.errors import DataError
from launcher.report.collect import collect
from launcher.report.render import render_report
from launcher.rundir.directory import RunDir
from launcher.rundir.leakage import LeakageRecord, LeakPair, leak_sentences, no_leak_sentence
from launcher.tasks.base import Task
from tests.support.jobs import example_table, make_job


class _Columns(Task):
    """Task that has columns to read and nothing else."""

    def __init__(self, inputs: Sequence[str], targets: Sequence[str] = ()) -> None:
        self.input_columns, self.target_columns = tuple(inputs), tuple(targets)


def _split(folder: Path, name: str, table: pa.Table, row_group: int = 7) -> Split:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{name}.parquet", row_group_size=row_group)
    return open_split(name, [str(folder / f"{name}.parquet")])


def _splits(folder: Path, **tables: pa.Table) -> dict[str, Split]:
    return {name: _split(folder, name, table) for name, table in tables.items()}


def _pair(record: LeakageRecord, split: str, other: str) -> LeakPair:
    return next(pair for pair in record.pairs if (pair.split, pair.other) == (split, other))


# ---- against plain Python ----

_TEXTS = st.one_of(st.none(), st.sampled_from(["", "a", "b", "a" * 31, "a" * 32, "a" * 33, "é\0", "b" * 4095 + "é"]))
_WORDS = st.one_of(st.none(), st.lists(st.sampled_from(["a", "b", None]), max_size=3))
_NUMBERS = st.one_of(st.none(), st.integers(-2, 2), st.sampled_from([0.5, -0.0, math.inf, 2.0**60]))
_LABELS = st.one_of(st.none(), st.sampled_from(["x", "y"]))
_ROWS = st.lists(st.tuples(_TEXTS, _WORDS, _NUMBERS, _LABELS), min_size=1, max_size=25)
_SCHEMA = pa.schema({"text": pa.string(), "words": pa.list_(pa.string()), "number": pa.float64(), "label": pa.string()})


def _table(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=_SCHEMA)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _search_plainly(
    rows: list[tuple[Any, ...]], other: list[tuple[Any, ...]], width: int
) -> tuple[int, int, list[int], list[int]]:
    """Return (duplicates, those with another label, the duplicate rows, the first row of the other split with each)."""
    labels: dict[Any, set[Any]] = {}
    first: dict[Any, int] = {}
    for i, row in enumerate(other):
        key = tuple(map(_frozen, row[:width]))
        labels.setdefault(key, set()).add(row[-1])
        first.setdefault(key, i)
    keys = {
        i: tuple(map(_frozen, row[:width])) for i, row in enumerate(rows) if any(v is not None for v in row[:width])
    }
    keys = {i: key for i, key in keys.items() if key in labels}
    other_label = sum(labels[key] != {rows[i][-1]} for i, key in keys.items())
    return len(keys), other_label, list(keys), [first[key] for key in keys.values()]


@settings(max_examples=60, deadline=None)
@given(train=_ROWS, validation=_ROWS, test=_ROWS, width=st.sampled_from([1, 3]), row_group=st.sampled_from([1, 4, 100]))
def test_search_finds_what_python_sets_find(
    tmp_path_factory: pytest.TempPathFactory, train: Any, validation: Any, test: Any, width: int, row_group: int
) -> None:
    folder = tmp_path_factory.mktemp("splits")
    rows = {"train": train, "validation": validation, "test": test}
    splits = {name: _split(folder, name, _table(own), row_group) for name, own in rows.items()}
    record = find_duplicates(splits, _Columns(_SCHEMA.names[:width], ["label"]), threads=2)
    for split, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        pair = _pair(record, split, other)
        count, other_label, duplicate_rows, first_rows = _search_plainly(rows[split], rows[other], width)
        assert (pair.duplicates, pair.other_label) == (count, other_label)
        assert [e.file_row for e in pair.examples] == duplicate_rows[:5]
        assert [e.other_file_row for e in pair.examples] == first_rows[:5]
        assert pair.rows == sum(any(v is not None for v in row[:width]) for row in rows[split])
        assert pair.whole


# ---- types and layouts ----

_DAY = datetime.date(2026, 1, 2)
_PICTURES = [{"bytes": b"\x89PNG" + bytes([i]) * 50, "path": f"{i}.png"} for i in range(3)]
_TALK = [[{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "yes"}] for i in range(3)]
_TYPES = {
    "string": pa.array(["a", "b", "c"]),
    "large string": pa.array(["a", "b", "c"], pa.large_string()),
    "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
    "binary": pa.array([b"a", b"\0", b""]),
    "fixed binary": pa.array([b"ab", b"cd", b"ef"], pa.binary(2)),
    "boolean": pa.array([True, False, None]),
    "int8": pa.array([1, -1, None], pa.int8()),
    "uint64": pa.array([1, 2**64 - 1, 2**63], pa.uint64()),
    "float32": pa.array([0.5, math.nan, -0.0], pa.float32()),
    "float16": pa.array(np.array([0.5, 1.5, 2.5], np.float16)),
    "decimal": pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.50"), None]),
    "date": pa.array([_DAY, None, _DAY.replace(year=1970)]),
    "timestamp": pa.array([datetime.datetime(2026, 1, 2, 3), None, datetime.datetime(1970, 1, 1)]),
    "list": pa.array([["a", "b"], ["b", "a"], []]),
    "large list": pa.array([[1, 2], [12], None], pa.large_list(pa.int32())),
    "fixed list": pa.array([[1, 2], [2, 1], None], pa.list_(pa.float32(), 2)),
    "nested list": pa.array([[["a"], ["b"]], [["a", "b"]], [[], ["a"]]]),
    "struct": pa.array([{"a": 1, "b": "x"}, {"a": None, "b": "x"}, None]),
    "pictures": pa.array(_PICTURES),
    "conversations": pa.array(_TALK),
    "map": pa.array([[("a", 1)], [("b", 1)], []], pa.map_(pa.string(), pa.int64())),
}


@pytest.mark.parametrize("kind", _TYPES)
def test_every_type_of_column_is_compared(kind: str, tmp_path: Path) -> None:
    column = _TYPES[kind]
    row = column.slice(1, 1)
    train = pa.table({"x": pa.concat_arrays([column, column.slice(0, 2)])})
    splits = _splits(tmp_path, train=train, validation=pa.table({"x": row}), test=pa.table({"x": column.slice(0, 2)}))
    record = find_duplicates(splits, _Columns(["x"]))
    values = [value for value in column.to_pylist()[:2] if value is not None]
    assert _pair(record, "test", "train").duplicates == len(values)
    assert _pair(record, "validation", "train").duplicates == int(row[0].is_valid)
    assert _pair(record, "validation", "train").other_label is None
    distinct = {repr(value) for value in column.to_pylist()}
    assert len(set(hash_array(column).tolist())) == len(distinct), "different values have different hashes"


_SAME: list[tuple[pa.Array, pa.Array]] = [
    (pa.array(["a", None]), pa.array(["a", None], pa.large_string())),
    (pa.array(["a", None]), pa.array([b"a", None])),
    (pa.array(["a", "b", "a"]), pa.array(["a", "b", "a"]).dictionary_encode()),
    (pa.array(["a", "a"]), pc.run_end_encode(pa.array(["a", "a"]))),
    (pa.array(["a", None]), pa.array(["a", None], pa.string_view())),
    (pa.array([1, None, -3]), pa.array([1.0, None, -3.0])),
    (pa.array([0.0, math.nan]), pa.array([-0.0, -math.nan], pa.float32())),
    (pa.array([["a"], None, []]), pa.array([["a"], None, []], pa.large_list(pa.large_string()))),
    (pa.array([["a"], None, []]), pa.array([["a"], None, []], pa.list_view(pa.string()))),
    (pa.array([[1, 2]]), pa.array([[1, 2]], pa.list_(pa.int8(), 2))),
    (
        pa.array([{"a": 1, "b": "x"}]),
        pa.array([{"b": "x", "a": 1}], pa.struct({"b": pa.string(), "a": pa.int32()})),
    ),
    (pa.array([{"bytes": b"x", "path": "1.png"}]), pa.array([{"bytes": b"x", "path": "2.png"}])),
    (pa.array([{"bytes": b"x", "path": None}]), pa.array([b"x"])),
    (pa.array([{"bytes": None, "path": "1.png"}]), pa.array(["1.png"])),
]


@pytest.mark.parametrize(("left", "right"), _SAME, ids=lambda array: str(array.type))
def test_equal_values_have_equal_hashes_in_any_layout(left: pa.Array, right: pa.Array) -> None:
    assert hash_array(left).tolist() == hash_array(right).tolist()
    for array in (left, right):
        padded = pa.concat_arrays([array, array]).slice(1, len(array))
        assert hash_array(padded).tolist() == (hash_array(array).tolist() * 2)[1 : 1 + len(array)]


def test_hashes_of_a_hundred_thousand_similar_texts_all_differ() -> None:
    texts = [
        f"{'the same beginning of every text ' * (i % 4)}{i:08d}{' and its end' * (i % 3)}" for i in range(100_000)
    ]
    assert len(set(hash_array(pa.array(texts)).tolist())) == len(texts)
    bits = np.unpackbits(hash_array(pa.array(texts)).view(np.uint8)).reshape(-1, 64).mean(0)
    assert bits.min() > 0.49 and bits.max() < 0.51, "every bit is as often 1 as 0"
    swaps = [
        text[:i] + text[i + 1] + text[i] + text[i + 2 :] for text in ["abcdefghijklmnopqrst" * 9] for i in range(178)
    ]
    assert len(set(hash_array(pa.array(swaps)).tolist())) == len(set(swaps))


# ---- cost ----


def test_memory_does_not_grow_with_the_training_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    peaks = []
    for rows in (20_000, 400_000):
        numbers = pa.array(rng.integers(0, 2**60, rows)).cast(pa.string())
        train = pa.table({"text": pc.binary_join_element_wise(*[numbers] * 5, " ")})
        pq.write_table(train, tmp_path / "train.parquet", row_group_size=rows)
        splits = {
            "train": open_split("train", [str(tmp_path / "train.parquet")]),
            **_splits(tmp_path, validation=train.slice(10, 500)),
        }
        before = pa.total_allocated_bytes()
        tracemalloc.start()  # NumPy's memory; Arrow's own is a batch of the reader
        record = find_duplicates(splits, _Columns(["text"]), threads=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert pa.total_allocated_bytes() - before < 4 << 20
        assert record.pairs[0].duplicates == 500
    assert peaks[1] < 1.2 * peaks[0] + (1 << 20), peaks


def test_huge_training_data_is_sampled_and_the_report_says_so(tmp_path: Path) -> None:
    train = pa.table({"text": [str(i) for i in range(1000)]})
    splits = {"train": _split(tmp_path, "train", train, 10), **_splits(tmp_path, test=train)}
    limits = Limits(searched_rows=300)
    record = find_duplicates(splits, _Columns(["text"]), limits=limits)
    assert find_duplicates(splits, _Columns(["text"]), limits=limits).pairs == record.pairs, "always the same part"
    (pair,) = record.pairs
    assert (pair.searched_rows, pair.other_rows, pair.duplicates, pair.whole) == (300, 1000, 300, False)
    (sentence,) = leak_sentences(record)
    assert sentence.startswith("at least 300 of 1000 test rows are also in train (30.0 %), first: ")
    assert sentence.endswith("compared with 300 of 1,000 train rows, drawn at random")
    (pair,) = find_duplicates(splits, _Columns(["text"]), limits=Limits(searched_bytes=1)).pairs
    assert pair.searched_rows == 10, "one fragment at least"


def test_huge_evaluation_splits_are_sampled_by_content(tmp_path: Path) -> None:
    texts = {name: [str(i + first) for i in range(4000)] for name, first in _FIRST.items()}
    splits = {name: _split(tmp_path, name, pa.table({"text": own}), 900) for name, own in texts.items()}
    record = find_duplicates(splits, _Columns(["text"]), limits=Limits(indexed_rows=2000))
    for split, other, overlap in (("validation", "train", 0.5), ("test", "train", 0.25), ("test", "validation", 0.75)):
        pair = _pair(record, split, other)
        assert pair.share == 0.25 and 900 < pair.rows < 1100 and not pair.whole
        assert abs(pair.duplicates / pair.rows - overlap) < 0.05
    assert "; 25.0% of the test rows, drawn by their content, stand for all" in " ".join(leak_sentences(record))


_FIRST = {"train": 0, "validation": 2000, "test": 3000}


# ---- notes, errors and records of a job ----


def _job(folder: Path, model: Path, tables: dict[str, pa.Table], **data: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=40)
    locations = {name: str(folder / f"{name}.parquet") for name in tables}
    return make_job(model, {**locations, **data}, folder / "runs")


def _check_in_background(prepared: PreparedJob) -> str:
    """Return what the check prints."""
    output = StringIO()
    console = Console(file=output, width=400)
    with preflight.check_leakage_in_background(prepared.job, prepared.run, prepared.splits, None, console):
        pass
    return output.getvalue()


def _leaky(other_label: bool = False) -> dict[str, pa.Table]:
    train, validation = example_table(90, 0), example_table(30, 1)
    copies = train.slice(40, 3)
    if other_label:
        flipped = ["b" if label == "a" else "a" for label in copies.column("label").to_pylist()]
        copies = copies.set_column(1, "label", pa.array(flipped))
    return {"train": train, "validation": pa.concat_tables([validation, copies]), "test": example_table(20, 2)}


def test_leak_is_noted_and_recorded(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = prepare(_job(tmp_path, tiny_bert, _leaky(other_label=True)))
    assert _check_in_background(prepared) == (
        "note: 3 of 33 validation rows are also in train (9.1 %), 3 of them with another label, first: "
        f"{tmp_path}/validation.parquet:30 and {tmp_path}/train.parquet:40; remove them, or set data.leakage: off\n"
    )
    record = prepared.run.read_record("leakage.json", LeakageRecord)
    assert [(p.split, p.other, p.duplicates) for p in record.pairs] == [
        ("validation", "train", 3), ("test", "train", 0), ("test", "validation", 0),
    ]  # fmt: skip
    assert record.columns == ("text",)


def test_unchanged_data_is_compared_once(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(_job(tmp_path, tiny_bert, _leaky()))
    _check_in_background(prepared)
    calls: list[object] = []
    monkeypatch.setattr(preflight, "find_duplicates", lambda *args: calls.append(args) or find_duplicates(*args))
    splits = dict(prepared.splits)
    assert preflight.compare_splits(prepared.job, prepared.run, splits) is not None
    del splits["test"]
    assert preflight.compare_splits(prepared.job, prepared.run, splits) is not None, "a part of what was compared"
    assert not calls
    splits["validation"] = _split(tmp_path / "new", "validation", example_table(33, 5))
    assert preflight.compare_splits(prepared.job, prepared.run, splits) is not None and len(calls) == 1


def test_leakage_error_refuses_before_anything_is_written(tiny_bert: Path, tmp_path: Path) -> None:
    from launcher.driver.run import run_job

    job = _job(tmp_path, tiny_bert, _leaky(), leakage="error")
    with pytest.raises(
        DataError, match=r"^data\.leakage: 3 of 33 validation rows are also in train .* set data\.leakage: warn$"
    ):
        run_job(job, Console(file=StringIO()))
    assert not (tmp_path / "runs").exists()


def test_leakage_off_and_a_single_split_compare_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    prepared = prepare(_job(tmp_path, tiny_bert, _leaky(), leakage="off"))
    assert preflight.compare_splits(prepared.job, prepared.run, prepared.splits) is None
    alone = prepare(_job(tmp_path / "alone", tiny_bert, {"train": example_table(20)}))
    assert preflight.compare_splits(alone.job, alone.run, alone.splits) is None


def test_failed_or_stopped_comparison_does_not_end_the_run(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(_job(tmp_path, tiny_bert, _leaky()))

    def fail(*_: object) -> None:
        raise DataError("train.parquet: cannot be read")

    with monkeypatch.context() as patched:
        patched.setattr(preflight, "find_duplicates", fail)
        note = _check_in_background(prepared)
    assert note == "note: the splits were not compared for rows in common (train.parquet: cannot be read)\n"

    def wait(*args: Any) -> None:
        args[3].wait(20)
        raise SearchStopped

    monkeypatch.setattr(preflight, "find_duplicates", wait)
    with (
        pytest.raises(KeyboardInterrupt),
        preflight.check_leakage_in_background(
            prepared.job, prepared.run, prepared.splits, None, Console(file=StringIO())
        ),
    ):
        raise KeyboardInterrupt
    assert not prepared.run.exists("leakage.json")


def test_search_stops_between_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    calls: list[int] = []
    hash_rows = duplicates.hash_rows

    def counted(columns: list[pa.Array]) -> Any:
        calls.append(1)
        if len(calls) == 5:
            stop.set()
        return hash_rows(columns)

    monkeypatch.setattr(duplicates, "hash_rows", counted)
    table = pa.table({"text": [str(i) for i in range(1000)]})
    splits = {"train": _split(tmp_path, "train", table, 10), **_splits(tmp_path, test=table.slice(0, 3))}
    with pytest.raises(SearchStopped):
        find_duplicates(splits, _Columns(["text"]), threads=1, stop=stop)
    assert len(calls) == 5


def test_sweep_compares_once_and_does_not_read_the_test_split(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.tune import run as tuner
    from launcher.tune.run import run_sweep

    job = _job(tmp_path, tiny_bert, _leaky())
    (tmp_path / "test.parquet").write_bytes(b"no Parquet file: opening it raises")
    tune = {"space": {"train.learning_rate": {"uniform": [1e-4, 1e-3]}}, "trials": 1}
    job = type(job).model_validate({**job.model_dump(), "tune": tune})
    record = tmp_path / "runs" / "test" / "leakage.json"

    def no_trials(*_: object) -> None:
        for _ in range(400):
            if record.exists():
                break
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "run_trials", no_trials)
    console = Console(file=StringIO(), width=400)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(job, console)
    pairs = LeakageRecord.model_validate_json(record.read_bytes()).pairs
    assert [(pair.split, pair.other, pair.duplicates) for pair in pairs] == [("validation", "train", 3)]
    assert "note: 3 of 33 validation rows are also in train" in console.file.getvalue()  # type: ignore[attr-defined]


def test_report_shows_leaks_or_that_there_are_none(make_leaky_run: Callable[[LeakageRecord], RunDir]) -> None:
    clean = LeakPair(
        split="test", other="train", rows=1821, searched_rows=6920, other_rows=6920, duplicates=0, other_label=0,
        examples=(),
    )  # fmt: skip
    record = LeakageRecord(fingerprints={}, columns=("text",), pairs=(clean,), seconds=0.1)
    assert no_leak_sentence(record) == "no row of test is in train"
    assert "Rows in common: no row of test is in train (text)." in render_report(collect(make_leaky_run(record)))
    leaky = record.model_copy(update={"pairs": (clean.model_copy(update={"duplicates": 12, "other_label": 2}),)})
    page = render_report(collect(make_leaky_run(leaky)))
    assert "12 of 1821 test rows are also in train (0.7 %), 2 of them with another label" in page
    assert "Test rows in train" in page and "Rows in common:" not in page


@pytest.fixture
def make_leaky_run(tmp_path: Path) -> Callable[[LeakageRecord], RunDir]:
    def make(record: LeakageRecord) -> RunDir:
        run = RunDir(str(tmp_path / "run"))
        job = "name: run\ntask: {type: text-classification}\nmodel: {name: m}\ndata: {train: t, test: u}\n"
        run.write_bytes("job.yaml", job.encode())
        run.write_record("leakage.json", record)
        return run

    return make
