"""The command `rows`: which rows made a step of a run, and in which steps a row was. Runs on the client."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.cli.options import OUT, Overrides, Run, load_run_job, print_line
from launcher.formatting import format_number

if TYPE_CHECKING:
    import pyarrow as pa

    from launcher.driver.rows import StepTable

commands = typer.Typer()

_KEYS = ("data.train", "data.mixture")
"""Keys that may be changed: the data may have moved. Other data are refused."""
_MOST_ROWS = 50
"""Rows of a step on the console."""
_WIDTH = 1000
"""Largest width of a table in a file or a pipe."""


@commands.command()
def rows(
    run: Run,
    overrides: Overrides = None,
    step: Annotated[str | None, typer.Option(help="Step, or a range: 100-120.", metavar="N")] = None,
    row: Annotated[str | None, typer.Option(help="Row of a file, numbered from 0.", metavar="FILE:NUMBER")] = None,
    losses: Annotated[bool, typer.Option("--losses", help="Add the loss of each row; trains steps again.")] = False,
    output: Annotated[str | None, typer.Option(help="File to write: .parquet or .csv.", metavar="FILE")] = None,
) -> None:
    """Show which rows made a step of a run, or in which steps a row was.

    Follows from the job file, whatever the workers were. `--losses` loads the newest checkpoint before the step, trains
    the steps between them again in this process, and changes nothing in the run. On the console the rows with the
    largest losses come first. KEY=VALUE may change data.train and data.mixture, where the same files have moved.
    """
    from launcher.rundir.directory import find_run

    _check_options(step, row, losses)
    run_dir = find_run(run)
    job = load_run_job(run_dir, overrides, _KEYS)
    from launcher.driver.rows import describe_loss, loss_tables, open_rows, parse_steps, row_table, step_tables

    data = open_rows(run_dir, job, OUT)
    if row is not None:
        status = OUT.status("reading the windows that have the row") if OUT.is_terminal else nullcontext()
        with _writer(output) as write, status:
            table = row_table(data, row)
            write(table)
        if output is None:
            _print_uses(table)
        return
    assert step is not None
    steps = parse_steps(step, data.plan)
    with _writer(output) as write:
        for found in loss_tables(data, steps, OUT) if losses else step_tables(data, steps):
            write(found.rows)
            print_line(_headline(found))
            for sentence in describe_loss(data, found):
                print_line(sentence)
            if output is None:
                _print_rows(found)


def _check_options(step: str | None, row: str | None, losses: bool) -> None:
    """Refuse options that contradict each other, before the run is read.

    Raises:
        UserError: Not exactly one of the two questions is asked, or losses of no step.
    """
    from launcher.errors import UserError

    if (step is None) == (row is None):
        what = "give one of them" if step is None else "give only one of them"
        raise UserError(f"--step and --row: {what}: --step N for the rows of a step, --row FILE:NUMBER for the inverse")
    if losses and step is None:
        raise UserError("--losses: are those of a step; give --step N instead of --row")


@contextmanager
def _writer(output: str | None) -> "Iterator[Callable[[pa.Table], None]]":
    """Yield a function that appends tables to the file, or does nothing without one; remove it if the block fails.

    Raises:
        RunError: The file exists, has another ending, or cannot be written.
    """
    if output is None:
        yield lambda _: None
        return
    import pyarrow as pa
    import pyarrow.fs as pafs
    from pyarrow.csv import CSVWriter
    from pyarrow.parquet import ParquetWriter

    from launcher.errors import RunError
    from launcher.rundir.uri import describe_os_error, open_uri

    fs, path = open_uri(output)
    kind = ParquetWriter if path.endswith(".parquet") else CSVWriter if path.endswith(".csv") else None
    if kind is None:
        raise RunError(f"--output: {output} is neither a .parquet nor a .csv file; give one of these endings")
    try:
        if fs.get_file_info(path).type != pafs.FileType.NotFound:
            raise RunError(f"--output: {output} exists and would be overwritten; give another file")
        sink = fs.open_output_stream(path)
    except OSError as error:
        raise RunError(
            f"--output: {output} cannot be written ({describe_os_error(error)}); name another file"
        ) from error
    count, writer = 0, None

    def write(table: pa.Table) -> None:
        nonlocal count, writer
        # With the first table: its columns depend on the run.
        writer = writer or kind(sink, table.schema)
        writer.write_table(table)
        count += len(table)

    try:
        with sink:
            yield write
            if writer is not None:
                writer.close()
    except BaseException:
        # Part of an answer would look like all of it.
        fs.delete_file(path)
        raise
    print_line(f"{count} rows: {output}")


def _headline(found: "StepTable") -> str:
    parts = len(set(found.rows.column("part").to_pylist()))
    text = f"step {found.step}: {len(found.rows)} rows in {parts} parts"
    return f"{text}; not trained on, as {found.problem}" if found.problem else text


def _print_rows(found: "StepTable") -> None:
    """Print the rows of a step; those with the largest losses first, if there are losses."""
    import pyarrow.compute as pc

    table = found.rows
    weights, samples = table.column("weight"), table.column("samples")
    hidden = {"step", "sequence"} | ({"samples"} if pc.all(pc.equal(samples, 1)).as_py() else set())
    hidden |= {"weight"} if pc.all(pc.equal(weights, 1)).as_py() else set()
    if "loss" in table.column_names:
        # NaN comes last in Arrow's order, and is what one looks for.
        is_nan = pc.is_nan(table.column("loss")).cast("int8")
        order = pc.sort_indices(
            table.append_column("is_nan", is_nan), [("is_nan", "descending"), ("loss", "descending")]
        )
        table = table.take(order)
    names = [name for name in table.column_names if name not in (*hidden, "file", "file_row")]
    _print_table(table.select(["file", "file_row", *names]).slice(0, _MOST_ROWS))
    if len(table) > _MOST_ROWS:
        print_line(f"... and {len(table) - _MOST_ROWS} more rows; --output FILE.parquet writes all of them")


def _print_uses(table: "pa.Table") -> None:
    if not len(table):
        print_line("no step of the run reads this row")
        return
    print_line(f"row {table.column('file_row')[0]} of {table.column('file')[0]}")
    _print_table(table.drop_columns(["file", "file_row"]))


def _print_table(table: "pa.Table") -> None:
    shown = Table(box=None, padding=(0, 2))
    for name in table.column_names:
        shown.add_column(name, no_wrap=True, overflow="fold", justify="left" if name in ("file", "state") else "right")
    here = f"{os.getcwd()}/"
    for cells in table.to_pylist():
        # Rich reads brackets in text as markup; a Text it leaves alone.
        shown.add_row(*(Text(_format(value).removeprefix(here)) for value in cells.values()))
    # Without a terminal rich assumes 80 columns and would cut the cells.
    (OUT if OUT.is_terminal else Console(width=_WIDTH)).print(shown)


def _format(value: object) -> str:
    if isinstance(value, float):
        return format_number(value)
    return "" if value is None else str(value)
