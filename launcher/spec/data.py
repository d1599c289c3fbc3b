"""`data:` in the job file: where the rows come from and in which order they are read. Runs anywhere."""

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


class DataSpec(Section):
    """`data:` Where the rows come from and in which order they are read."""

    train: Locations
    """Training data: one path or a list. Each is a file, a directory, a glob (`*` matches within one directory, `**`
    across directories), a URI (s3://, gs://, hdfs://) or a Hugging Face dataset (hub:NAME, hub:ORG/NAME or
    hub:ORG/NAME/CONFIG, each with #SPLIT)."""

    validation: Locations | None = None
    """Validation data, evaluated during training to choose the best checkpoint and to stop early."""

    test: Locations | None = None
    """Test data, evaluated once after training with the best checkpoint."""

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

    # A data worker decodes each pool once, together with the rows before its slices in the same row groups.
    shuffle_pool_mib: int = Field(default=64, ge=1, le=65536)
    """Size of a shuffle pool in MiB, uncompressed. A pool takes slices from all over the files, and rows are shuffled
    within it; smaller datasets are shuffled as a whole. A data worker holds one pool in memory."""
