"""The typed records of a run directory, checked as they are read back. Runs anywhere."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """Base of all records."""

    # A loss that is not finite must be readable afterwards; JSON's null would say that there was none.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")


class StepRecord(Record):
    """One optimizer step, over all workers."""

    kind: Literal["step"] = "step"
    step: int
    """Steps done, counted from 1."""
    epoch: int
    """Pass over the data, counted from 1."""
    loss: float
    """Sum of the samples' losses over the global weight."""
    learning_rate: float
    grad_norm: float | None
    """L2 norm of the global batch's gradient before clipping; null where the engine does not tell."""
    samples: int
    """Samples in the global batch."""
    skipped_rows: int
    """Unusable rows left out since the run began."""
    samples_per_s: float
    """Over the steps since the last log, all workers together."""
    elapsed_s: float
    """Seconds of training since the run began, over all attempts."""


class EvaluationRecord(Record):
    """One pass over an evaluation split."""

    kind: Literal["evaluation"] = "evaluation"
    split: str
    step: int
    loss: float
    """Mean loss per unit of weight."""
    metrics: dict[str, float]
    rows: int
    """Rows scored; equals the rows of the files less `skipped_rows`."""
    skipped_rows: int
    seconds: float
    best: bool
    """Whether this was the best so far by the job's metric."""


class GenerationRecord(Record):
    """What the model wrote, at some step, for a row of the validation data."""

    kind: Literal["generation"] = "generation"
    step: int
    row: int
    """Row number in the validation data."""
    inputs: dict[str, str]
    prediction: str


class TimesRecord(Record):
    """Where the time went since the line before it of this kind, worker by worker."""

    kind: Literal["times"] = "times"
    step: int
    """The last step it covers."""
    steps: int
    """How many it covers; 0 when only a checkpoint or an evaluation came since."""
    seconds: float
    """All of the time, on rank 0; what the phases, by rank, leave of it is the worker's own computing."""
    data_s: tuple[float, ...]
    """Waiting for the stream."""
    communication_s: tuple[float, ...] = ()
    """Waiting for collectives, so for the slowest worker and the network; () in older runs."""
    evaluation_s: tuple[float, ...]
    checkpoint_s: tuple[float, ...]


MetricsLine = Annotated[StepRecord | EvaluationRecord | GenerationRecord | TimesRecord, Field(discriminator="kind")]
"""One line of metrics.jsonl."""


class ConfusionMatrix(Record):
    """Counts of rows by true class (first axis) and predicted class (second axis)."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


class ClassRow(Record):
    """One class's line of the per-class table."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    """Rows whose true class this is."""


class Mark(Record):
    """A place in a text: a span that was found, missed, or found where there is none (or with another label)."""

    start: int
    """First character."""
    end: int
    """One past the last."""
    label: str
    kind: Literal["found", "missed", "wrong"]


class WorstRow(Record):
    """One of the rows the model was most wrong about."""

    row: int
    """Row number in the split, files in order."""
    file: str
    file_row: int
    """Row number inside the file, from 0."""
    loss: float
    inputs: dict[str, str]
    """The input columns, as text."""
    target: str
    prediction: str
    marks: tuple[Mark, ...] = ()
    """Places in the first of the inputs."""
    image: str | None = None
    """The input as a picture, a `data:` URI."""


class ScoresRecord(Record):
    """Everything an evaluation found out about one split: scores-<split>.json."""

    split: str
    step: int
    loss: float
    rows: int
    skipped_rows: int
    metrics: dict[str, float]
    baseline: dict[str, float]
    """The same metrics for a model that only knows how often each class occurs; may be empty."""
    confusion: ConfusionMatrix | None
    classes: tuple[ClassRow, ...]
    worst: tuple[WorstRow, ...]


class TrackerRecord(Record):
    """What a run is called in its experiment tracker: tracker.json."""

    uri: str
    """Tracking server or store."""
    run_id: str


class WorkerRecord(Record):
    """What one train worker used."""

    rank: int
    host: str
    device: str
    peak_memory_bytes: int
    """Largest resident memory of the process."""
    peak_device_bytes: int
    """Largest allocation on the GPU; 0 on a CPU."""


class EnvironmentRecord(Record):
    """environment.json: what the run ran on."""

    packages: dict[str, str]
    """Version of each package the result depends on."""
    python: str
    platform: str
    git_commit: str | None
    """Commit of the directory the command was started in; `+dirty` behind it when files had changed."""
    workers: tuple[WorkerRecord, ...]


class FileEntry(Record):
    """One file of a checkpoint."""

    path: str
    size_bytes: int
    sha256: str


class ManifestRecord(Record):
    """manifest.json, written last: a checkpoint without it does not exist."""

    step: int
    world_size: int
    zero: int
    """ZeRO stage of the shards."""
    spec_hash: str
    """Hash of the parts of the job file the curve depends on."""
    files: tuple[FileEntry, ...]
    folder: str = ""
    """Holds the files, below the manifest's directory; "" for that itself, but in checkpoints of older versions."""


class TrainerState(Record):
    """state.json beside a checkpoint's shards: what the loop must know to go on."""

    step: int
    skipped_rows: int
    elapsed_s: float
    best_step: int | None
    best_value: float | None
    evaluations_without_improvement: int


class ResultRecord(Record):
    """result.json: training is over. Its presence makes `train` skip the training stage."""

    steps: int
    best_step: int
    """Step of the exported weights."""
    stopped_early: bool
    skipped_rows: int
    elapsed_s: float


class MemoryUsage(Record):
    """workers/memory-N.json: what a worker used while it trained, beside the plan."""

    rank: int
    predicted_bytes: int | None
    """Null where it was not measured beforehand."""
    used_bytes: int | None
    """Of the GPU's allocator, or the growth of the process's resident memory; null where the system does not tell."""
