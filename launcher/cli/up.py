"""The commands `up` and `down`: a local Ray that stays up between commands. Runs on the client."""

import time
from typing import Annotated

import typer

from launcher.cli.options import print_line
from launcher.errors import ClusterError, UserError
from launcher.processes import local_ray, warm_ray

commands = typer.Typer()


@commands.command()
def up(
    idle_minutes: Annotated[float, typer.Option(min=0.0, help="Stop after this many idle minutes.")] = 30.0,
) -> None:
    """Start a local Ray that stays up, so that commands start faster.

    train, tune, predict, evaluate and check use it, if their environment (packages, variables) is the one in which it
    was started.
    """
    warm = warm_ray.find_running()
    if warm is not None:
        print_line(f"is up already: {_describe(warm)}")
        return
    try:
        warm = local_ray.up(idle_minutes * 60)
    except local_ray.LocalRayError as error:
        raise ClusterError(str(error)) from error
    print_line(f"up: {_describe(warm)}; it stops after {idle_minutes:g} idle minutes, or with `launcher down`")


@commands.command()
def down(
    force: Annotated[bool, typer.Option("--force", help="Stop even if a command uses it, which is lost.")] = False,
) -> None:
    """Stop the Ray that 'launcher up' started."""
    warm = warm_ray.find_running()
    if warm is None:
        print_line("nothing is up")
        return
    if warm_ray.is_used() and not force:
        raise UserError(
            f"a command runs on the Ray of `launcher up` (process {warm.pid}); wait for it, or stop both with --force"
        )
    warm_ray.stop(warm)
    print_line(f"down: {_describe(warm)}")


def _describe(warm: warm_ray.WarmRay) -> str:
    minutes = (time.time() - warm.started_at) / 60
    return f"Ray at {warm.address} (process {warm.pid}, since {minutes:.0f} min)"
