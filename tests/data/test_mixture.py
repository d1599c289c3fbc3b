"""Shares of the sources of a mixture: exact in every batch, a pure function of the job file."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.mixed_splits import mix_splits
from launcher.data.mixture import cumulative_rows, cut_mixed_batches, parts_at, passes, steps_per_epoch
from launcher.data.rank_batches import deserialize_shard
from launcher.data.row_order import row_ranges
from launcher.data.splits import open_split
from launcher.data.windows import train_windows
from launcher.driver.prepare import PreparedJob, prepare
from launcher.errors import DataError, SpecError
from launcher.spec.job import JobSpec
from launcher.spec.tune import TuneSpec
from launcher.tasks import params_class
from launcher.tune.space import check_space, trial_job
from tests.support.jobs import example_table, make_job, prepared_job
from tests.support.worker_group import run_group, share_cells, train_losses, with_job

_WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


def _constant(*weights: float) -> Any:
    return tuple(((0, weight),) for weight in weights)


@settings(deadline=None)
@given(_WEIGHTS, st.integers(1, 70))
def test_each_batch_is_full_and_shares_never_drift(weights: list[float], batch_size: int) -> None:
    cumulative = cumulative_rows(_constant(*weights), batch_size, 300)
    counts = np.diff(cumulative, axis=0)
    assert counts.min() >= 0
    assert (counts.sum(1) == batch_size).all()
    exact = np.array(parts_at(_constant(*weights), 0)) / 1e6 * batch_size * np.arange(301)[:, None]
    assert np.abs(cumulative - exact).max() < 1.5 if len(weights) > 2 else np.abs(cumulative - exact).max() <= 0.5


def test_weights_of_97_to_3_give_one_row_in_most_batches_of_32() -> None:
    counts = np.diff(cumulative_rows(_constant(0.97, 0.03), 32, 100), axis=0)
    assert counts[:, 1].sum() == 96  # 0.03 * 32 * 100
    assert set(counts[:, 1].tolist()) == {0, 1}
    assert counts[:25, 1].sum() == 24


def test_weights_may_change_over_steps() -> None:
    counts = np.diff(cumulative_rows((((0, 1.0), (100, 0.0)), ((0, 0.0), (100, 1.0))), 10, 100), axis=0)
    assert counts[0].tolist() == [10, 0]
    assert counts[50].tolist() == [5, 5]
    assert counts[-1, 1] >= 9
    assert abs(int(counts[:, 0].sum()) - 505) <= 1


def test_an_epoch_ends_before_a_row_repeats_or_when_all_rows_were_used() -> None:
    names = ("a", "b")
    assert steps_per_epoch(_constant(0.5, 0.5), 10, (100, 37), names, "exhausted") == 7
    assert steps_per_epoch(_constant(0.5, 0.5), 10, (100, 37), names, "repeat") == 20
    assert steps_per_epoch(_constant(1.0, 0.0), 10, (100, 37), names, "repeat") == 10
    with pytest.raises(DataError, match=r"data\.mixture\.b: has 3 rows, fewer than its 5 of a single batch; set data"):
        steps_per_epoch(_constant(0.5, 0.5), 10, (100, 3), names, "exhausted")
    with pytest.raises(DataError, match=r"data\.mixture\.a: with its weight an epoch .* more than 5000000 steps"):
        steps_per_epoch(_constant(1e-6, 1.0), 2, (1000, 37), names, "repeat")


def test_places_of_a_source_run_through_its_epochs() -> None:
    assert passes(5, 27, 10) == [(0, 5, 10), (1, 0, 10), (2, 0, 7)]
    assert passes(10, 10, 10) == []


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_batches_have_the_rows_of_each_source_that_their_step_has(seed: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, (steps, 3))
    source = np.repeat(np.arange(3), counts.sum(0))
    lengths = rng.integers(1, 99, len(source))
    batches = cut_mixed_batches(lengths, source, counts, np.random.default_rng(seed))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(source)))
    assert [np.bincount(source[batch], minlength=3).tolist() for batch in batches] == counts.tolist()


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    """Two sources of different columns, the second with named classes in another order."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for seed, (name, rows) in enumerate({"news": 400, "news-validation": 60}.items()):
        pq.write_table(example_table(rows, seed), folder / f"{name}.parquet", row_group_size=50)
    for seed, (name, rows) in enumerate({"tweets": 23, "tweets-validation": 31}.items()):
        table = example_table(rows, 7 + seed)
        renamed = pa.table({"id": list(range(rows)), "tweet": table["text"], "mood": table["label"]})
        pq.write_table(renamed, folder / f"{name}.parquet", row_group_size=7)
    tweets = {"weight": 0.03, "columns": {"text": "tweet", "label": "mood"}}
    return {
        "news": {"train": f"{folder}/news.parquet", "validation": f"{folder}/news-validation.parquet", "weight": 0.97},
        "tweets": {"train": f"{folder}/tweets.parquet", "validation": f"{folder}/tweets-validation.parquet", **tweets},
    }


@pytest.fixture
def job(tiny_bert: Path, tmp_path: Path, sources: dict[str, Any]) -> PreparedJob:
    data = {"mixture": sources, "until": "repeat"}
    return prepared_job(tiny_bert, data, tmp_path, train={"max_steps": 60, "learning_rate": 3e-3})


def _batches(job: PreparedJob, workers: int, start: int = 0) -> list[list[int]]:
    """Return the row ids of each global batch, sorted."""
    batches: dict[int, list[int]] = {}
    for rank in range(workers):
        for shard in share_cells(job, workers, rank, start):
            header, local = deserialize_shard(shard)
            if header.kind == "train":
                for offset, batch in enumerate(local):
                    rows = [r for m in batch.micro_batches for r in m.column("__row").to_pylist() if r >= 0]
                    batches.setdefault(header.first_step + offset, []).extend(rows)
    return [sorted(batches[step]) for step in sorted(batches)]


def test_every_batch_has_its_shares_on_any_number_of_workers_and_after_a_stop(job: PreparedJob) -> None:
    whole = _batches(job, 1)
    assert _batches(job, 3) == whole
    assert _batches(job, 2, start=9) == whole[9:]
    counts = np.array([[sum(row < 400 for row in batch), sum(row >= 400 for row in batch)] for batch in whole])
    assert counts.tolist() == np.diff(cumulative_rows(_constant(0.97, 0.03), 11, 60), axis=0).tolist()
    # Each pass over a source has every row once, whatever the steps.
    tweets = [row for batch in whole for row in batch if row >= 400]
    assert len(tweets) == 20
    news = Counter(row for batch in whole for row in batch if row < 400)
    assert len(news) == 400
    assert set(news.values()) == {1, 2}


def test_a_longer_run_begins_with_the_same_batches(tiny_bert: Path, tmp_path: Path, sources: dict[str, Any]) -> None:
    data = {"mixture": sources, "until": "repeat", "window_steps": 8}
    jobs = [prepared_job(tiny_bert, data, tmp_path, train={"max_steps": steps}) for steps in (11, 30)]
    short, long = (_batches(job, 1) for job in jobs)
    assert short == long[:11]


def test_smaller_sources_start_again_in_another_order(tiny_bert: Path, tmp_path: Path, sources: dict[str, Any]) -> None:
    sources["news"]["weight"] = sources["tweets"]["weight"] = 1.0
    data = {"mixture": sources, "until": "repeat", "group_by_length": False}
    job = prepared_job(tiny_bert, data, tmp_path, train={"max_steps": 21})
    tweets = [row for batch in _ordered(job) for row in batch if row >= 400]
    first, second = tweets[:23], tweets[23:46]
    assert set(first) == set(second) == set(range(400, 423))
    assert first != second


def _ordered(job: PreparedJob) -> list[list[int]]:
    windows = [window for window in train_windows(job.plan, job.job, 0) if window.kind == "train"]
    return [np.concatenate([p.ids for p in row_ranges(job.job, job.splits["train"], w)]).tolist() for w in windows]


def test_the_plan_tells_shares_and_epochs(job: PreparedJob) -> None:
    notes = [note for note in job.plan.notes if note.startswith("data.mixture")]
    assert notes[0] == "data.mixture: news 97 % of the rows, 1.60 epochs; tweets 3 % of the rows, 0.87 epochs"
    assert len(notes) == 1
    assert job.plan.validation_sources == (60, 31)


def test_the_plan_names_rows_that_are_never_read(tiny_bert: Path, tmp_path: Path, sources: dict[str, Any]) -> None:
    sources["news"]["weight"] = sources["tweets"]["weight"] = 1.0
    notes = prepared_job(tiny_bert, {"mixture": sources}, tmp_path).plan.notes
    assert "data.mixture.news: 378 of its 400 rows are not read; train longer, or set data.until: repeat" in notes


def _curve(job: PreparedJob) -> list[Any]:
    return [train_losses(job), [line for line in _lines(job) if line["kind"] == "evaluation"], _sources(job)]


def _lines(job: PreparedJob) -> list[Any]:
    return [json.loads(line) for line in job.run.read_bytes("metrics.jsonl").splitlines()]


def _sources(job: PreparedJob) -> list[Any]:
    return [line["sources"] for line in _lines(job) if line["kind"] == "step"]


def test_curve_and_scores_of_each_source_do_not_depend_on_workers_or_interruptions(job: PreparedJob) -> None:
    few = {
        "train": {**job.job.train.model_dump(), "max_steps": 20},
        "evaluation": {"every_steps": 10, "batch_size": 16},
    }
    every = {**few, "checkpoint": {"every_steps": 5, "every_minutes": None}}
    losses, evaluations, sources = run_group(1, _curve, with_job(job, name="one", **every, cluster={"workers": 1}))
    three = with_job(job, name="three", **every, cluster={"workers": 3}, parallel={"micro_batch": 2, "zero": 2})
    other_losses, other_evaluations, other_sources = run_group(3, _curve, three)
    assert np.abs(np.array(losses) - np.array(other_losses)).max() < 1e-5
    for line, other in zip(evaluations, other_evaluations, strict=True):
        assert line["rows"] == other["rows"] == 91
        assert line["metrics"] == pytest.approx(other["metrics"], abs=1e-5)
        mixed = (60 * line["metrics"]["news/loss"] + 31 * line["metrics"]["tweets/loss"]) / 91
        assert line["loss"] == pytest.approx(mixed)
    assert [line.keys() for line in sources] == [line.keys() for line in other_sources]
    assert {frozenset(line) for line in sources} == {frozenset({"news"}), frozenset({"news", "tweets"})}
    stopped = with_job(job, name="stopped", **every)
    run_group(2, train_losses, stopped, 12)
    reference = dict(map(tuple, losses))
    for step, loss in run_group(3, train_losses, with_job(stopped, cluster={"workers": 3})):
        assert loss == pytest.approx(reference[step], abs=1e-5)


def test_packed_sequences_have_rows_of_one_source(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    mixture = {}
    for seed, name in enumerate(("a", "b")):
        pq.write_table(example_table(50, seed, "causal-lm"), tmp_path / f"{name}.parquet")
        mixture[name] = {"train": str(tmp_path / f"{name}.parquet")}
    task = {"type": "causal-lm", "max_length": 48, "packing": True}
    job = prepared_job(tiny_models["causal-lm"], {"mixture": mixture, "weight_unit": "tokens"}, tmp_path, task=task)
    assert job.job.data.weight_unit == "rows"
    for shard in share_cells(job, 2, 0, 0):
        header, batches = deserialize_shard(shard)
        for batch, step in zip(batches, header.steps, strict=True):
            assert sum(step.source_weights) == pytest.approx(step.weight)
            for micro in batch.micro_batches:
                assert micro.num_rows == len(micro.column("segments"))
                for row, source in zip(
                    micro.column("__row").to_pylist(), micro.column("__source").to_pylist(), strict=True
                ):
                    assert row < 0 or (row >= 50) == (source == 1)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"train": "x.parquet"}, "train and mixture are both given; give train, or a mixture"),
        ({"mixture": None}, "train is missing; give train, or a mixture"),
        ({"validation": "x.parquet"}, r"validation is given here and in mixture\.news"),
    ],
)
def test_data_come_from_one_place(
    change: dict[str, Any], error: str, sources: dict[str, Any], tiny_bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=error):
        make_job(tiny_bert, {"mixture": sources, **change}, tmp_path)


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        (
            {"text": "twet", "label": "mood"},
            r"tweets\.parquet: has no column 'twet', which data\.mixture names; it has",
        ),
        ({"text": "tweet"}, r"tweets\.parquet: has no column 'label', which .*news\.parquet has"),
        (
            {"text": "tweet", "label": "mood", "id": "mood"},
            r"already has a column 'id', which data\.mixture takes from",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    columns: dict[str, str], error: str, sources: dict[str, Any], tiny_bert: Path, tmp_path: Path
) -> None:
    sources["tweets"]["columns"] = columns
    with pytest.raises(DataError, match=error):
        prepare(make_job(tiny_bert, {"mixture": sources}, tmp_path))


def test_one_column_of_the_files_may_be_two_of_the_task(tmp_path: Path) -> None:
    for name, table in {"a": {"text": ["a"], "target": ["b"]}, "b": {"words": ["c", "d"]}}.items():
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    sources = [(name, open_split("train", [f"{tmp_path}/{name}.parquet"])) for name in ("a", "b")]
    split = mix_splits("train", sources, [{}, {"text": "words", "target": "words"}])
    assert split.read(np.arange(3), ["target", "text"]).to_pydict() == {
        "target": ["b", "c", "d"], "text": ["a", "c", "d"],
    }  # fmt: skip


def test_caches_of_a_mixture_depend_on_the_columns_that_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"title": ["a"], "body": ["b"]}), tmp_path / "a.parquet")
    sources = [("a", open_split("train", [f"{tmp_path}/a.parquet"]))]
    title, body = (mix_splits("train", sources, [{"text": name}]) for name in ("title", "body"))
    assert title.fingerprint == body.fingerprint
    assert title.version != body.version


def test_a_weight_can_be_searched_and_other_data_cannot(
    sources: dict[str, Any], tiny_bert: Path, tmp_path: Path
) -> None:

    job: JobSpec = make_job(tiny_bert, {"mixture": sources}, tmp_path)
    check_space(
        job, TuneSpec.model_validate({"space": {"data.mixture.tweets.weight": {"choice": [0.1, 0.5]}}}), params_class
    )
    tried = trial_job(job, {"data.mixture.tweets.weight": 0.5}, params_class)
    assert tried.data.mixture is not None
    assert tried.data.mixture["tweets"].weight == 0.5
    with pytest.raises(SpecError, match="cannot be searched, because all trials share it"):
        check_space(job, TuneSpec.model_validate({"space": {"data.window_steps": {"choice": [1, 2]}}}), params_class)


def test_an_evaluation_may_rank_by_a_source(sources: dict[str, Any], tiny_bert: Path, tmp_path: Path) -> None:
    job = prepared_job(tiny_bert, {"mixture": sources}, tmp_path, evaluation={"metric": "tweets/accuracy"})
    assert (job.plan.metric, job.plan.metric_mode) == ("tweets/accuracy", "max")
    with pytest.raises(DataError, match="evaluation"):
        prepared_job(tiny_bert, {"mixture": sources}, tmp_path, evaluation={"metric": "tweet/accuracy"})
