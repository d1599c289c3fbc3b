"""The command `predict`: batch inference with a run's model. Runs on the client, or on the head."""

from typing import Annotated

import typer

from launcher.cli.options import OUT, Overrides, Run, load_run_job, print_line, start_ray_early

commands = typer.Typer()

_PREDICT_KEYS = ("cluster", "task", "data.on_bad_row", "evaluation.batch_size")


@commands.command()
def predict(
    run: Run,
    input: Annotated[str, typer.Argument(help="Input data: a file, directory, glob or URI.", metavar="INPUT")],
    output: Annotated[str, typer.Option(help="Directory or URI for the Parquet files with the predictions.")],
    overrides: Overrides = None,
) -> None:
    """Run batch inference with a run's model on data of any size.

    The output has the columns of the input, the prediction and its scores. Run the same command again to resume after
    an interruption. KEY=VALUE may change cluster, task (columns), data.on_bad_row and evaluation.batch_size.
    """
    from launcher.rundir.directory import find_run

    run_dir = find_run(run)
    job = load_run_job(run_dir, overrides, _PREDICT_KEYS)
    # Before the imports below load ray and torch.
    start_ray_early(job)
    from launcher.predict.run import predict_run

    result = predict_run(run_dir, input, output, OUT, job)
    skipped = f", {result.skipped_rows} of them without a prediction" if result.skipped_rows else ""
    # All rows were predicted by earlier commands.
    is_unchanged = result.found_rows == result.rows
    print_line(f"{'complete: ' if is_unchanged else ''}{result.rows} rows{skipped} in {output}")
