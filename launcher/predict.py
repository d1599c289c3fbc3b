"""Batch inference with a run's exported model: Ray Data streams rows through a pool of models. Head and data workers.

Memory does not grow with the input: fragments are read in pieces, predicted and written as they come, in order.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from launcher.data.convert import as_splittable
from launcher.data.sources import Split, open_split
from launcher.data.stream import TASK_CPUS, judge
from launcher.errors import DataError, ExactnessError, RunError
from launcher.rundir import RunDir, open_uri, read_job
from launcher.spec.job import JobSpec
from launcher.tasks import build_task
from launcher.train.trainer import explain, ray_session

_PIECE_ROWS = 4096


def predict_run(run: RunDir, input: str, output: str) -> tuple[int, int]:
    """Predict every row of `input` into Parquet files under `output`, input columns kept, row order kept.

    Args:
        run: a finished run.
        input: file, directory or glob, any format training takes.
        output: a new or empty directory or URI.

    Returns:
        (rows written, rows among them that could not be used and have a null prediction)

    Raises:
        UserError: the run has no model, the input does not fit, or the output is not empty.
        ExactnessError: fewer or more rows came out than went in.
    """
    if not run.exists("model/config.json"):
        raise RunError(f"{run.uri}: has no model yet; finish the run with `launcher train` first")
    trained = read_job(run)
    model = trained.model.exported(run.path("model"))
    job = trained.model_copy(update={"model": model})
    files = as_splittable("input", (input,), "auto", f"{job.output.storage}/.cache")
    split = open_split("input", files)
    _check(split, job, output)
    with ray_session(job):
        try:
            _dataset(split, job).write_parquet(_writable(output))
        except Exception as error:  # process border: Ray wraps what a data worker raised; it is raised again below
            _remove(output)
            raise explain(error) from error
    rows, skipped = _count(output)
    if rows != split.rows:
        raise ExactnessError(f"{output}: {rows} rows came out of {split.rows}; remove it and predict again")
    return rows, skipped


def _check(split: Split, job: JobSpec, output: str) -> None:
    names = split.schema.names
    task = build_task(job)
    missing = [column for column in task.input_columns if column not in names]
    if missing:
        raise DataError(f"{split.locate(0)[0]}: has no column {missing[0]!r}; it has {', '.join(names)}")
    taken = [name for name in task.prediction_schema.names if name in names]
    if taken:
        raise DataError(f"{split.locate(0)[0]}: already has a column {taken[0]!r}; rename it before predicting")
    fs, path = open_uri(output)
    info = fs.get_file_info(path)
    occupied = info.type == pafs.FileType.Directory and fs.get_file_info(pafs.FileSelector(path))
    if info.type == pafs.FileType.File or occupied:
        raise RunError(f"{output}: is not empty; give a new directory, so that nothing is overwritten")
    try:
        fs.create_dir(path, recursive=True)
    except OSError as error:
        raise RunError(f"{output}: cannot be written ({error}); give a directory that can") from error


def _writable(output: str) -> str:
    return output if "://" in output else open_uri(output)[1]


def _remove(output: str) -> None:
    fs, path = open_uri(output)
    if fs.get_file_info(path).type == pafs.FileType.Directory:
        fs.delete_dir(path)  # it was empty before; a part of the predictions would be taken for all of them


def _count(output: str) -> tuple[int, int]:
    rows = skipped = 0
    fs, path = open_uri(output)
    for info in fs.get_file_info(pafs.FileSelector(path, recursive=True)):
        if info.path.endswith(".parquet"):
            with fs.open_input_file(info.path) as stream:
                column = pq.read_table(stream, columns=["prediction"]).column("prediction")
            rows, skipped = rows + len(column), skipped + column.null_count
    return rows, skipped


def _dataset(split: Split, job: JobSpec) -> "ray.data.Dataset":
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what a data worker raised is told in one sentence
    cluster = job.cluster
    dataset = ray.data.read_datasource(
        _Pieces(split), override_num_blocks=len(split.fragments), concurrency=cluster.data_workers, num_cpus=TASK_CPUS
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset.map_batches(  # type: ignore[no-any-return]  # its decorator hides the type
        Predictor,
        fn_constructor_kwargs={"job": job, "split": split},
        batch_size=job.evaluation.batch_size,
        batch_format="pyarrow",
        concurrency=cluster.workers,
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker or None,
    )


class _Pieces(Datasource):
    """Every fragment as a read task; rows carry their id as `__row`."""

    def __init__(self, split: Split) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._split = split

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(fragment.size_bytes for fragment in self._split.fragments)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None, **_: object
    ) -> list[ReadTask]:
        starts, split = self._split.starts, ray.put(self._split)
        tasks = []
        for index, fragment in enumerate(self._split.fragments):
            size = BlockMetadata(
                num_rows=fragment.rows, size_bytes=fragment.size_bytes, input_files=None, exec_stats=None
            )
            tasks.append(ReadTask(_piece_reader(split, int(starts[index]), int(starts[index + 1])), size))
        return tasks


def _piece_reader(split: "ray.ObjectRef[Split]", start: int, stop: int) -> Callable[[], Iterable[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        found = ray.get(split)
        for begin in range(start, stop, _PIECE_ROWS):
            ids = np.arange(begin, min(stop, begin + _PIECE_ROWS), dtype=np.int64)
            yield found.read(ids, found.schema.names).append_column("__row", pa.array(ids))

    return read


@dataclass
class Predictor:
    """One model of the pool; called with batches of rows."""

    job: JobSpec
    split: Split

    def __post_init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, int(self.job.cluster.cpus_per_worker)))
        self._task = build_task(self.job)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = self._task.build_model().eval()
        torch.nn.Module.to(self._model, self._device)  # transformers' own `to` is untyped

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The rows with `prediction` and scores; an unusable row gets nulls, or stops the job, as the job file says."""
        import torch

        ids = rows.column("__row").to_numpy()
        rows = rows.drop_columns(["__row"])
        encoded = self._task.encode(rows, False)
        if self.job.data.on_bad_row == "error":
            judge(self.split, ids, encoded, "error")
        if not len(encoded.kept):
            return _with_columns(rows, self._task.prediction_schema.empty_table(), np.full(len(rows), -1))
        with torch.inference_mode():
            predicted = self._task.predict(self._model, encoded.samples).cast(self._task.prediction_schema)
        source = np.full(len(rows), -1)
        source[encoded.kept] = np.arange(len(encoded.kept))
        return _with_columns(rows, predicted, source)


def _with_columns(rows: pa.Table, predicted: pa.Table, source: "np.ndarray") -> pa.Table:
    positions = pa.array(source, mask=source < 0)
    for name in predicted.column_names:
        rows = rows.append_column(name, predicted.column(name).combine_chunks().take(positions))
    return rows
