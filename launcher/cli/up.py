"""The commands `up` and `down`: a local Ray that stays between commands. Runs on the client."""

import time
from typing import Annotated

import typer

from launcher.cli.options import OUT
from launcher.errors import ClusterError, UserError
from launcher.processes import local_ray, warm_ray

commands = typer.Typer()


@commands.command()
def up(
    idle_minutes: Annotated[float, typer.Option(min=0.0, help="Minutes without a command after which it ends.")] = 30.0,
) -> None:
    """Start a local Ray that stays: train, tune, predict, evaluate and check then begin within seconds.

    They run in the environment (packages, variables) in which it was started, and do not use it in another one.
    """
    found = warm_ray.find()
    if found is not None:
        OUT.print(f"is up already: {_described(found)}", highlight=False, soft_wrap=True)
        return
    try:
        warm = local_ray.up(idle_minutes * 60)
    except local_ray.LocalRayError as error:
        raise ClusterError(str(error)) from error
    OUT.print(
        f"up: {_described(warm)}; it ends after {idle_minutes:g} idle minutes, or with `launcher down`",
        highlight=False,
        soft_wrap=True,
    )


@commands.command()
def down(
    force: Annotated[bool, typer.Option("--force", help="Also while a command runs on it, which is lost.")] = False,
) -> None:
    """End the Ray that `launcher up` has started."""
    found = warm_ray.find()
    if found is None:
        OUT.print("nothing is up", highlight=False)
        return
    if warm_ray.is_used() and not force:
        raise UserError(
            f"a command runs on the Ray of `launcher up` (process {found.pid}); wait for it, or end both with --force"
        )
    warm_ray.stop(found)
    OUT.print(f"down: {_described(found)}", highlight=False, soft_wrap=True)


def _described(warm: warm_ray.WarmRay) -> str:
    minutes = (time.time() - warm.started_at) / 60
    return f"Ray at {warm.address} (process {warm.pid}, since {minutes:.0f} min)"
