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

from launcher.data.in_memory import InMemorySource, iter_shards_in_memory
from launcher.data.stream import ShardStream
from launcher.data.windows import train_windows
from launcher.driver.prepare import PreparedJob
from launcher.errors import MicroBatchOOMError, TrainingError
from launcher.rundir.directory import RunDir
from launcher.rundir.records import ResultRecord, TrainerState
from launcher.tasks import build_task
from launcher.train.checkpoint import catalog, reader
from launcher.train.checkpoint.writer import CheckpointWriter
from launcher.train.engine import Engine
from launcher.train.fault_injection import FaultInjector
from launcher.train.loggers.run_log import RunLog
from launcher.train.loop import INITIAL_STATE, EvaluationEvent, TrainContext, train


@dataclass(frozen=True)
class CheckpointRef:
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

    it: TrainContext
    log: RunLog
    steps: Generator[EvaluationEvent, None, ResultRecord | None]
    state: TrainerState


class TrialWorker:
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

    def begin(self, prepared: PreparedJob, start: CheckpointRef | None) -> None:
        """Build the model, load the checkpoint, lay out the stream (a collective)."""
        self.end()
        job = prepared.job
        torch.use_deterministic_algorithms(job.train.deterministic)
        task = build_task(job)
        engine = Engine(job, task, prepared.plan.micro_batch)
        state = INITIAL_STATE
        if start is not None:
            state = reader.load(RunDir(start.uri), engine, start.step)
        log = RunLog(prepared.run, job, None, state)
        saver = CheckpointWriter(prepared.run, job, engine)
        it = TrainContext(
            prepared.run, job, prepared.plan, task, engine, prepared.splits, saver, FaultInjector(prepared.run)
        )
        source = InMemorySource(job, prepared.splits, engine.world_size)
        stream = ShardStream(iter_shards_in_memory(source, train_windows(prepared.plan, job, state.step), engine.rank))
        self._training = _Training(it, log, train(it, stream, log, state), state)

    def advance(self) -> EvaluationEvent | None:
        """Train to the next evaluation (a collective); None at the end.

        Raises:
            TrainingError: the loss is not finite, on all workers alike.
            MicroBatchOOMError: memory ran out here; unless this worker is alone, the group is of no use any more.
        """
        training = self._training
        assert training is not None
        try:
            pause = next(training.steps)
        except StopIteration:
            return None
        except MicroBatchOOMError:
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
            training.it.writer.save(training.state)
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
class RemoteTrialWorker(TrialWorker):
    """A worker beside rank 0, in a process of its own."""
