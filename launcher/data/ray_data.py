"""Transport of the stream from Ray Data workers to train workers: one read task per window, one block per rank.

Runs on the head and, where named, on data workers and train workers. All epochs and evaluations are one dataset, so the
end of an epoch or an evaluation does not stall the loop. Ray Data builds every task of a dataset before the first one
runs (milliseconds each), so a long stream is several datasets, its segments: neither a start nor a recovery waits for
the tasks of weeks. `stream.py` is what a task does.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.train import DataConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.data.in_memory import can_read_in_workers, iter_shards_in_memory
from launcher.data.splits import Split
from launcher.data.stream import StreamSource
from launcher.data.windows import TRAIN, Window, stream_segments, stream_windows
from launcher.errors import LauncherError
from launcher.rundir.plan import Plan
from launcher.spec.job import JobSpec

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.data import DataIterator

TASK_CPUS = 0.001
"""Logical CPUs of a read task: it must never wait for CPUs that train workers reserve for the whole run."""

_LATER = "{}, later segments"
_WARM_UP_ROWS = 8
# Ray reuses a worker process only for tasks of the same runtime environment. Ray Train's controller sets this variable
# for its run (train/v2/api/data_parallel_trainer.py in Ray 2.60), and the tasks of its datasets inherit it.
_RAY_DATA_ENV = {"env_vars": {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}}

_has_imported = False


@contextmanager
def whole_imports() -> Iterator[None]:
    """Exit the process if its first task is cancelled, which may leave a module half imported. On data workers.

    Ray cancels the read tasks of a lost worker group with a KeyboardInterrupt. Inside an import it leaves half a module
    in `sys.modules` (transformers then raises ModuleNotFoundError for good), and the next task in the same process
    would fail.
    """
    global _has_imported
    try:
        yield
    except KeyboardInterrupt:
        # `os._exit`, not `sys.exit`: nothing of this process may be used again, and Ray starts another one for the next
        # task.
        if not _has_imported:
            os._exit(1)
        raise
    _has_imported = True


class _WindowSource(Datasource):
    """Windows as a Ray Data source: one read task per window, one block per rank."""

    def __init__(self, source: StreamSource, windows: list[Window]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Once for all tasks: the splits of 100,000 files in every task would make each of them megabytes.
        self._source = ray.put(source)
        self._windows = windows
        self._world_size = source.world_size

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None, **_: object
    ) -> list[ReadTask]:
        # Ray Data's own parallelism is ignored: the number of tasks is that of the windows.
        return [ReadTask(_read_function(self._source, window), self._metadata()) for window in self._windows]

    def _metadata(self) -> BlockMetadata:
        # A fictitious size: it only has to exceed target_max_block_size, so that Ray Data merges no blocks.
        size = 65536 * self._world_size
        return BlockMetadata(num_rows=self._world_size, size_bytes=size, input_files=None, exec_stats=None)


def _read_function(source: "ray.ObjectRef[StreamSource]", window: Window) -> Callable[[], Iterable[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        with whole_imports():
            # A generator: Ray takes each shard before the next one is built, so a task holds one at a time.
            for shard in ray.get(source).read(window):
                # `large_binary`: a shard may exceed the 2 GiB that the offsets of `binary` can address.
                yield pa.table({"shard": pa.array([shard], pa.large_binary())})

    return read


def split_stream(source: StreamSource, windows: list[Window]) -> "list[DataIterator]":
    """Return one Ray Data iterator per rank; rank r reads shard r of every window, in window order.

    Ray promises no such order (`OutputSplitter` in Ray 2.60). It holds because of three things together, and
    `tests/data/test_ray_data.py` fails if a version of Ray changes one of them:

    - `preserve_order`: blocks reach the splitter in the order of the tasks, and locality does not reorder them;
    - one row per block: a block has one rank's shard, and blocks are neither merged nor cut;
    - the splitter gives each block to the rank with the fewest rows so far, lowest rank first: with blocks of one row
      that is round-robin.
    """
    dataset = ray.data.read_datasource(
        _WindowSource(source, windows),
        # Not more than there are tasks, or Ray cuts the output of each task into several blocks
        # (`logical/rules/set_read_parallelism.py` in Ray 2.60).
        override_num_blocks=max(1, len(windows)),
        # Bounds the tasks that run at once.
        concurrency=source.job.cluster.most_data_workers,
        num_cpus=TASK_CPUS,
    )
    dataset.context.execution_options.preserve_order = True
    # Bytes: each table that `read` yields becomes a block of its own.
    dataset.context.target_max_block_size = 1
    dataset.context.enable_progress_bars = False
    # A task pauses while this many of its blocks wait for a consumer (default 2), and keeps its slot. Ranks take their
    # shards of a window at about the same time, so let a task emit all of them and finish. Ray 2.60 has no public name.
    dataset.context._max_num_blocks_in_streaming_gen_buffer = max(2, source.world_size)
    # `equal=True` would hold blocks back, and drop the last ones, to give ranks equally many rows; here they have that
    # anyway. An iteration begins with a barrier over all ranks, and a rank that falls behind may stall the others.
    return list(dataset.streaming_split(source.world_size, equal=False))


class DeterministicDataConfig(DataConfig):
    """Ray Train's data configuration that splits the stream over the ranks of a worker group of any size.

    Ray Train calls `configure` when a worker first asks for a dataset: once for the first segment of a stream, and once
    for all later ones, if there are any.

    Args:
        job: Resolved job.
        plan: Plan of the run.
        splits: Splits by name, every split that is streamed among them.
        start: Step of the checkpoint that the workers resume from; 0 for none.
    """

    def __init__(self, job: JobSpec, plan: Plan, splits: dict[str, Split], start: int = 0) -> None:
        super().__init__()
        self._job = job
        self._plan = plan
        self._splits = splits
        self._start = start

    def names(self, streams: Iterable[str]) -> list[str]:
        """Return the names of the datasets that Ray Train must know; none if the train workers read by themselves."""
        if can_read_in_workers(self._job, self._splits):
            return []
        return [name for stream in streams for name in (stream, _LATER.format(stream))]

    def configure(
        self,
        datasets: "dict[str, ray.data.Dataset]",
        world_size: int,
        worker_handles: "list[ActorHandle[object]] | None",
        worker_node_ids: list[str] | None,
        **_: object,
    ) -> "list[dict[str, DataIterator]]":
        """Return the iterators of each rank by dataset; `datasets` holds placeholders, only their names count."""
        # The size of the group that Ray has started: attempts of an elastic run differ in it. The global batches stay,
        # and are cut into another number of shards.
        source = StreamSource(self._job, self._splits, world_size)
        shards: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, split in self._splits.items():
            later = _LATER.format(name)
            if name in datasets:
                # Lazily: a long stream has far more windows than its first segment.
                first = next(stream_segments(name, split.source_rows, self._plan, self._job, self._start))
                for rank, iterator in enumerate(split_stream(source, first)):
                    shards[rank][name] = iterator
            elif later in datasets:
                # On this process's node: losing another one must not take the splitter along. Soft: better elsewhere
                # than never.
                head = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
                actor: Any = _StreamSplitter
                splitter = actor.options(scheduling_strategy=head).remote(source, name, self._plan, self._start)
                for rank in range(world_size):
                    # No iterator of Ray's: `DatasetManager` (Ray 2.60) hands anything on, but shuts down only iterators
                    # of its own class.
                    shards[rank][later] = _LazySplitter(splitter, rank)  # type: ignore[assignment]  # Ray passes it on
        return shards


# Without CPUs, so that it starts although train workers have reserved all of them. A plain actor runs one call at a
# time, so ranks that ask at once need no lock.
@ray.remote(num_cpus=0)
class _StreamSplitter:
    """Actor that splits the segments after the first one, each when a rank asks for it."""

    def __init__(self, source: StreamSource, name: str, plan: Plan, start: int) -> None:
        self._source = source
        self._segments = enumerate(stream_segments(name, source.splits[name].source_rows, plan, source.job, start))
        self._number, _ = next(self._segments)
        self._iterators: list[DataIterator] = []

    def segment(self, number: int, rank: int) -> "DataIterator":
        """Return a rank's iterator of a segment; the iterators of the segment before are dropped.

        That is safe: all ranks have opened the segment before, or none of them could have consumed it to its end.
        """
        # The first rank that asks splits the segment; the others find it done.
        while self._number < number:
            self._number, windows = next(self._segments)
            self._iterators = split_stream(self._source, windows)
        return self._iterators[rank]


@dataclass(frozen=True)
class _LazySplitter:
    """Client of a `_StreamSplitter` for one rank."""

    splitter: "ActorHandle[Any]"
    rank: int

    def segment(self, number: int) -> "DataIterator":
        iterator: ray.ObjectRef[DataIterator] = self.splitter.segment.remote(number, self.rank)
        # The loop pauses at each new segment, as prefetching does not reach over its end: few long segments, not many
        # short ones.
        return ray.get(iterator)


def iter_shards(name: str, splits: dict[str, Split], plan: Plan, job: JobSpec, start: int = 0) -> Iterator[pa.Buffer]:
    """Yield the serialized shards of this rank for one stream. On train workers.

    Args:
        name: Name of the stream: `train`, or the split that is evaluated.
        splits: Splits, as `DeterministicDataConfig` has them.
        plan: Plan of the run.
        job: Job of the run.
        start: Step of the checkpoint that the workers resume from.
    """
    # Every rank must run this to the end: opening a segment is a barrier over all of them, see below.
    rows = splits[name].source_rows
    if can_read_in_workers(job, splits):
        source = StreamSource(job, splits, job.cluster.workers)
        rank = ray.train.get_context().get_world_rank()
        yield from iter_shards_in_memory(source, stream_windows(name, rows, plan, job, start), rank)
        return
    # The windows are walked here too, but only counted: reader and splitter must agree on the number of segments.
    for number, _ in enumerate(stream_segments(name, rows, plan, job, start)):
        if number:
            # Collective: the call waits until rank 0 has made it too (`_get_sharded_dataset_iterator` in Ray 2.60).
            # Only rank 0 configures the dataset, and later calls with the same name get the cached one.
            later = ray.train.get_dataset_shard(_LATER.format(name))
            assert isinstance(later, _LazySplitter)
            yield from receive_shards(later.segment(number))
        else:
            yield from receive_shards(ray.train.get_dataset_shard(name))


def receive_shards(iterator: "DataIterator") -> Iterator[pa.Buffer]:
    """Yield the serialized shards of a rank's Ray Data iterator; two are fetched ahead."""
    # One row is one shard, so a batch of one never copies. Prefetching hides the transfer from another node.
    for batch in iterator.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
        assert isinstance(batch, pa.Table)
        yield batch.column("shard").chunk(0)[0].as_buffer()


def warm_up(source: StreamSource) -> None:
    """Start a data worker early, if the job has any, and do not wait for it. On the head.

    Train workers take longer to start. Meanwhile a task imports the libraries, loads the tokenizer and encodes a few
    rows; Ray reuses its process for the first window.
    """
    if can_read_in_workers(source.job, source.splits):
        return
    _encode_some.options(runtime_env=_RAY_DATA_ENV).remote(source)


# No retries: a lost warm-up costs nothing but the time that it would have saved.
@ray.remote(num_cpus=TASK_CPUS, max_retries=0)
def _encode_some(source: StreamSource) -> None:
    # The first window raises the same error, where it is reported.
    with suppress(LauncherError):
        task = source.task(for_evaluation=False)
        split = source.splits[TRAIN]
        ids = np.arange(min(_WARM_UP_ROWS, split.rows), dtype=np.int64)
        task.encode(split.read(ids, task.input_columns + task.target_columns), True)
