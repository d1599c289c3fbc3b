"""Typed records of a run directory, validated when they are read. Runs anywhere."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

RESTORE = "restore it from a copy, or start a new run under another name"
"""Remedy for a damaged file that a run cannot do without."""


class Record(BaseModel):
    """Base of all records. Field names are the JSON keys on disk."""

    damage_remedy: ClassVar[str] = RESTORE
    """Remedy for a file whose content is not a valid record."""

    # pydantic writes NaN as null by default, which would read as "no loss". `constants` writes NaN and Infinity.
    # `forbid`: an older version refuses a record with an unknown field instead of losing it at the next write. So a new
    # field needs a default, or records of older versions cannot be read.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")


class StepRecord(Record):
    """One optimizer step, over all workers."""

    # `metrics_log.py` matches lines by expressions that need `kind` and `step` in front.
    kind: Literal["step"] = "step"
    step: int
    """Number of completed steps."""
    epoch: int
    """Pass over the data, counted from 1."""
    loss: float
    """Sum of the sample losses divided by the weight of the global batch."""
    learning_rate: float
    grad_norm: float | None
    """L2 norm of the global batch's gradient before clipping; null if the engine does not report it."""
    samples: int
    """Samples in the global batch."""
    skipped_rows: int
    """Unusable rows skipped since the run began."""
    samples_per_s: float
    """Throughput of all workers together since the last log."""
    elapsed_s: float
    """Seconds of training over all attempts."""
    sources: dict[str, float] | None = None
    """Loss of each source of a mixture that the batch has rows of; null without a mixture."""


class EvaluationRecord(Record):
    """One pass over an evaluation split."""

    kind: Literal["evaluation"] = "evaluation"
    split: str
    step: int
    loss: float
    """Mean loss per unit of weight."""
    metrics: dict[str, float]
    """Metrics by name; in a mixture also the loss and the metrics of each source, as `source/name`."""
    rows: int
    """Scored rows: the rows of the files minus `skipped_rows`."""
    skipped_rows: int
    seconds: float
    best: bool
    """Whether this is the best value so far of the job's metric."""


class GenerationRecord(Record):
    """Text that the model generated at some step for a row of the validation data."""

    kind: Literal["generation"] = "generation"
    step: int
    row: int
    """Row number in the validation data."""
    inputs: dict[str, str]
    prediction: str
    target: str | None = None
    """Text that the data has for this row; null for a task that continues texts."""


class TimesRecord(Record):
    """Time per phase and worker since the previous record of this kind. Tuples are indexed by rank."""

    kind: Literal["times"] = "times"
    step: int
    """Last step covered."""
    steps: int
    """Number of steps covered; 0 if only a checkpoint or an evaluation came since."""
    seconds: float
    """Total time on rank 0. The part outside of the phases below is computation."""
    data_s: tuple[float, ...]
    """Time waiting for the stream of batches."""
    communication_s: tuple[float, ...] = ()
    """Time waiting for collectives, so for the slowest worker and the network; () in older runs."""
    evaluation_s: tuple[float, ...]
    checkpoint_s: tuple[float, ...]


MetricsLine = Annotated[StepRecord | EvaluationRecord | GenerationRecord | TimesRecord, Field(discriminator="kind")]
"""One line of metrics.jsonl."""


class ConfusionMatrix(Record):
    """Counts of rows by true class (first axis) and predicted class (second axis)."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


class ClassRow(Record):
    """Scores of one class."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    """Rows of this true class."""


class SpanMark(Record):
    """Span in a text: predicted correctly (found), missed, or predicted wrongly (no such span, or another label)."""

    start: int
    """First character."""
    end: int
    """One past the last."""
    label: str
    kind: Literal["found", "missed", "wrong"]


class DocumentRow(Record):
    """One of the documents that a model ranked for a query."""

    rank: int
    score: float
    is_true: bool
    """Whether it is the document that should come first."""
    text: str


class WorstRow(Record):
    """One of the rows with the highest loss."""

    row: int
    """Row number in the split, files in order."""
    file: str
    file_row: int
    """Row number inside the file, from 0."""
    loss: float
    inputs: dict[str, str]
    """Input columns, as text."""
    target: str
    prediction: str
    marks: tuple[SpanMark, ...] = ()
    """Spans in the first input."""
    documents: tuple[DocumentRow, ...] = ()
    """Documents by rank, of tasks that rank."""
    image: str | None = None
    """Input image as a `data:` URI."""


class Histogram(Record):
    """Numbers of rows by the value of something."""

    name: str
    """Name of the value, such as `reward margin`."""
    edges: tuple[float, ...]
    """Borders of the n bins, ascending, (n + 1,)."""
    counts: tuple[int, ...]
    """Rows in each bin, (n,)."""


class ScoresRecord(Record):
    """Content of scores-<split>.json: results of an evaluation of one split."""

    split: str
    step: int
    loss: float
    rows: int
    skipped_rows: int
    metrics: dict[str, float]
    baseline: dict[str, float]
    """Metrics of a model that knows only the class frequencies; may be empty."""
    confusion: ConfusionMatrix | None
    classes: tuple[ClassRow, ...]
    histogram: Histogram | None = None
    """Distribution of a value over the rows, for tasks that have one."""
    worst: tuple[WorstRow, ...]
    notes: tuple[str, ...] = ()
    """How metrics were computed, such as the signature of a BLEU score."""


class TrackerRecord(Record):
    """Content of tracker.json: identity of a run in its experiment tracker."""

    uri: str
    """Tracking server or store."""
    run_id: str


class WorkerRecord(Record):
    """Host, device and peak memory of one train worker."""

    rank: int
    host: str
    device: str
    peak_memory_bytes: int
    """Largest resident memory of the process."""
    peak_device_bytes: int
    """Largest GPU allocation; 0 on a CPU."""
    hardware: str = ""
    """GPU name, or CPU model and vector extension, which decide the last bits; "" in older runs."""


class EnvironmentRecord(Record):
    """Content of environment.json: software and hardware of a run."""

    damage_remedy = "remove it, and the report does without it"

    packages: dict[str, str]
    """Version of each package the result depends on."""
    python: str
    platform: str
    git_commit: str | None
    """Commit of the working directory of the command, followed by `+dirty` if files had changed."""
    workers: tuple[WorkerRecord, ...]


class FileEntry(Record):
    """One file of a checkpoint."""

    path: str
    size_bytes: int
    sha256: str


class ManifestRecord(Record):
    """Content of manifest.json. It is written last: a checkpoint without it is incomplete and does not count."""

    step: int
    world_size: int
    zero: int
    """ZeRO stage of the shards."""
    spec_hash: str
    """Hash of those parts of the job file that determine the loss curve."""
    files: tuple[FileEntry, ...]
    folder: str = ""
    """Directory of the files, relative to the manifest's; "" in checkpoints of older versions."""


class TrainerState(Record):
    """Content of state.json in a checkpoint: state of the training loop, needed to resume."""

    step: int
    skipped_rows: int
    elapsed_s: float
    best_step: int | None
    best_value: float | None
    evaluations_without_improvement: int


class ResultRecord(Record):
    """Content of result.json. Its presence means that training is finished, so that `train` skips it."""

    steps: int
    best_step: int
    """Step whose weights are exported."""
    stopped_early: bool
    skipped_rows: int
    elapsed_s: float


class MemoryUsage(Record):
    """Content of workers/memory-N.json: estimated and used memory of one worker."""

    damage_remedy = "remove it, and the report does without it"

    rank: int
    predicted_bytes: int | None
    """Estimate; null if there was none."""
    used_bytes: int | None
    """Peak of the GPU allocator, or growth of the resident memory on a CPU; null if the system does not report it."""
