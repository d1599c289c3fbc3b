"""`data:` in the job file: which rows, from where, in what order. Runs anywhere."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from launcher.spec.base import Section
from launcher.spec.hub import PREFIX, parse_hub

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
"""Format of a data file by the end of its name."""
COMPRESSED = (".gz", ".bz2", ".zst")
"""Endings behind those of CSV, TSV, JSON Lines and text: such files are unpacked as they are read."""


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _readable_hub(location: str) -> str:
    if location.startswith(PREFIX):
        parse_hub(location)
    return location


# An empty path would be the working directory, with whatever lies there.
_Location = Annotated[str, Field(min_length=1), AfterValidator(_readable_hub)]
_Several = Annotated[tuple[_Location, ...], Field(min_length=1)]
Locations = Annotated[_Several, BeforeValidator(_as_tuple, json_schema_input_type=_Location | _Several)]
"""One path or several; each a file, a directory, a glob, a URI, or a data set of the hub (`spec/hub.py`)."""


_Directory = Annotated[str, Field(min_length=1)]
_Directories = Annotated[
    tuple[_Directory, ...],
    BeforeValidator(_as_tuple, json_schema_input_type=_Directory | tuple[_Directory, ...]),
]


class CacheSpec(Section):
    """`data.cache`: rows are encoded once and kept on disk, for later epochs, runs and trials."""

    path: str | None = Field(default=None, min_length=1)
    """A directory on the nodes' disks, or one they share; null is `.cache/encoded` in `output.storage`."""

    gib: float = Field(default=20.0, gt=0.0)
    """How much may lie there; then what was not used for the longest time goes, and rows beyond are not kept."""

    @model_validator(mode="after")
    def _is_a_directory(self) -> "CacheSpec":
        if self.path is not None and "://" in self.path:
            raise ValueError(f"path is {self.path}, but blocks are read in small pieces; give a directory of the nodes")
        return self


class DataSpec(Section):
    """Where the rows come from and how they are put in order."""

    train: Locations
    """Training data: a path or a list; each a file, directory, glob (`*` stays in one directory, `**` crosses them),
    URI (s3://, gs://, hdfs://) or data set of the hub (hub:NAME, hub:ORG/NAME or hub:ORG/NAME/CONFIG, then #SPLIT)."""

    validation: Locations | None = None
    """Data looked at while training, to keep the best checkpoint and to stop early."""

    test: Locations | None = None
    """Data scored once, after training, with the best checkpoint."""

    format: Literal["auto", "parquet", "arrow", "csv", "jsonl", "text"] = "auto"
    """File format; `auto` reads it off the file names (.parquet, .arrow/.feather, .csv/.tsv, .jsonl/.json, .txt; those
    but the first two also packed: .gz, .bz2, .zst). JSON is lines of objects, or one array of them; each line of a
    text is a row with the column `text`."""

    files_below: _Directories = ()
    """Other directories or URIs in which files may lie that cells of the data name (pictures); files below the
    directories of the data themselves always may. Whoever writes the data can have any file there read."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be used (null text, unknown label): stop and name it, or count and skip it."""

    cache: CacheSpec | None = None
    """Keep encoded rows on disk; `{}` takes the defaults. Worth it where encoding is dear: pictures, long texts, many
    trials. Rows that are augmented are always made anew."""

    leakage: Literal["warn", "error", "off"] = "warn"
    """Look for validation and test rows whose inputs are also in the training data: tell (while training begins),
    refuse to train (before it begins), or do not look."""

    group_by_length: bool = True
    """Put samples of like length into the same global batch: less padding, same rows."""

    # 32 steps amortise the few milliseconds Ray Data spends on a block, and give length grouping
    # enough rows to choose from, while the first step need not wait for more than 32 batches.
    window_steps: int = Field(default=32, ge=1, le=4096)
    """Global batches that are read, encoded and cut together; part of the order, so it changes the curve."""

    # A data worker decodes a pool once, and what stands before its slices in their row groups.
    shuffle_pool_mib: int = Field(default=64, ge=1, le=65536)
    """Rows are shuffled inside pools of this many MiB (uncompressed), each with slices from all over the files; smaller
    data sets are shuffled as a whole. A data worker holds one pool."""
