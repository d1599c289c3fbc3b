"""Options of `replay --prove`: which shapes a run is trained on again. Runs on the client; the training, on the head.

Read `driver/prove.py` next.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.cli.options import OUT, REPLAY_KEYS, load_run_job, print_line, start_ray_early
from launcher.errors import SpecError, UserError

if TYPE_CHECKING:
    from launcher.rundir.directory import RunDir
    from launcher.spec.job import JobSpec

_SHAPE_KEYS = {"cluster.workers": "--workers", "cluster.min_workers": "--workers", "parallel.zero": "--zero"}
"""Keys that make a shape, with the option that sets them."""
_MAX_STAGE = 3


def check_replay_options(
    overrides: Sequence[str], name: str | None, prove: bool, workers: str | None, zero: str | None
) -> None:
    """Refuse options of `replay` that contradict each other, and numbers that are none.

    Raises:
        UserError: There are such options.
    """
    options = {"--workers": workers, "--zero": zero}
    if not prove:
        given = [option for option, value in options.items() if value is not None]
        if given:
            raise UserError(
                f"{given[0]}: is for the shapes of --prove; add --prove, or write cluster.workers=N or parallel.zero=N "
                "for a single replay"
            )
        return
    for option, text in options.items():
        _parse_numbers(option, text)
    if name is not None:
        raise UserError(f"--name: {name} is for one run, and --prove names one for each shape; drop one of them")
    for override in overrides:
        option = _SHAPE_KEYS.get(override.partition("=")[0], "")
        if option:
            raise UserError(f"override {override}: --prove decides this for each shape; give {option} instead")


def prove_shapes(run: "RunDir", overrides: Sequence[str], workers: str | None, zero: str | None) -> bool:
    """Prove a run on each combination of workers and ZeRO stages; return True if no shape failed.

    Args:
        run: Finished run.
        overrides: Changes of the command line, `key.path=value`.
        workers: Numbers of workers, as `1,2,4`; None takes the powers of two that find room here.
        zero: ZeRO stages, as `0,1`; None takes these two.

    Raises:
        UserError: A change is not allowed, or the job cannot have one of the stages.
    """
    from launcher.spec.exactness import provable_workers

    job = load_run_job(run, list(overrides), REPLAY_KEYS)
    counts = _parse_numbers("--workers", workers) or provable_workers(job, os.cpu_count() or 1)
    stages = _parse_numbers("--zero", zero) or _find_stages(run, overrides) or (job.zero_stage,)
    jobs = [_load_shape(run, overrides, count, stage) for count in counts for stage in stages]
    # Before the imports below load ray and torch.
    start_ray_early(max(jobs, key=lambda job: job.cluster.workers))
    from launcher.driver.prove import prove_run

    certificate = prove_run(run, jobs, OUT)
    print_line(certificate.sentence)
    print_line(f"certificate: {run.path('certificate.json')}")
    return certificate.is_proven


def _load_shape(run: "RunDir", overrides: Sequence[str], workers: int, stage: int) -> "JobSpec":
    # A shape has as many workers as its name says, so it must not shrink.
    shape = [f"cluster.workers={workers}", "cluster.min_workers=null", f"parallel.zero={stage}"]
    return load_run_job(run, [*overrides, *shape], REPLAY_KEYS)


def _find_stages(run: "RunDir", overrides: Sequence[str]) -> tuple[int, ...]:
    """Return those of the stages 0 and 1 that the job can have: fp16, adafactor and offloading exclude some."""
    stages = []
    for stage in (0, 1):
        try:
            _load_shape(run, overrides, 1, stage)
        except SpecError:
            continue
        stages.append(stage)
    return tuple(stages)


def _parse_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Parse `1,2,4`; return () for None.

    Raises:
        UserError: A number is not one that the option takes.
    """
    numbers: dict[int, None] = {}
    for word in text.split(",") if text is not None else ():
        number = int(word) if word.strip().isdecimal() else -1
        if option == "--workers" and number < 1:
            raise UserError(f"--workers: '{word}' is not a number of workers; give numbers from 1 on, such as 1,2,4")
        if option == "--zero" and not 0 <= number <= _MAX_STAGE:
            raise UserError(f"--zero: '{word}' is not a ZeRO stage; give some of 0, 1, 2 and 3, such as 0,1")
        numbers[number] = None
    return tuple(numbers)
