"""`data:` in the job file: where the rows come from and in which order they are read. Runs anywhere."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from launcher.spec.base import Section
from launcher.spec.hub import HUB_PREFIX, parse_hub

SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
}
"""Format of a data file by its file name extension."""
COMPRESSED = (".gz", ".bz2", ".zst")
"""Extensions of compressed CSV, TSV, JSON Lines and text files. They are decompressed while reading."""


def _to_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _check_hub(location: str) -> str:
    if location.startswith(HUB_PREFIX):
        parse_hub(location)
    return location


# An empty path would mean the working directory and every data file in it.
_Location = Annotated[str, Field(min_length=1), AfterValidator(_check_hub)]
_Several = Annotated[tuple[_Location, ...], Field(min_length=1)]
# Without the input type the schema would allow only a list, and editors would mark a single path.
Locations = Annotated[_Several, BeforeValidator(_to_tuple, json_schema_input_type=_Location | _Several)]
"""One path or several: files, directories, globs, URIs, or datasets of the Hugging Face Hub (`spec/hub.py`)."""


_Directory = Annotated[str, Field(min_length=1)]
_Directories = Annotated[
    tuple[_Directory, ...],
    BeforeValidator(_to_tuple, json_schema_input_type=_Directory | tuple[_Directory, ...]),
]


SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]


class CacheSpec(Section):
    """`data.cache:` On-disk cache of encoded rows, shared by epochs, runs and trials."""

    path: str | None = Field(default=None, min_length=1)
    """Directory on each node's disk or on a shared file system; null uses `.cache/encoded` in `output.storage`."""

    gib: float = Field(default=20.0, gt=0.0)
    """Maximum size in GiB. Beyond it, the least recently used entries are removed and further rows are not cached."""

    @model_validator(mode="after")
    def _check_path(self) -> "CacheSpec":
        if self.path is not None and "://" in self.path:
            raise ValueError(
                f"path is {self.path}, but the cache needs many small reads; give a directory on the nodes"
            )
        return self


Weight = Annotated[float, Field(ge=0.0, lt=1e9)]
"""Weight of a source; only the ratios of weights count."""
Step = Annotated[int, Field(ge=0)]


class SourceSpec(Section):
    """`data.mixture.NAME:` One source of a mixture."""

    train: Locations
    """Training data of this source, as `data.train`."""

    validation: Locations | None = None
    """Validation data of this source: scored with those of the other sources, and by itself (`NAME/loss`)."""

    test: Locations | None = None
    """Test data of this source."""

    weight: Weight | Annotated[dict[Step, Weight], Field(min_length=1)] = 1.0
    """Share of this source in each global batch, relative to the other weights. {step: weight, ...} changes it: linear
    between the steps, constant before the first and after the last."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of this source that are named differently: {column that the task reads: column in the files}."""


class DataSpec(Section):
    """`data:` Where the rows come from and in which order they are read."""

    train: Locations | None = None
    """Training data: one path or a list. Each is a file, a directory, a glob (`*` matches within one directory, `**`
    across directories), a URI (s3://, gs://, hdfs://) or a Hugging Face dataset (hub:NAME, hub:ORG/NAME or
    hub:ORG/NAME/CONFIG, each with #SPLIT)."""

    validation: Locations | None = None
    """Validation data, evaluated during training to choose the best checkpoint and to stop early."""

    test: Locations | None = None
    """Test data, evaluated once after training with the best checkpoint."""

    mixture: Annotated[dict[SourceName, SourceSpec], Field(min_length=1)] | None = None
    """Several sources by name, instead of `train`: every global batch has exact shares of them by their weights."""

    until: Literal["exhausted", "repeat"] = "exhausted"
    """End of an epoch of a mixture: `exhausted` before the first source would repeat a row, `repeat` when every row of
    every source was used; smaller sources then start again, shuffled anew."""

    weight_unit: Literal["rows", "tokens"] = "rows"
    """Unit of the weights of a mixture. With `tokens` a source's share of rows is its weight divided by the mean length
    of its rows, measured on a sample before training."""

    format: Literal["auto", "parquet", "arrow", "csv", "jsonl", "text"] = "auto"
    """File format. `auto` takes it from the file name: .parquet, .arrow/.feather, .csv/.tsv, .jsonl/.json or .txt; all
    but the first two may be compressed (.gz, .bz2, .zst). JSON files hold one object per line or one array of objects.
    Each line of a text file is a row with the column `text`."""

    files_below: _Directories = ()
    """Additional directories or URIs whose files the data may refer to by path (images). Files below the directories of
    the data itself are always allowed. The author of the data can make the launcher read any file in these places."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with an unusable row (null text, unknown label): stop with an error that names it, or skip and count
    it."""

    cache: CacheSpec | None = None
    """Cache encoded rows on disk; `{}` uses the defaults. Useful if encoding is expensive: images, long texts, many
    trials. Augmented rows are never cached."""

    leakage: Literal["warn", "error", "off"] = "warn"
    """Search for validation and test rows whose inputs also occur in the training data. `warn` reports them while
    training starts, `error` refuses to train, `off` does not search."""

    group_by_length: bool = True
    """Put samples of similar length into the same global batch: less padding, same rows."""

    # 32 steps amortise the few milliseconds that Ray Data spends on a block and give length grouping enough rows to
    # choose from. The first step waits for one window.
    window_steps: int = Field(default=32, ge=1, le=4096)
    """Global batches that are read, encoded and split together. Part of the row order, so it changes the loss curve."""

    @model_validator(mode="after")
    def _check_sources(self) -> "DataSpec":
        if (self.train is None) == (self.mixture is None):
            both = "train and mixture are both given" if self.train else "train is missing"
            raise ValueError(f"{both}; give train, or a mixture of several sources")
        for split in ("validation", "test"):
            named = [name for name, source in (self.mixture or {}).items() if getattr(source, split) is not None]
            if named and getattr(self, split) is not None:
                raise ValueError(f"{split} is given here and in mixture.{named[0]}; give it in one place")
        if self.mixture and not any(weight for source in self.mixture.values() for weight in _weights(source.weight)):
            raise ValueError("mixture: all weights are 0; give one source a positive weight")
        return self

    def places(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Yield the key and the location of all data, as (("mixture", "news", "train", 0), "news.parquet")."""
        sections: list[tuple[tuple[str, ...], DataSpec | SourceSpec]] = [((), self)]
        sections += [(("mixture", name), source) for name, source in (self.mixture or {}).items()]
        for key, section in sections:
            for split in ("train", "validation", "test"):
                for index, location in enumerate(getattr(section, split) or ()):
                    yield (*key, split, index), location

    def locations(self, split: str) -> tuple[str, ...]:
        """Return the locations of a split (`train`, `validation` or `test`), of all sources; () if there are none."""
        return tuple(location for key, location in self.places() if key[-2] == split)

    def with_test_of(self, other: "DataSpec | None") -> "DataSpec":
        """Return this section with the test data of another one that has the same sources; None leaves it out."""
        sources = {} if other is None else other.mixture or {}
        mixture = self.mixture and {
            name: source.model_copy(update={"test": sources[name].test if name in sources else None})
            for name, source in self.mixture.items()
        }
        return self.model_copy(update={"test": None if other is None else other.test, "mixture": mixture})

    def with_validation_in_training(self) -> "DataSpec":
        """Return this section with the validation data of each source as further training data."""
        if self.mixture is None:
            both = (*self.locations("train"), *self.locations("validation"))
            return self.model_copy(update={"train": both, "validation": None})
        mixture = {
            name: source.model_copy(update={"train": (*source.train, *(source.validation or ())), "validation": None})
            for name, source in self.mixture.items()
        }
        return self.model_copy(update={"mixture": mixture})

    # A data worker decodes each pool once, together with the rows before its slices in the same row groups.
    shuffle_pool_mib: int = Field(default=64, ge=1, le=65536)
    """Size of a shuffle pool in MiB, uncompressed. A pool takes slices from all over the files, and rows are shuffled
    within it; smaller datasets are shuffled as a whole. A data worker holds one pool in memory."""


def _weights(weight: float | dict[int, float]) -> tuple[float, ...]:
    return tuple(weight.values()) if isinstance(weight, dict) else (weight,)
