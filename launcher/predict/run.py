"""The order of `launcher predict`: look, claim the output, predict what is missing, call it complete. On the head.

Memory grows with neither rows nor time: workers (`worker.py`) read, predict and write a few thousand rows at once, and
the driver (`driver.py`) knows numbers of parts. `parts.py` says which rows make a part, `output.py` what the directory
holds.
"""

import os
from dataclasses import dataclass

from rich.console import Console

from launcher.data.checks import check_first_rows_of_split
from launcher.data.convert import splittable_files
from launcher.data.files import glob_pattern
from launcher.data.splits import Split, open_files
from launcher.driver.prediction_progress import make_progress
from launcher.driver.preflight import check_model
from launcher.driver.ray_errors import unwrap_ray_error
from launcher.driver.signals import ForcedStop, run_interruptibly
from launcher.driver.worker_group import ray_session
from launcher.errors import DataError, LauncherError, RunError, RunInterrupted, UserError
from launcher.predict.driver import PredictionDriver
from launcher.predict.fingerprint import input_fingerprint, model_fingerprint, options
from launcher.predict.output import (
    FINISHED,
    FinishedRecord,
    Part,
    PredictionsRecord,
    complete_parts,
    create_output,
    discard_empty,
    finish,
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
        rows: in it, as many as in the input.
        skipped_rows: rows among them that could not be used and have a null prediction.
        found_rows: rows that an earlier command had predicted.
    """

    rows: int
    skipped_rows: int
    found_rows: int


def predict_run(
    run: RunDir, input: str, output: str, console: Console | None = None, job: JobSpec | None = None
) -> PredictionResult:
    """Predict every row of `input` into Parquet files in `output`, input columns kept, row order kept.

    What an earlier, interrupted command of the same input, model and task has written is not done again.

    Args:
        run: a finished run.
        input: file, directory or glob, any format training takes.
        output: a new or empty directory or URI, or the one to go on with.
        console: shows how far it is; None shows nothing.
        job: the run's, with changes; None takes it as it is, if it asks for no permission.

    Raises:
        UserError: the run has no model, the input does not fit, or the output holds something else.
        RunInterrupted: by Ctrl-C or SIGTERM; what is written is kept.
        TrainingError: workers died again and again, or (RowCountError) other rows came out than went in.
    """
    target = run_at(output)
    try:
        return _predict(run, input, target, console or Console(quiet=True), job or runnable_job(run))
    except (KeyboardInterrupt, SystemExit, ForcedStop) as stop:
        raise RunInterrupted(f"interrupted; the same command goes on with {target.uri}") from stop


def _predict(run: RunDir, input: str, output: RunDir, console: Console, trained: JobSpec) -> PredictionResult:
    check_model(run)
    # The rows to come may name files beside themselves, not beside what the run was trained on.
    data = trained.data.model_copy(update={"train": (input,), "validation": None, "test": None})
    job = trained.model_copy(update={"model": trained.model.exported(run.path("model")), "data": data})
    _check_apart(input, output)
    kinds = build_task(job).columns(with_targets=False)
    files = splittable_files("input", (input,), "auto", join(job.output.storage, ".cache"), kinds)
    split = open_files("input", files, kinds=kinds)
    _check_columns(split, job)
    if split.left_out:
        names = ", ".join(split.left_out)
        console.print(f"note: not all files have {names} with one type, so the output lacks it", highlight=False)
    cut = cut_parts(split.rows, sum(fragment.size_bytes for fragment in split.fragments))
    wanted = PredictionsRecord(
        input=input, input_fingerprint=input_fingerprint(split), run=run.uri, model_fingerprint=model_fingerprint(run),
        options=options(job), rows=cut.rows, part_rows=cut.part_rows, piece_rows=cut.piece_rows,
    )  # fmt: skip
    layout = create_output(output, wanted).layout
    order = PredictionConfig(job, split, layout, output)
    try:
        return _complete(order, console)
    except UserError:
        discard_empty(output)
        raise


def _complete(order: PredictionConfig, console: Console) -> PredictionResult:
    output, layout = order.output, order.layout
    remove_unfinished(output)
    there = complete_parts(output, layout)
    found = sum(there.values(), Part())
    finished = output.find_record(FINISHED, FinishedRecord)
    if found.skipped_rows and order.job.data.on_bad_row == "error":
        raise DataError(
            f"{output.uri}: {found.skipped_rows} of its rows could not be used and have no prediction; go on with "
            "data.on_bad_row=skip as before, or give another --output"
        )
    if finished is not None and len(there) == layout.parts:
        return PredictionResult(found.rows, found.skipped_rows, found.rows)
    if order.job.data.on_bad_row == "error":
        check_first_rows_of_split(
            order.job, build_task(order.job), order.split, with_targets=False
        )  # before Ray starts
    output.delete(FINISHED)  # a part was removed: until it is back, this is not complete
    if there:
        console.print(
            f"goes on: {found.rows} of {layout.rows} rows are in {output.uri}", highlight=False, soft_wrap=True
        )
    missing = [number for number in range(layout.parts) if number not in there]
    total = _drive(order, PartQueue(missing), console, found) if missing else found
    finished = finish(output, layout, total)
    return PredictionResult(finished.rows, finished.skipped_rows, found.rows)


def _drive(order: PredictionConfig, turns: PartQueue, console: Console, found: Part) -> Part:
    with ray_session(order.job):
        view = make_progress(console, order.layout.rows, found.rows)
        try:
            drive = PredictionDriver(order, turns, view, found)
            run_interruptibly(drive.run, drive.ask_stop)
        except (LauncherError, ForcedStop):
            raise
        except Exception as error:  # process border: Ray wraps what a worker raised; it is raised again below
            raise unwrap_ray_error(error) from error
        finally:
            view.close()
    return drive.parts


def _check_columns(split: Split, job: JobSpec) -> None:
    names, task = split.schema.names, build_task(job)
    missing = [column for column in task.input_columns if column not in names]
    if missing:
        raise DataError(f"{split.locate(0)[0]}: has no column {missing[0]!r}; it has {', '.join(names)}")
    taken = [name for name in task.prediction_schema.names if name in names]
    if taken:
        raise DataError(f"{split.locate(0)[0]}: already has a column {taken[0]!r}; rename it before predicting")


def _check_apart(input: str, output: RunDir) -> None:
    """Refuse an output whose parts would be rows of the input the next time."""
    bare = input if "://" in input else os.path.abspath(os.path.expanduser(input))
    inside = f"{output.uri}/".startswith(f"{bare.rstrip('/')}/")
    if inside or glob_pattern(bare).fullmatch(output.path(part_name(0))):
        raise RunError(f"{output.uri}: lies within the input {input}; give a directory that does not")
