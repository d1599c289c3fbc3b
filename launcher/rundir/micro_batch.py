"""The micro-batch a run was healed to: micro-batch.json in its directory. Runs anywhere.

`train/oom.py` writes it when memory ran out; `driver/prepare.py` takes the smaller micro-batch when the run goes on.
"""

from launcher.rundir.directory import RunDir
from launcher.rundir.records import Record

FILE = "micro-batch.json"


class MicroBatchReduction(Record):
    """Memory ran out once."""

    step: int
    """That was being made, counted from 1."""
    micro_batch: int
    """That did not fit."""
    reduced: int
    """What was taken instead."""
    restarted: bool
    """Whether the workers had to start again (ZeRO 2 and 3)."""

    def sentence(self) -> str:
        """For log and report."""
        how = "the workers start again from the last checkpoint" if self.restarted else "the step was made again"
        return (
            f"out of memory in step {self.step}: micro-batches of {self.reduced} instead of {self.micro_batch} from "
            f"here on, {how}; same batches, same result"
        )


class MicroBatchRecord(Record):
    """micro-batch.json."""

    micro_batch: int
    """Largest that fits, as far as the run knows; takes precedence over a larger `parallel.micro_batch`. Delete the
    file when the workers have more memory."""
    reductions: tuple[MicroBatchReduction, ...]


def record_reduction(run: RunDir, halving: MicroBatchReduction) -> MicroBatchReduction:
    """Write a halving down, so that the run goes on with it; the same one of several workers counts once."""
    known = run.find_record(FILE, MicroBatchRecord)
    halvings = known.reductions if known is not None else ()
    if halving not in halvings:
        halvings = (*halvings, halving)
    smallest = min(h.reduced for h in halvings)
    run.write_record(FILE, MicroBatchRecord(micro_batch=smallest, reductions=halvings))
    return halving


def read_reductions(run: RunDir) -> tuple[MicroBatchReduction, ...]:
    """All of a run's, in order."""
    known = run.find_record(FILE, MicroBatchRecord)
    return () if known is None else known.reductions


def effective_micro_batch(run: RunDir, micro_batch: int) -> int:
    """The micro-batch with which a run goes on."""
    known = run.find_record(FILE, MicroBatchRecord)
    return micro_batch if known is None else min(micro_batch, known.micro_batch)
