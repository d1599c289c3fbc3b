"""Files are told apart by their names, and named in a job file by what means just them."""

from pathlib import Path

import pytest

from launcher.errors import DataError
from launcher.init.splits import FoundSplits, find_splits, job_name, split_of


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _touch(*paths: str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.parquet", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("train/part-0.parquet", "train"),
        ("sst2_dev.csv", "validation"),
        ("val.jsonl", "validation"),
        ("valid/a.parquet", "validation"),
        ("TEST.parquet", "test"),
        ("train/test-clip.parquet", "train"),
        ("train_test.parquet", ""),
        ("contest.parquet", ""),
        ("items.parquet", ""),
    ],
)
def test_names_tell_splits(path: str, split: str) -> None:
    assert split_of(path) == split


@pytest.mark.parametrize(
    ("files", "locations"),
    [
        (["train.parquet", "valid.csv"], {"train": ("d/train.parquet",), "validation": ("d/valid.csv",)}),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet"],
            {"train": ("d/data/train-*.parquet",), "test": ("d/data/test-0.parquet",)},
        ),
        (["train/a.csv", "train/b.csv", "dev/a.csv"], {"train": ("d/train",), "validation": ("d/dev/a.csv",)}),
        (["a.parquet", "b.parquet"], {"train": ("d",)}),
        (["data-0.arrow", "data-1.arrow", "state.json"], {"train": ("d",)}),
        (["train/data-0.arrow", "train/state.json", "dataset_dict.json"], {"train": ("d/train/data-0.arrow",)}),
        (["a.pq", "b.pq", "test.pq"], {"train": ("d/a.pq", "d/b.pq"), "test": ("d/test.pq",)}),
    ],
)
def test_a_directory_is_taken_apart(files: list[str], locations: dict[str, tuple[str, ...]], here: Path) -> None:
    _touch(*(f"d/{file}" for file in files))
    assert find_splits("d").locations == locations
    absolute = {name: tuple(f"{here}/{place}" for place in places) for name, places in locations.items()}
    assert find_splits(f"{here}/d").locations == absolute


def test_what_belongs_to_no_split_is_left_out(here: Path) -> None:
    _touch("d/train.parquet", "d/items.parquet")
    assert find_splits("d") == FoundSplits({"train": ("d/train.parquet",)}, ("items.parquet",))


def test_a_single_file_is_for_training_whatever_its_name(here: Path) -> None:
    _touch("train.parquet", "validation.parquet", "eval.parquet", "sub/test.parquet")
    assert find_splits("train.parquet") == FoundSplits(
        {"train": ("train.parquet",)}, (), {"validation": "validation.parquet"}
    )
    assert find_splits("validation.parquet") == FoundSplits({"train": ("validation.parquet",)})
    assert find_splits("trai*.parquet").locations == {"train": ("train.parquet",)}
    assert find_splits("hub:org/name#train") == FoundSplits({"train": ("hub:org/name#train",)})


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("nowhere", "nowhere does not exist; give a file, a directory or a glob that does"),
        ("d", "d: its files are all for test and validation by their names; name the file to train on"),
        ("*.parquet", "*.parquet matches no data files (.parquet, .pq, .arrow, .feather, .ipc, .csv, .tsv, .jsonl, "
                      ".ndjson, .json, .txt); name the files so"),
    ],
)  # fmt: skip
def test_nothing_to_train_on(location: str, said: str, here: Path) -> None:
    _touch("d/test.parquet", "d/dev.parquet")
    with pytest.raises(DataError) as caught:
        find_splits(location)
    assert caught.value.message == said


@pytest.mark.parametrize(
    ("location", "output", "name"),
    [
        ("data/sst2/train.parquet", "job", "sst2"),
        ("data/my reviews/*.csv", "job", "my-reviews"),
        ("reviews.csv", "job", "reviews"),
        ("data/sst2/", "mine", "mine"),
        ("hub:org/imdb#train", "job", "imdb"),
        ("s3://bucket/texts?region=eu", "job", "texts"),
        ("data/sst2", "ü.1", "1"),
    ],
)
def test_names_of_runs(location: str, output: str, name: str) -> None:
    assert job_name(location, output) == name
