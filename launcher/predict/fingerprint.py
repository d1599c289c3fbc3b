"""Fingerprints of everything that predictions depend on: the model's files and the input's. Runs on the head.

`output.py` records them in the manifest of an output directory.
"""

import hashlib

import pyarrow.fs as pafs

from launcher.data.splits import Split
from launcher.rundir.directory import RunDir, open_uri
from launcher.spec.curve import job_values
from launcher.spec.job import JobSpec

# Of large files (weights) this many blocks are hashed, evenly spread: other weights differ nearly everywhere, and
# reading gigabytes would take minutes. Smaller files (config, tokenizer) are hashed whole.
_BLOCKS = 64
_BLOCK_BYTES = 64 << 10


def model_fingerprint(run: RunDir) -> str:
    """Return a SHA-256 (hex) over names, sizes and contents of a run's exported model, without its model card."""
    fs, root = open_uri(run.path("model"))
    files = fs.get_file_info(pafs.FileSelector(root, recursive=True))
    digest = hashlib.sha256()
    # File systems list in any order, and the digest must not depend on it.
    for info in sorted(files, key=lambda info: str(info.path)):
        if info.type != pafs.FileType.File or info.base_name == "README.md":  # scores are added to the card later
            continue
        digest.update(f"{info.path[len(root) :]}\0{info.size}\0".encode())
        with fs.open_input_file(info.path) as file:
            for begin, length in _blocks(int(info.size)):
                digest.update(file.read_at(length, begin))
    return digest.hexdigest()


def _blocks(size: int) -> list[tuple[int, int]]:
    """Return offset and length in bytes of each block of a file that is hashed."""
    if size <= _BLOCKS * _BLOCK_BYTES:
        return [(0, size)]
    # The first and the last block are among them: formats of weights have their index at either end.
    return [(i * (size - _BLOCK_BYTES) // (_BLOCKS - 1), _BLOCK_BYTES) for i in range(_BLOCKS)]


def input_fingerprint(split: Split) -> str:
    """Return a SHA-256 (hex) over the input's files, as the split has it, and its columns."""
    return hashlib.sha256(f"{split.fingerprint}\n{split.schema.to_string()}".encode()).hexdigest()


def prediction_options(job: JobSpec) -> dict[str, str]:
    """Return the keys of the job file that predictions depend on, values as JSON.

    Workers, batch sizes and `data.on_bad_row` are not among them: a row's prediction is the same under each.
    """
    return {key: value for key, value in job_values(job).items() if key.startswith("task.")}
