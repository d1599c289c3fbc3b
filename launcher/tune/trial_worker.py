"""One worker of a trial: the training loop, from evaluation to evaluation, in a process that outlives the trial.

Imports, the process group, encoded rows (`data/in_memory.py`) and files in the page cache stay warm from trial to
trial. Train workers; read `trial.py` next, which Ray Tune drives.
"""

import gc
import os
from collections.abc import Generator
from dataclasses import dataclass

import ray
import torch
import torch.distributed as dist

from launcher.data.in_memory import KeptSource, cells
from launcher.data.stream import ShareStream
from launcher.data.windows import train_windows
from launcher.driver.prepare import Prepared
from launcher.errors import MicroBatchTooLarge, TrainingError
from launcher.rundir.directory import RunDir
from launcher.rundir.records import ResultRecord, RunStateRecord
from launcher.tasks import build_task
from launcher.train.checkpoint import catalog, reader
from launcher.train.checkpoint.writer import Saver
from launcher.train.engine import Engine
from launcher.train.fault_injection import Chaos
from launcher.train.loggers.run_log import RunLog
from launcher.train.loop import FRESH, Pause, TrainRun, train


@dataclass(frozen=True)
class Start:
    """Where a trial goes on.

    Args:
        uri: the run whose checkpoint it is: the trial's own, or that of the trial it copies.
        step: of the checkpoint.
    """

    uri: str
    step: int


@dataclass
class _Training:
    """A trial under way."""

    it: TrainRun
    log: RunLog
    steps: Generator[Pause, None, ResultRecord | None]
    state: RunStateRecord


class Rank:
    """One worker, for one trial after another.

    Args:
        rank: of this worker in its group.
        world_size: workers of a trial.
        address: `tcp://host:port` of rank 0.
        threads: CPU threads of this worker.
    """

    def __init__(self, rank: int, world_size: int, address: str, threads: int) -> None:
        cuda = torch.cuda.is_available()
        # Ray shows each worker its own GPU alone, so that it is the first.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
        if not cuda:
            torch.set_num_threads(threads)
        dist.init_process_group("nccl" if cuda else "gloo", init_method=address, rank=rank, world_size=world_size)
        self._rank = rank
        self._training: _Training | None = None

    def begin(self, prepared: Prepared, start: Start | None) -> None:
        """Build the model, load the checkpoint, lay out the stream (a collective)."""
        self.end()
        job = prepared.job
        torch.use_deterministic_algorithms(job.train.deterministic)
        task = build_task(job)
        engine = Engine(job, task, prepared.plan.micro_batch)
        state = FRESH
        if start is not None:
            state = reader.load(RunDir(start.uri), engine, start.step)
        log = RunLog(prepared.run, job, None, state)
        saver = Saver(prepared.run, job, engine)
        it = TrainRun(prepared.run, job, prepared.plan, task, engine, prepared.splits, saver, Chaos(prepared.run))
        source = KeptSource(job, prepared.splits, engine.world_size)
        stream = ShareStream(cells(source, train_windows(prepared.plan, job, state.step), engine.rank))
        self._training = _Training(it, log, train(it, stream, log, state), state)

    def advance(self) -> Pause | None:
        """Train to the next evaluation (a collective); None at the end.

        Raises:
            TrainingError: the loss is not finite, on all workers alike.
            MicroBatchTooLarge: memory ran out here; unless this worker is alone, the group is of no use any more.
        """
        training = self._training
        assert training is not None
        try:
            pause = next(training.steps)
        except StopIteration:
            return None
        except MicroBatchTooLarge:
            if dist.get_world_size() > 1:
                self.leave()  # the others are inside a collective
            raise
        except TrainingError:
            raise
        except BaseException:
            self.leave()  # or the other workers would wait for this one
            raise
        training.state = pause.state
        return pause

    def save(self) -> int:
        """Write a checkpoint of the last pause unless there is one (a collective); returns its step."""
        training = self._training
        assert training is not None
        run, step = training.it.run, training.state.step
        there = [step in catalog.complete_steps(run)]
        dist.broadcast_object_list(there)
        if not there[0]:
            training.it.saver.save(training.state)
        return step

    def end(self) -> None:
        """Let the trial's model go; the process stays warm."""
        if self._training is None:
            return
        self._training.steps.close()
        self._training.log.close()
        self._training.it.engine.close()
        self._training = None
        gc.collect()  # engine and model refer to each other

    def leave(self) -> None:
        """Give up the trial and the group; calls of the others that wait for this worker fail."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self.end()


@ray.remote
class Peer(Rank):
    """A worker beside rank 0, in a process of its own."""
