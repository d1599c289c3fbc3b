"""The command `evaluate`: metrics of a run's model on a split or on other data. Runs on the client, or on the head."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from launcher.cli.options import (
    EVALUATE_KEYS,
    OUT,
    Overrides,
    Run,
    check_evaluate_options,
    load_run_job,
    print_line,
    start_ray_early,
)

if TYPE_CHECKING:
    from launcher.driver.evaluate import Difference
    from launcher.rundir.records import ScoresRecord

commands = typer.Typer()


@commands.command()
def evaluate(
    run: Run,
    overrides: Overrides = None,
    split: Annotated[str | None, typer.Option(help="Split of the run's data: validation or test (default).")] = None,
    data: Annotated[
        str | None, typer.Option(help="Other data: a file, directory, glob, URI or Hugging Face dataset.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="NAME of scores-NAME.json; default: from the location of --data.")
    ] = None,
) -> None:
    """Evaluate a run's model on a split of its data or on other data.

    KEY=VALUE may change cluster, parallel, task (columns), data.format, data.on_bad_row and evaluation.batch_size.
    """
    from launcher.rundir.directory import find_run

    check_evaluate_options(split, data, name)
    run_dir = find_run(run)
    job = load_run_job(run_dir, overrides, EVALUATE_KEYS)
    # Before the imports below load ray and torch.
    start_ray_early(job)
    from launcher.driver.evaluate import compare_with_own_scores, evaluate_data, evaluate_run

    if data is None:
        scores = evaluate_run(run_dir, split or "test", OUT, job)
    else:
        scores = evaluate_data(run_dir, data, OUT, name, job)
    own_split, rows = compare_with_own_scores(run_dir, scores)
    _print_scores(scores, own_split if data is not None else "", rows)
    print_line(f"{scores.rows} rows; details in {run_dir.path(f'scores-{scores.split}.json')}")


def _print_scores(scores: "ScoresRecord", own_split: str, rows: "tuple[Difference, ...]") -> None:
    """Print the metrics, next to those of the run's own split if `own_split` names one."""
    table = Table("metric", scores.split, *((own_split, "difference") if own_split else ()), "baseline")
    for row in rows:
        change = "" if row.change is None else f"{row.change:+.4f}"
        own_cells = (_format_metric(row.own), change) if own_split else ()
        table.add_row(row.name, _format_metric(row.value), *own_cells, _format_metric(row.baseline))
    OUT.print(table)


def _format_metric(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
