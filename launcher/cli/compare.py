"""The commands on finished runs: `report`, `compare`, `replay`, `verify`. Runs on the client; replay on the head."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from launcher.cli.options import OUT, REPLAY_KEYS, Overrides, Run, load_run_job, print_line
from launcher.cli.prove import check_replay_options, prove_shapes
from launcher.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.report.compare import Comparison, Row

commands = typer.Typer()


@commands.command()
def report(run: Run) -> None:
    """Write the HTML report of a run or sweep again.

    The files are self-contained and work offline.
    """
    from launcher.report.render import write_report
    from launcher.report.sweep import find_sweep, write_sweep_report
    from launcher.rundir.directory import find_run

    sweep = find_sweep(run)
    if sweep is not None:
        print_line(write_sweep_report(sweep))
    if sweep is None or sweep.exists("job.yaml"):
        print_line(write_report(find_run(run)))


@commands.command("compare")
def compare_runs(
    runs: Annotated[list[str], typer.Argument(help="Directories or URIs of runs.", metavar="RUN")],
    output: Annotated[Path, typer.Option(help="HTML file to write; it works offline.")] = Path("compare.html"),
) -> None:
    """Compare runs in a table and on a page with their curves.

    Shows metrics, differences of the job files and environments, and whether the loss curves match.
    """
    from launcher.report.compare import check_output_path, compare, write_comparison
    from launcher.rundir.directory import find_run

    # First: reading runs from remote storage may take minutes.
    check_output_path(output)
    comparison = compare([find_run(run) for run in runs])
    for warning in comparison.warnings:
        print_line(f"note: {warning}")
    _print_comparison(comparison)
    print_line(str(write_comparison(comparison, output)))


@commands.command()
def replay(
    run: Run,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the new run; the default is NAME-replay, -2, ...")] = None,
    prove: Annotated[
        bool, typer.Option("--prove", help="Train on several shapes, compare every bit, write certificate.json.")
    ] = False,
    workers: Annotated[
        str | None,
        typer.Option(help="With --prove: numbers of workers. Default: 1, 2, 4 ... up to the cores.", metavar="1,2,4"),
    ] = None,
    zero: Annotated[
        str | None, typer.Option(help="With --prove: ZeRO stages. Default: 0 and 1.", metavar="0,1")
    ] = None,
) -> None:
    """Train a finished run again and check that the curves match.

    The new run has a name of its own. KEY=VALUE may change cluster, parallel, checkpoint and logging. Run the same
    command again to resume. Exit code: 0 if the curves match, 1 if they do not.

    With --prove it is trained on every combination of --workers and --zero, and losses, evaluations, scores and weights
    must have the same bits, or agree to a tolerance where the plan promises no more.
    """
    from launcher.rundir.directory import find_run
    from launcher.rundir.run_status import check_finished

    check_replay_options(overrides or (), name, prove, workers, zero)
    run_dir = find_run(run)
    check_finished(run_dir)
    if prove:
        if not prove_shapes(run_dir, overrides or (), workers, zero):
            raise typer.Exit(1)
        return
    job = load_run_job(run_dir, overrides, REPLAY_KEYS)
    # Late, because it loads ray and torch, and a wrong override should be refused at once.
    from launcher.driver.replay import describe_replay, replay_run

    replayed = replay_run(run_dir, job, name, OUT)
    for sentence in describe_replay(replayed):
        print_line(sentence)
    print_line(f"comparison: {replayed.page}")
    if not replayed.agreement.is_same_curve:
        raise typer.Exit(1)


@commands.command()
def verify(run: Run) -> None:
    """Check a run directory against its certificate, without training.

    `launcher replay RUN --prove` writes the certificate. Its hashes find changed files, but are no signature: they do
    not show who wrote it. Exit code: 0 if everything agrees, 1 if something differs, 2 without a readable certificate.
    """
    from launcher.rundir.directory import find_run, runnable_job
    from launcher.rundir.verify import compare_fingerprint, read_certificate, verify_files

    run_dir = find_run(run)
    certificate = read_certificate(run_dir)
    has_difference = False
    for check in verify_files(run_dir, certificate):
        print_line(str(check))
        has_difference = has_difference or bool(check.difference)
    # Late, because it loads ray and torch.
    from launcher.driver.prepare import open_splits

    try:
        # The training data alone: the other splits may be gone.
        train = open_splits(runnable_job(run_dir), names=("train",))["train"]
        check = compare_fingerprint(certificate, train.fingerprint)
    except UserError as error:
        print_line(f"note: the training data were not compared, as they cannot be read here ({error.message})")
    else:
        print_line(str(check))
        has_difference = has_difference or bool(check.difference)
    if has_difference:
        print_line("the certificate does not hold for this directory")
        raise typer.Exit(1)
    print_line(certificate.sentence)


def _print_comparison(comparison: "Comparison") -> None:
    OUT.print(_make_table("", comparison.names, [*comparison.metrics, *comparison.facts]))
    for heading, rows in (
        ("job file", comparison.job_differences),
        ("environment", comparison.environment_differences),
    ):
        if rows:
            OUT.print(_make_table(heading, comparison.names, rows))
    for sentence in comparison.agreement:
        print_line(sentence)


def _make_table(heading: str, names: "Sequence[str]", rows: "Sequence[Row]") -> Table:
    # Rich reads brackets in text as markup; a Text, as in the cells below, it leaves alone.
    table = Table(escape(heading), *(escape(name) for name in names))
    for row in rows:
        cells = (
            Text.assemble(Text(value, "bold"), " *") if i in row.best else Text(value)
            for i, value in enumerate(row.values)
        )
        table.add_row(Text(row.name), *cells)
    return table
