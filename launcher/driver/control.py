"""Control channel between the driver and its workers: metrics and heartbeats one way, requests to stop the other.

Rank 0 sends every line of metrics.jsonl to an actor; a thread beside the waiting driver polls it and shows them
(`progress.py`). Runs on the head and in train workers.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from launcher.driver.progress import ProgressBar, ProgressLines
from launcher.driver.watchdog import Watchdog
from launcher.rundir.plan import Plan
from launcher.rundir.records import MetricsLine
from launcher.train.worker_heartbeat import Heartbeat

_POLL_S = 0.5
_ANSWER_S = 5.0
_Shows = tuple[Callable[[MetricsLine], None], ...]
_News = tuple[list[MetricsLine], dict[int, Heartbeat], dict[int, int]]
"""Lines since the last time, the last beat of each rank, and how many came from each."""


@ray.remote(num_cpus=0)
class _ControlActor:
    """Lines on their way from rank 0 to the driver, and its wish to stop on the way back."""

    def __init__(self) -> None:
        self._lines: list[MetricsLine] = []
        self._training = self._stop = self._leave = self._hangs = False
        self._beats: dict[int, Heartbeat] = {}
        self._counts: dict[int, int] = {}

    def set_training(self, training: bool) -> None:
        self._training = training

    def request_stop(self) -> bool:
        self._stop = True
        return self._training

    def request_restart(self) -> None:
        self._leave = True

    def begin(self) -> None:
        self._training = self._leave = self._hangs = False
        self._beats, self._counts = {}, {}

    def record_heartbeat(self, beat: Heartbeat) -> bool:
        self._beats[beat.rank] = beat
        self._counts[beat.rank] = self._counts.get(beat.rank, 0) + 1
        return self._hangs

    def end_hung_workers(self) -> None:
        self._hangs = True

    def is_stop_requested(self) -> bool:
        return self._stop or self._leave

    def put_metrics(self, line: MetricsLine) -> None:
        self._lines.append(line)

    def take_metrics(self) -> _News:
        lines, self._lines = self._lines, []
        return lines, self._beats, self._counts


class ControlActorClient:
    """Puts lines into the actor and asks it without waiting; travels to the workers, as listener and as caller."""

    def __init__(self, actor: "ActorHandle[_ControlActor]") -> None:
        self._actor = actor
        self._answer: ray.ObjectRef[bool] | None = None

    def __call__(self, line: MetricsLine) -> None:
        self._actor.put_metrics.remote(line)

    def set_training(self, training: bool) -> None:
        self._actor.set_training.remote(training)

    def send_heartbeat(self, beat: Heartbeat) -> bool:
        """Tell what this worker is doing; whether it should dump its stacks and end."""
        try:
            return bool(ray.get(self._actor.record_heartbeat.remote(beat), timeout=_ANSWER_S))
        except RayError:
            return False  # busy, or gone with its driver

    def is_stop_requested(self) -> bool:
        if self._answer is None:
            self._answer = self._actor.is_stop_requested.remote()
        ready, _ = ray.wait([self._answer], timeout=0)
        if not ready:
            return False
        answer, self._answer = self._answer, None
        try:
            return bool(ray.get(answer))
        except RayError:
            return False  # the driver is gone; Ray ends its workers


class ControlChannel:
    """What goes between the driver and its workers while they work.

    Args:
        actor: between them.
        console: tells the person that a stop takes a moment.
    """

    def __init__(self, actor: "ActorHandle[_ControlActor]", console: Console) -> None:
        self.client = ControlActorClient(actor)
        """For the workers."""
        self.is_stop_requested = False
        self.hang: str | None = None
        """What was said of the workers that stand still, since they were started."""
        self.actor, self._console = actor, console

    def begin(self) -> None:
        """Workers are about to start; those before them may have ended without a word."""
        ray.get(self.actor.begin.remote())
        self.hang = None

    def end_hung_workers(self, said: str) -> None:
        """End the workers, which stand still."""
        if self.hang is None:
            self.hang = said
            self.actor.end_hung_workers.remote()

    def request_restart(self) -> None:
        """Ask the workers to save and leave, to start again in another number."""
        self.actor.request_restart.remote()

    def request_stop(self) -> bool:
        """Ask the workers to save and stop; False when they do not train, so that there is nothing to wait for."""
        self.is_stop_requested = True
        try:
            training = bool(ray.get(self.actor.request_stop.remote(), timeout=_ANSWER_S))
        except RayError:
            return False  # the cluster goes down
        if training:
            again = "; Ctrl-C again stops at once" if self._console.is_terminal else ""
            self._console.print(f"stopping: saving a checkpoint first{again}", highlight=False, soft_wrap=True)
        return training


ControlActor = ActorHandle[_ControlActor]


def start_control_actor() -> ControlActor:
    """Start the actor between driver and workers; returns at once."""
    # With the driver, as a node that goes away must not take it along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _ControlActor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined,no-any-return]


@contextmanager
def open_control_channel(
    plan: Plan,
    console: Console,
    on_metrics: Callable[[MetricsLine], None] | None = None,
    hang_s: float | None = None,
    actor: ControlActor | None = None,
) -> Iterator[ControlChannel]:
    """Show lines until the block ends.

    Args:
        plan: of the run.
        console: where they are shown.
        on_metrics: Called with each line too.
        hang_s: seconds of standing still after which the workers are ended.
        actor: Actor that was started before; None starts one.
    """
    actor = start_control_actor() if actor is None else actor
    stop = threading.Event()
    view = ProgressBar(plan, console) if console.is_terminal else ProgressLines(plan, console)
    shows = (view.show,) if on_metrics is None else (view.show, on_metrics)
    channel = ControlChannel(actor, console)
    thread = threading.Thread(target=_pump, args=(channel, shows, hang_s, stop), daemon=True)
    thread.start()
    try:
        yield channel
    finally:
        stop.set()
        thread.join()
        _show(actor, shows)
        view.close()
        ray.kill(actor)


def _pump(channel: ControlChannel, shows: _Shows, hang_s: float | None, stop: threading.Event) -> None:
    dog = Watchdog(hang_s)
    while not stop.wait(_POLL_S):
        news = _show(channel.actor, shows)
        if news is not None and (said := dog.hang(*news[1:])) is not None:
            channel.end_hung_workers(said)


def _show(actor: "ActorHandle[_ControlActor]", shows: _Shows) -> _News | None:
    try:
        answer: ray.ObjectRef[_News] = actor.take_metrics.remote()
        news = ray.get(answer)
    except RayError:
        return None  # the cluster goes down; what ended the run is told by whoever waits for it
    for line in news[0]:
        for show in shows:
            show(line)
    return news
