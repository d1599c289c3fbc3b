"""From Ray Data workers to train workers: one read task per window, one block per worker, in order.

All epochs and evaluations are in one plan, so neither an epoch's end nor an evaluation stalls the loop. Ray Data lays
out every task before the first one runs, milliseconds for each; a long stream is dealt in segments, so that neither a
start nor a recovery waits for the tasks of weeks. What a task does: `stream.py`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray.data
import ray.train
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.train import DataConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.data.in_memory import can_read_in_workers, iter_shards_in_memory
from launcher.data.process import whole_imports
from launcher.data.splits import Split
from launcher.data.stream import StreamSource
from launcher.data.windows import Window, segments_of, windows_of
from launcher.rundir.plan import Plan
from launcher.spec.job import JobSpec

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.data import DataIterator

TASK_CPUS = 0.001
"""Logical CPUs a task of the stream reserves: it must never wait for CPUs that train workers hold for the whole run."""

_LATER = "{}, later segments"


class _Windows(Datasource):
    """Windows as a Ray Data source: one read task each, one block per worker."""

    def __init__(self, source: StreamSource, windows: list[Window]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._source, self._windows = ray.put(source), windows
        self._world_size = source.world_size

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None, **_: object
    ) -> list[ReadTask]:
        return [ReadTask(_reader(self._source, window), self._metadata()) for window in self._windows]

    def _metadata(self) -> BlockMetadata:
        # The size is a guess that only has to be above target_max_block_size, so that no two blocks are merged.
        size = 65536 * self._world_size
        return BlockMetadata(num_rows=self._world_size, size_bytes=size, input_files=None, exec_stats=None)


def _reader(source: "ray.ObjectRef[StreamSource]", window: Window) -> Callable[[], Iterable[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        with whole_imports():
            for share in ray.get(source).read(window):
                yield pa.table({"share": pa.array([share], pa.large_binary())})

    return read


def split_stream(source: StreamSource, windows: list[Window]) -> "list[DataIterator]":
    """One iterator per worker; worker r receives row r of every window, in window order.

    Ray Data keeps this only with preserve_order, one block per row, and a splitter that deals blocks round-robin;
    `tests/data/test_ray_data.py` guards it.
    """
    dataset = ray.data.read_datasource(
        _Windows(source, windows),
        override_num_blocks=max(1, len(windows)),
        concurrency=source.job.cluster.most_data_workers,
        # How many run at once is bounded by `concurrency`.
        num_cpus=TASK_CPUS,
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = 1
    dataset.context.enable_progress_bars = False
    # A task that waits for its consumer would keep its place; let it emit all workers' shares and finish.
    dataset.context._max_num_blocks_in_streaming_gen_buffer = max(2, source.world_size)
    return list(dataset.streaming_split(source.world_size, equal=False))


class DeterministicDataConfig(DataConfig):
    """Deals the canonical stream to however many workers the group has this time.

    Ray Train calls `configure` when a worker asks for a data set: once for the first segment of a stream, and once for
    all that follow, where there are any.

    Args:
        job: the resolved job.
        plan: its plan.
        splits: by name; must hold every split that is streamed.
        start: step of the checkpoint the workers go on from; 0 for none.
    """

    def __init__(self, job: JobSpec, plan: Plan, splits: dict[str, Split], start: int = 0) -> None:
        super().__init__()
        self._job, self._plan, self._splits, self._start = job, plan, splits, start

    def names(self, streams: Iterable[str]) -> list[str]:
        """Return the data sets Ray Train must know of, for the streams of some splits; none where workers read."""
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
        """What each worker gets of each data set; the data sets given are placeholders."""
        source = StreamSource(self._job, self._splits, world_size)
        shards: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, split in self._splits.items():
            if name in datasets:
                first = next(segments_of(name, split.rows, self._plan, self._job, self._start))
                for rank, iterator in enumerate(split_stream(source, first)):
                    shards[rank][name] = iterator
            elif (later := _LATER.format(name)) in datasets:
                here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
                actor: Any = _StreamSplitter
                dealer = actor.options(scheduling_strategy=here).remote(source, name, self._plan, self._start)
                for rank in range(world_size):
                    shards[rank][later] = _LazySplitter(dealer, rank)  # type: ignore[assignment]  # Ray passes it on
        return shards


@ray.remote(num_cpus=0)
class _StreamSplitter:
    """Deals the segments behind the first, each when a worker asks for it; the one before is let go then."""

    def __init__(self, source: StreamSource, name: str, plan: Plan, start: int) -> None:
        self._source = source
        self._segments = enumerate(segments_of(name, source.splits[name].rows, plan, source.job, start))
        self._number, _ = next(self._segments)
        self._dealt: list[DataIterator] = []

    def segment(self, number: int, rank: int) -> "DataIterator":
        """Segment `number` for a worker; all have begun the one before it, or none could have ended it."""
        while self._number < number:
            self._number, windows = next(self._segments)
            self._dealt = split_stream(self._source, windows)
        return self._dealt[rank]


@dataclass(frozen=True)
class _LazySplitter:
    """A worker's way to the segments behind the first."""

    dealer: "ActorHandle[Any]"
    rank: int

    def segment(self, number: int) -> "DataIterator":
        answer: ray.ObjectRef[DataIterator] = self.dealer.segment.remote(number, self.rank)
        return ray.get(answer)


def iter_shards(name: str, splits: dict[str, Split], plan: Plan, job: JobSpec, start: int = 0) -> Iterator[pa.Buffer]:
    """Yield the packed shares of this train worker, of one stream; in a train worker.

    Args:
        name: `train`, or the split that is evaluated.
        splits: As `DeterministicDataConfig` has them.
        plan: Of the run.
        job: Of the run.
        start: Step of the checkpoint the workers go on from.
    """
    rows = splits[name].rows
    if can_read_in_workers(job, splits):
        rank = ray.train.get_context().get_world_rank()
        yield from iter_shards_in_memory(
            StreamSource(job, splits, job.cluster.workers), windows_of(name, rows, plan, job, start), rank
        )
        return
    for number, _ in enumerate(segments_of(name, rows, plan, job, start)):
        if number:
            later = ray.train.get_dataset_shard(_LATER.format(name))
            assert isinstance(later, _LazySplitter)
            yield from build_shards(later.segment(number))
        else:
            yield from build_shards(ray.train.get_dataset_shard(name))


def build_shards(iterator: "DataIterator") -> Iterator[pa.Buffer]:
    """The packed shares of one worker's Ray Data iterator; two are fetched ahead."""
    for batch in iterator.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
        assert isinstance(batch, pa.Table)
        yield batch.column("share").chunk(0)[0].as_buffer()
