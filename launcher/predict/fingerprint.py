"""What predictions depend on, as fingerprints: the model's files, the input's. On the head; read `output.py` next."""

import hashlib

import pyarrow.fs as pafs

from launcher.data.splits import Split
from launcher.rundir.directory import RunDir, open_uri
from launcher.spec.curve import job_values
from launcher.spec.job import JobSpec

# Weights are looked at in as many places, evenly spread: other weights differ nearly everywhere, and gigabytes are
# not read for it. Smaller files (config, tokenizer) are read whole.
_PLACES = 64
_PLACE_BYTES = 64 << 10


def model_fingerprint(run: RunDir) -> str:
    """Sha256 (hex) over names, sizes and contents of a run's exported model, its card left out."""
    fs, root = open_uri(run.path("model"))
    found = fs.get_file_info(pafs.FileSelector(root, recursive=True))
    digest = hashlib.sha256()
    for info in sorted(found, key=lambda info: str(info.path)):
        if info.type != pafs.FileType.File or info.base_name == "README.md":  # scores are added to the card
            continue
        digest.update(f"{info.path[len(root) :]}\0{info.size}\0".encode())
        with fs.open_input_file(info.path) as file:
            for begin, length in _places(int(info.size)):
                digest.update(file.read_at(length, begin))
    return digest.hexdigest()


def _places(size: int) -> list[tuple[int, int]]:
    """(offset, bytes) of what is read of a file."""
    if size <= _PLACES * _PLACE_BYTES:
        return [(0, size)]
    return [(i * (size - _PLACE_BYTES) // (_PLACES - 1), _PLACE_BYTES) for i in range(_PLACES)]


def input_fingerprint(split: Split) -> str:
    """Sha256 (hex) over the input's files, as the split has it, and its columns."""
    return hashlib.sha256(f"{split.fingerprint}\n{split.schema.to_string()}".encode()).hexdigest()


def options(job: JobSpec) -> dict[str, str]:
    """The keys of the job file that predictions depend on, values as JSON.

    Workers, batch sizes and what is done with bad rows are not among them: a row's prediction is the same.
    """
    return {key: value for key, value in job_values(job).items() if key.startswith("task.")}
