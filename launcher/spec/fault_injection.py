"""Parses the faults that `--chaos` injects: `kill=1@step37,term=node@step80,disk_full@step90`. Runs anywhere.

Each fault is a kind, a target and a time. Read `train/fault_injection.py` next, which injects them.
"""

import random
import re
from dataclasses import dataclass

from launcher.errors import UserError

PLACES = ("save", "upload", "evaluation", "export")
"""Times other than a step: while a checkpoint is written, before it is complete, in an evaluation, in the export."""
_HELP = (
    "write KIND[=TARGET]@WHEN, as kill=1@step37 (rank 1), kill=driver@step50, kill=0@save, freeze=1@step20, "
    "term=node@step80, term=driver@step80, disk_full@step90, flaky@step1, corrupt@step60, nan@step12, "
    f"random=3 or seed=7; WHEN is stepN or one of {', '.join(PLACES)}"
)
_TARGETS: dict[str, tuple[str, ...]] = {
    "kill": ("rank", "driver"),
    "freeze": ("rank",),
    "term": ("node", "driver"),
    "disk_full": (),
    "flaky": (),
    "corrupt": (),
    "nan": (),
}


@dataclass(frozen=True)
class Fault:
    """One fault. It happens once in a run; `nan` happens each time its step is run.

    Args:
        kind: Kind of fault.
        target: Target: a rank, "node", "driver", or None if the kind has no target.
        step: Number of completed steps at which it happens; None if it happens at a place.
        place: Place where it happens, one of `PLACES`; None if it happens at a step.
    """

    kind: str
    target: int | str | None
    step: int | None = None
    place: str | None = None

    def __str__(self) -> str:
        whom = "" if self.target is None else f"={self.target}"
        return f"{self.kind}{whom}@{self.place or f'step{self.step}'}"


@dataclass(frozen=True)
class Faults:
    """All faults of one `--chaos` option.

    Args:
        explicit: Faults that are written out.
        num_random: Number of additional kills at random steps and ranks.
        seed: Random seed of these kills.
    """

    explicit: tuple[Fault, ...] = ()
    num_random: int = 0
    seed: int = 0

    def resolve(self, total_steps: int, workers: int) -> tuple[Fault, ...]:
        """Return all faults of a run, including the random kills.

        Args:
            total_steps: Optimizer steps of the run.
            workers: Train workers of the run.

        Raises:
            UserError: A fault is for a step or a rank that the run does not have.
        """
        for fault in self.explicit:
            if fault.step is not None and fault.step > total_steps:
                raise UserError(f"--chaos: {fault} is beyond the run's {total_steps} steps; name one of them")
            if isinstance(fault.target, int) and fault.target >= workers:
                ranks = f"the ranks are 0 to {workers - 1}"
                raise UserError(f"--chaos: {fault} is for rank {fault.target}, and {ranks}; name one of them")
        # A generator of its own: nothing else that draws may move the faults. The order of the draws, rank before step,
        # is part of what a seed means.
        rng = random.Random(self.seed)
        drawn = (Fault("kill", rng.randrange(workers), rng.randint(1, total_steps)) for _ in range(self.num_random))
        return (*self.explicit, *sorted(drawn, key=lambda fault: fault.step or 0))


def parse_faults(text: str) -> Faults:
    """Parse the value of `--chaos`.

    Raises:
        UserError: A part of it is not a fault.
    """
    listed = []
    numbers = {"random": 0, "seed": 0}
    for part in filter(None, (part.strip() for part in text.split(","))):
        # At most nine digits, so that no number exceeds what a step or a seed can hold.
        number = re.fullmatch(r"(random|seed)=(\d{1,9})", part)
        if number is not None:
            numbers[number.group(1)] = int(number.group(2))
            continue
        match = re.fullmatch(r"(\w+?)(?:=(\w+))?@(?:step(\d{1,9})|(\w+))", part)
        fault = None if match is None else _make_fault(*match.groups())
        if fault is None:
            raise UserError(f"--chaos: {part} is not a fault; {_HELP}")
        listed.append(fault)
    if not listed and not numbers["random"]:
        raise UserError(f"--chaos: contains no fault; {_HELP}")
    return Faults(tuple(listed), numbers["random"], numbers["seed"])


def _make_fault(kind: str, whom: str | None, step: str | None, place: str | None) -> Fault | None:
    allowed = _TARGETS.get(kind)
    # A kind that needs a target gets one, and no other does: `kill@step5` would leave open whom.
    if allowed is None or (whom is not None) != bool(allowed):
        return None
    is_rank = whom is not None and re.fullmatch("[0-9]+", whom) is not None
    if whom is not None and ("rank" if is_rank else whom) not in allowed:
        return None
    at_place = kind == "kill" and is_rank and place in PLACES
    # Step 0 never comes: a step counts when it is completed.
    if not at_place and (step is None or int(step) == 0):
        return None
    target: int | str | None = int(whom) if whom is not None and is_rank else whom
    return Fault(kind, target, None if step is None else int(step), place)
