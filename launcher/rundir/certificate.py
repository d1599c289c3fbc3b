"""Certificate of a run, certificate.json: hashes of its results, and the shapes that trained them again. Runs anywhere.

`launcher replay RUN --prove` writes it (`driver/prove.py`), `launcher verify RUN` checks it (`verify.py`). A hash of
its own content is in it too. Anyone can compute that: it shows that the file is whole, not who wrote it.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence

from launcher.errors import CorruptRecordError, RunError
from launcher.rundir.directory import RunDir, open_uri
from launcher.rundir.records import RESTORE, EnvironmentRecord, EvaluationRecord, Record, ScoresRecord, StepRecord
from launcher.rundir.uri import translate_errors
from launcher.spec.scored import EVALUATION_SPLITS

CERTIFICATE = "certificate.json"
_WEIGHT_FOLDERS = ("model", "adapter")
_BLOCK_BYTES = 1 << 22


class RunHashes(Record):
    """SHA-256 (hex) of everything that the training of a run has produced."""

    losses: str
    """Hash over step (int64) and loss (float64), little-endian, of each step in metrics.jsonl."""
    evaluations: str
    """Hash over the evaluations in metrics.jsonl: split, step, rows, loss and metrics."""
    scores: dict[str, str]
    """Hash of the same values in scores-SPLIT.json, by split."""
    weights: dict[str, str]
    """Hash of each file of weights, by its path in the run directory."""


class ShapeProof(Record):
    """One shape that the run was trained again on, and how it compares with the run."""

    run: str
    """Name of the run that was trained on this shape."""
    workers: int
    zero: int
    micro_batch: int
    inexact: tuple[str, ...]
    """Reasons why the bits may differ, so that the curve was compared to a tolerance; () if all bits were."""
    compared: tuple[str, ...]
    is_bit_equal: bool
    """Whether everything that was compared has the same bits."""
    largest_difference: float
    """Largest difference of a loss."""
    failure: str = ""
    """First difference, of a shape that failed; "" of one that is proven."""
    versions: dict[str, str]
    hardware: str

    @property
    def shape(self) -> str:
        """Shape in words."""
        return f"{describe_workers((self.workers,))}, ZeRO {self.zero}"


class Certificate(Record):
    """Content of certificate.json: what was proven of a run."""

    damage_remedy = "write it again with `launcher replay RUN --prove`"

    steps: int
    """Steps that the run trained."""
    virtual_ranks: int
    hashes: RunHashes
    data_fingerprint: str
    """Hash that identifies the training data, as in plan.json."""
    spec_hash: str
    """Hash of those parts of job.yaml that determine the loss curve."""
    versions: dict[str, str]
    """Versions of Python and of the packages that the result depends on."""
    hardware: str
    """Hardware of the run's workers; "" if the run has not recorded it."""
    threads: int
    """CPU threads of a worker."""
    tolerance: float
    """Largest accepted difference of a loss, for shapes whose bits may differ."""
    shapes: tuple[ShapeProof, ...]
    content_sha256: str = ""
    """Hash of all other fields: finds a change of this file, and is no signature."""

    def seal(self) -> "Certificate":
        """Return the certificate with the hash of its content."""
        return self.model_copy(update={"content_sha256": self._hash_content()})

    def with_shapes_of(self, old: "Certificate") -> "Certificate":
        """Return the certificate with those shapes of an older one, of the same results, that it does not have."""
        if not old.is_intact or (old.hashes, old.spec_hash) != (self.hashes, self.spec_hash):
            return self
        shapes = {shape.run: shape for shape in (*old.shapes, *self.shapes)}
        ordered = sorted(shapes.values(), key=lambda shape: (shape.workers, shape.zero))
        return self.model_copy(update={"shapes": tuple(ordered)}).seal()

    @property
    def is_intact(self) -> bool:
        """True if nothing was changed since the certificate was written."""
        return self.content_sha256 == self._hash_content()

    @property
    def is_proven(self) -> bool:
        """True if the certificate is intact, and no shape failed."""
        return self.is_intact and bool(self.shapes) and not any(shape.failure for shape in self.shapes)

    @property
    def sentence(self) -> str:
        """Return one line on what is proven, for the model card and the report."""
        if not self.is_intact:
            return f"Not proven: {CERTIFICATE} was changed after it was written"
        exact = [shape for shape in self.shapes if not shape.inexact and not shape.failure]
        close = [shape for shape in self.shapes if shape.inexact and not shape.failure]
        failed = [shape for shape in self.shapes if shape.failure]
        parts = [f"the same bits on {_describe_shapes(exact)}"] if exact else []
        parts += [f"the same curve within {self.tolerance:g} on {_describe_shapes(close)}"] if close else []
        parts += [f"another curve on {_describe_shapes(failed)}"] if failed else []
        return f"{'Proven' if exact or close else 'Not proven'}: {'; '.join(parts)} ({CERTIFICATE})"

    def _hash_content(self) -> str:
        content = self.model_dump(mode="json", exclude={"content_sha256"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def find_certificate(run: RunDir) -> Certificate | None:
    """Return the certificate of a run; None if there is none, or if its content is damaged.

    A damaged one proves nothing, and must not keep `launcher replay --prove` from writing another one.
    """
    try:
        return run.find_record(CERTIFICATE, Certificate)
    except CorruptRecordError:
        return None


def hash_run(run: RunDir) -> RunHashes:
    """Hash the results of a finished run.

    Raises:
        RunError: A file cannot be read.
    """
    return RunHashes(
        losses=hash_losses(run),
        evaluations=hash_evaluations(run),
        scores={split: hash_scores(run, split) for split in EVALUATION_SPLITS if run.exists(f"scores-{split}.json")},
        weights={path: hash_file(run, path) for path in list_weights(run)},
    )


def hash_losses(run: RunDir) -> str:
    """Return the SHA-256 (hex) of the loss curve."""
    digest = hashlib.sha256()
    for line in run.read_metrics():
        if isinstance(line, StepRecord):
            digest.update(struct.pack("<qd", line.step, line.loss))
    return digest.hexdigest()


def hash_evaluations(run: RunDir) -> str:
    """Return the SHA-256 (hex) of all evaluations during the training."""
    return _hash_records(line for line in run.read_metrics() if isinstance(line, EvaluationRecord))


def hash_scores(run: RunDir, split: str) -> str:
    """Return the SHA-256 (hex) of the final scores of a split."""
    return _hash_records([run.read_record(f"scores-{split}.json", ScoresRecord)])


def hash_file(run: RunDir, relative: str) -> str:
    """Return the SHA-256 (hex) of a file of any size, as `sha256sum` prints it.

    Raises:
        RunError: The file is missing or cannot be read.
    """
    fs, root = open_uri(run.uri)
    digest = hashlib.sha256()
    try:
        with translate_errors(run.path(relative)), fs.open_input_stream(f"{root}/{relative}") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    except FileNotFoundError as error:
        raise RunError(f"{run.path(relative)}: not found; {RESTORE}") from error
    return digest.hexdigest()


def list_weights(run: RunDir) -> tuple[str, ...]:
    """Return the files of exported weights, relative to the run directory."""
    # Files and not tensors: transformers writes names, shapes and data in one order, so equal weights are equal files.
    paths = (f"{folder}/{name}" for folder in _WEIGHT_FOLDERS for name in run.list(folder))
    return tuple(path for path in paths if path.endswith(".safetensors"))


def list_versions(environment: EnvironmentRecord | None) -> dict[str, str]:
    """Return the versions of Python and of the packages of a run; {} if it has not recorded them."""
    return {} if environment is None else {"python": environment.python, **environment.packages}


def describe_hardware(environment: EnvironmentRecord | None) -> str:
    """Return the hardware of a run's workers, each kind once; "" if it has not recorded it."""
    workers = environment.workers if environment is not None else ()
    return "; ".join(dict.fromkeys(worker.hardware for worker in workers if worker.hardware))


def describe_workers(counts: Sequence[int]) -> str:
    """Return numbers of workers in words: `1, 2 and 4 workers`."""
    return f"{_join(counts)} worker{'' if tuple(counts) == (1,) else 's'}"


def _hash_records(records: Iterable[EvaluationRecord | ScoresRecord]) -> str:
    digest = hashlib.sha256()
    for record in records:
        # As hexadecimal, which has all bits of a float, NaN and infinity too.
        metrics = sorted((name, value.hex()) for name, value in record.metrics.items())
        counts = [record.split, record.step, record.rows, record.skipped_rows]
        digest.update(json.dumps([*counts, record.loss.hex(), metrics]).encode())
    return digest.hexdigest()


def _describe_shapes(shapes: Sequence[ShapeProof]) -> str:
    """Return shapes in words, workers with the same ZeRO stages together."""
    stages: dict[int, list[int]] = {}
    for shape in shapes:
        stages.setdefault(shape.workers, []).append(shape.zero)
    groups: dict[tuple[int, ...], list[int]] = {}
    for workers, zeros in sorted(stages.items()):
        groups.setdefault(tuple(sorted(zeros)), []).append(workers)
    return ", and on ".join(f"{describe_workers(counts)}, ZeRO {_join(zeros)}" for zeros, counts in groups.items())


def _join(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last
