"""The order of `launcher predict`: check, claim the output, predict missing parts, mark it complete. Runs on the head.

Memory grows with neither rows nor time: workers (`worker.py`) read, predict and write a few thousand rows at once, and
the driver (`driver.py`) holds part numbers. `parts.py` says which rows make a part, `output.py` what the directory
holds.
"""

import os
from dataclasses import dataclass

from rich.console import Console

from launcher.data.checks import check_first_rows_of_split
from launcher.data.convert import splittable_files
from launcher.data.files import errors_without_keys, glob_pattern
from launcher.data.splits import Split, open_files
from launcher.driver.preflight import check_model
from launcher.driver.progress import PredictionProgress
from launcher.driver.ray_errors import unwrap_ray_error
from launcher.driver.signals import ForcedStop, run_interruptibly
from launcher.driver.worker_group import ray_session
from launcher.errors import DataError, LauncherError, RunError, RunInterrupted, UserError
from launcher.formatting import print_line
from launcher.predict.driver import PredictionDriver
from launcher.predict.fingerprint import input_fingerprint, model_fingerprint, prediction_options
from launcher.predict.output import (
    FINISHED,
    FinishedRecord,
    Part,
    PredictionsRecord,
    complete_parts,
    create_output,
    discard_empty,
    finish,
    lock_output,
    part_name,
    remove_unfinished,
)
from launcher.predict.parts import PartQueue, cut_parts
from launcher.predict.worker import PredictionConfig
from launcher.rundir.directory import RunDir, run_at, runnable_job
from launcher.rundir.uri import join
from launcher.spec.job import JobSpec
from launcher.tasks import build_task


@dataclass(frozen=True)
class PredictionResult:
    """A complete output.

    Args:
        rows: Number of rows, the same as in the input.
        skipped_rows: Rows among them that could not be used and have a null prediction.
        found_rows: Rows that an earlier command had predicted.
    """

    rows: int
    skipped_rows: int
    found_rows: int


def predict_run(
    run: RunDir, input: str, output: str, console: Console | None = None, job: JobSpec | None = None
) -> PredictionResult:
    """Predict every row of `input` into Parquet files in `output`; keep the input's columns and row order.

    Parts that an earlier, interrupted command with the same input, model and task has written are kept.

    Args:
        run: Finished run.
        input: File, directory or glob, in any format that training reads.
        output: Directory or URI that is new or empty, or that an interrupted command has left.
        console: Console for progress; None shows nothing.
        job: Job of the run, with changes; None takes it as it is, if it needs no permission.

    Raises:
        UserError: The run has no model, the input does not fit, the output holds something else, or another command
            is writing there.
        RunInterrupted: A signal arrived. Written parts are kept.
        TrainingError: Workers died again and again, or (RowCountError) the output has other rows than the input.
    """
    target = run_at(output)
    try:
        return _predict(run, input, target, console or Console(quiet=True), job or runnable_job(run))
    except (KeyboardInterrupt, SystemExit, ForcedStop) as stop:
        raise RunInterrupted(f"interrupted; run the same command again to resume {target.uri}") from stop


def _predict(run: RunDir, input: str, output: RunDir, console: Console, trained: JobSpec) -> PredictionResult:
    # Model, input and columns are checked before the output is claimed; the first rows after that, but before Ray
    # starts.
    check_model(run)
    # As training data: rows that name files (images) name them relative to their own file, not to the run's data.
    data = trained.data.model_copy(update={"train": (input,), "validation": None, "test": None})
    job = trained.model_copy(update={"model": trained.model.exported(run.path("model")), "data": data})
    _check_output_outside_input(input, output)
    split = _open_input(input, job, console)
    # From the footers alone, so that a command that resumes finds the same layout without reading a row.
    layout = cut_parts(split.rows, sum(fragment.size_bytes for fragment in split.fragments))
    requested = PredictionsRecord(
        input=input, input_fingerprint=input_fingerprint(split), run=run.uri, model_fingerprint=model_fingerprint(run),
        options=prediction_options(job), rows=layout.rows, part_rows=layout.part_rows, piece_rows=layout.piece_rows,
    )  # fmt: skip
    # Two commands on one output at a time would remove each other's unfinished files.
    with lock_output(output):
        config = PredictionConfig(job, split, create_output(output, requested).layout, output)
        try:
            return _complete(config, console)
        except UserError:
            # Refused before a part was written: leave no directory behind.
            discard_empty(output)
            raise


def _open_input(input: str, job: JobSpec, console: Console) -> Split:
    task = build_task(job)
    kinds = task.columns(with_targets=False)
    with errors_without_keys("input"):
        files = splittable_files("input", (input,), "auto", join(job.output.storage, ".cache"), kinds)
        split = open_files("input", files, kinds=kinds)
    names = split.schema.names
    missing = [column for column in task.prediction_inputs(names) if column not in names]
    if missing:
        raise DataError(f"{split.locate(0)[0]}: has no column {missing[0]!r}; it has {', '.join(names)}")
    taken = [name for name in task.prediction_schema.names if name in names]
    if taken:
        raise DataError(f"{split.locate(0)[0]}: already has a column {taken[0]!r}; rename it before predicting")
    if split.left_out:
        dropped = ", ".join(split.left_out)
        print_line(console, f"note: not all files have {dropped} with one type, so the output lacks it")
    return split


def _complete(config: PredictionConfig, console: Console) -> PredictionResult:
    """Predict the parts that are missing and mark the output as complete."""
    output, layout = config.output, config.layout
    allows_bad_rows = config.job.data.on_bad_row != "error"
    # No worker of this command runs yet.
    remove_unfinished(output)
    existing = complete_parts(output, layout)
    total = sum(existing.values(), Part())
    before = total.rows
    record = output.find_record(FINISHED, FinishedRecord)
    if total.skipped_rows and not allows_bad_rows:
        raise DataError(
            f"{output.uri}: {total.skipped_rows} of its rows could not be used and have no prediction; continue with "
            "data.on_bad_row=skip as before, or give another --output"
        )
    if record is not None and len(existing) == layout.parts:
        return PredictionResult(total.rows, total.skipped_rows, before)
    # Before Ray starts, which takes seconds.
    if not allows_bad_rows:
        check_first_rows_of_split(config.job, build_task(config.job), config.split, with_targets=False)
    # A part was removed; until it is written again, the output is not complete. Before the first part is written, so
    # that no reader takes a mixture for the whole.
    output.delete(FINISHED)
    if existing:
        print_line(console, f"resuming: {before} of {layout.rows} rows are in {output.uri}")
    missing = [number for number in range(layout.parts) if number not in existing]
    if missing:
        total = _predict_parts(config, PartQueue(missing), console, total)
    record = finish(output, layout, total)
    return PredictionResult(record.rows, record.skipped_rows, before)


def _predict_parts(config: PredictionConfig, queue: PartQueue, console: Console, existing: Part) -> Part:
    """Predict parts on Ray; return the sums over all parts."""
    with ray_session(config.job):
        progress = PredictionProgress(console, config.layout.rows, existing.rows)
        try:
            driver = PredictionDriver(config, queue, progress, existing)
            run_interruptibly(driver.run, driver.request_stop)
        except (LauncherError, ForcedStop):
            raise
        except Exception as error:  # process border: Ray wraps what a worker raised; it is raised again below
            raise unwrap_ray_error(error) from error
        finally:
            progress.close()
    return driver.parts


def _check_output_outside_input(input: str, output: RunDir) -> None:
    """Refuse an output whose parts would be rows of the input the next time.

    Raises:
        RunError: The output lies within the input.
    """
    path = input if "://" in input else os.path.abspath(os.path.expanduser(input))
    is_inside = f"{output.uri}/".startswith(f"{path.rstrip('/')}/")
    if is_inside or glob_pattern(path).fullmatch(output.path(part_name(0))):
        raise RunError(f"{output.uri}: lies within the input {input}; give a directory that does not")
