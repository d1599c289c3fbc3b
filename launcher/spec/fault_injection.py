"""Faults on purpose: what `--chaos` says, parsed. Runs anywhere; `train/fault_injection.py` makes them happen.

`kill=1@step37,term=node@step80,disk_full@step90`: what, whom, and when. A word that is wrong is refused by name.
"""

import random
import re
from dataclasses import dataclass
from typing import Literal

from launcher.errors import UserError

Kind = Literal["kill", "freeze", "term", "disk_full", "flaky", "corrupt", "nan", "random"]
PLACES = ("save", "upload", "evaluation", "export")
"""Where else than at a step: while a checkpoint is written, before it is completed, in an evaluation, in the export."""
_HELP = (
    "write KIND[=WHOM]@WHEN, as kill=1@step37 (rank 1), kill=driver@step50, kill=0@save, freeze=1@step20, "
    "term=node@step80, term=driver@step80, disk_full@step90, flaky@step1, corrupt@step60, nan@step12, "
    f"random=3 or seed=7; WHEN is stepN or one of {', '.join(PLACES)}"
)
_WHOM: dict[str, tuple[str, ...]] = {
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
    """One fault, which happens once in the life of a run; `nan` happens whenever its step is made.

    Args:
        kind: what happens.
        whom: to whom: a rank, "node", "driver", or nobody.
        step: once so many steps are done; None at a place instead.
        place: one of `PLACES`.
    """

    kind: str
    whom: int | str | None
    step: int | None = None
    place: str | None = None

    def __str__(self) -> str:
        whom = "" if self.whom is None else f"={self.whom}"
        return f"{self.kind}{whom}@{self.place or f'step{self.step}'}"


@dataclass(frozen=True)
class Faults:
    """All that was asked for.

    Args:
        listed: by name.
        drawn: how many kills at random.
        seed: of these.
    """

    listed: tuple[Fault, ...] = ()
    drawn: int = 0
    seed: int = 0

    def of(self, total_steps: int, workers: int) -> tuple[Fault, ...]:
        """All faults of a run, the drawn ones among them.

        Raises:
            UserError: one is meant for a step or a rank that the run does not have.
        """
        for fault in self.listed:
            if fault.step is not None and fault.step > total_steps:
                raise UserError(f"--chaos: {fault} is beyond the run's {total_steps} steps; name one of them")
            if isinstance(fault.whom, int) and fault.whom >= workers:
                raise UserError(f"--chaos: {fault} is for rank {fault.whom}, and the ranks are 0 to {workers - 1}")
        dice = random.Random(self.seed)
        drawn = (Fault("kill", dice.randrange(workers), dice.randint(1, total_steps)) for _ in range(self.drawn))
        return (*self.listed, *sorted(drawn, key=lambda fault: fault.step or 0))


def parse_faults(text: str) -> Faults:
    """What `--chaos` asks for.

    Raises:
        UserError: a part of it is no fault.
    """
    listed, numbers = [], {"random": 0, "seed": 0}
    for part in filter(None, (part.strip() for part in text.split(","))):
        counted = re.fullmatch(r"(random|seed)=(\d{1,9})", part)
        if counted is not None:
            numbers[counted.group(1)] = int(counted.group(2))
            continue
        found = re.fullmatch(r"(\w+?)(?:=(\w+))?@(?:step(\d{1,9})|(\w+))", part)
        fault = None if found is None else _fault(*found.groups())
        if fault is None:
            raise UserError(f"--chaos: {part} is no fault; {_HELP}")
        listed.append(fault)
    if not listed and not numbers["random"]:
        raise UserError(f"--chaos: names no fault; {_HELP}")
    return Faults(tuple(listed), numbers["random"], numbers["seed"])


def _fault(kind: str, whom: str | None, step: str | None, place: str | None) -> Fault | None:
    allowed = _WHOM.get(kind)
    if allowed is None or (whom is not None) != bool(allowed):
        return None
    is_rank = whom is not None and whom.isdigit()
    if whom is not None and ("rank" if is_rank else whom) not in allowed:
        return None
    at_place = kind == "kill" and is_rank and place in PLACES
    if not at_place and (step is None or int(step) == 0):
        return None
    target: int | str | None = int(whom) if whom is not None and is_rank else whom
    return Fault(kind, target, None if step is None else int(step), place)
