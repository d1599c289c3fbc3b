"""Control channel between driver and workers: metrics and heartbeats one way, requests to stop the other way.

The control actor sits between them. Rank 0 sends it every line of metrics.jsonl, each rank its heartbeat; a thread of
the driver polls it, shows the progress (`progress.py`) and looks for hangs (`watchdog.py`). Runs on the head and, as
`ControlActorClient`, in train workers; what they ask is in `train/preemption.py`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from launcher.driver.progress import TrainingProgress
from launcher.driver.watchdog import Watchdog
from launcher.formatting import print_line
from launcher.rundir.plan import Plan
from launcher.rundir.records import MetricsLine
from launcher.train.worker_heartbeat import Heartbeat

_POLL_S = 0.5
# Longest wait for the actor. It also delays a worker's next heartbeat, so it stays far below the 60 s after which
# `watchdog.py` calls a worker silent.
_TIMEOUT_S = 5.0

OnMetrics = Callable[[MetricsLine], None]


@dataclass(frozen=True)
class _WorkerNews:
    """What the workers have sent."""

    metrics: list[MetricsLine]
    """Lines since the last poll."""
    beats: dict[int, Heartbeat]
    """Last heartbeat of each rank."""
    counts: dict[int, int]
    """Number of heartbeats from each rank."""


@ray.remote(num_cpus=0)
class _ControlActor:
    """Queue of metrics lines and flags of an attempt; answers at once, so neither side waits for the other."""

    def __init__(self) -> None:
        self._metrics: list[MetricsLine] = []
        self._is_training = self._is_stop_requested = self._is_restart_requested = self._is_hung = False
        self._beats: dict[int, Heartbeat] = {}
        self._counts: dict[int, int] = {}

    def set_training(self, training: bool) -> None:
        self._is_training = training

    def request_stop(self) -> bool:
        self._is_stop_requested = True
        return self._is_training

    def request_restart(self) -> None:
        self._is_restart_requested = True

    def begin(self) -> None:
        # Not the stop that the user has requested: the workers of the next attempt must see it too.
        self._is_training = self._is_restart_requested = self._is_hung = False
        self._beats = {}
        self._counts = {}

    def record_heartbeat(self, beat: Heartbeat) -> bool:
        self._beats[beat.rank] = beat
        self._counts[beat.rank] = self._counts.get(beat.rank, 0) + 1
        return self._is_hung

    def end_hung_workers(self) -> None:
        self._is_hung = True

    def is_stop_requested(self) -> bool:
        return self._is_stop_requested or self._is_restart_requested

    def put_metrics(self, line: MetricsLine) -> None:
        self._metrics.append(line)

    def take_news(self) -> _WorkerNews:
        # The actor runs one call at a time, so no line is lost or sent twice.
        metrics, self._metrics = self._metrics, []
        return _WorkerNews(metrics, self._beats, self._counts)


class ControlActorClient:
    """Worker's end of the control channel; pickled to the workers, as `OnMetrics` and as `ControlClient`."""

    def __init__(self, actor: "ActorHandle[_ControlActor]") -> None:
        self._actor = actor
        self._answer: ray.ObjectRef[bool] | None = None

    def __call__(self, line: MetricsLine) -> None:
        # Not waited for: training must never wait for the driver. Ray keeps the order of one caller's calls, so of the
        # lines.
        self._actor.put_metrics.remote(line)

    def set_training(self, training: bool) -> None:
        self._actor.set_training.remote(training)

    def send_heartbeat(self, beat: Heartbeat) -> bool:
        """Send this worker's heartbeat; return True if it must dump its stacks and exit."""
        try:
            return bool(ray.get(self._actor.record_heartbeat.remote(beat), timeout=_TIMEOUT_S))
        except RayError:
            # The actor is busy, or the driver has died.
            return False

    def is_stop_requested(self) -> bool:
        """Return the answer to an earlier question, if it has arrived. Never blocks: it runs between two steps."""
        if self._answer is None:
            self._answer = self._actor.is_stop_requested.remote()
        ready, _ = ray.wait([self._answer], timeout=0)
        if not ready:
            return False
        answer, self._answer = self._answer, None
        try:
            return bool(ray.get(answer))
        except RayError:
            # The driver has died; Ray ends its workers.
            return False


class ControlChannel:
    """Driver's end of the control channel.

    Args:
        actor: Control actor.
        console: Console that says that a stop takes a moment.
    """

    def __init__(self, actor: "ActorHandle[_ControlActor]", console: Console) -> None:
        self.client = ControlActorClient(actor)
        """Worker's end, for `WorkerConfig`."""
        self.is_stop_requested = False
        self.hang: str | None = None
        """Sentence about the hang that ended this attempt's workers; None if there was none."""
        self.actor = actor
        self._console = console

    def begin(self) -> None:
        """Reset the flags before an attempt: the workers of the last one may have died without resetting them."""
        # Waited for: a reset that came late would erase the first heartbeats of the new workers.
        ray.get(self.actor.begin.remote())
        self.hang = None

    def end_hung_workers(self, hang: str) -> None:
        """Make all workers dump their stacks and exit, at their next heartbeat."""
        # Once per attempt: the same hang is found at every poll until the workers have exited.
        if self.hang is None:
            self.hang = hang
            self.actor.end_hung_workers.remote()

    def request_restart(self) -> None:
        """Ask the workers to save a checkpoint and exit, to restart with another number of workers."""
        self.actor.request_restart.remote()

    def request_stop(self) -> bool:
        """Ask the workers to save a checkpoint and stop; return False if they do not train, so nothing is to save."""
        # Before the call, which may fail: `controller.py` asks for it when the workers have exited.
        self.is_stop_requested = True
        try:
            is_training = bool(ray.get(self.actor.request_stop.remote(), timeout=_TIMEOUT_S))
        except RayError:
            # The cluster shuts down.
            return False
        if is_training:
            hint = "; Ctrl-C again stops at once" if self._console.is_terminal else ""
            print_line(self._console, f"stopping: saving a checkpoint first{hint}")
        return is_training


ControlActor = ActorHandle[_ControlActor]


def start_control_actor() -> ControlActor:
    """Start the control actor; return before it is ready."""
    # On the driver's node: the loss of any other node must not end the channel.
    on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _ControlActor.options(scheduling_strategy=on_this_node).remote()  # type: ignore[attr-defined,no-any-return]


@contextmanager
def open_control_channel(
    plan: Plan,
    console: Console,
    on_metrics: OnMetrics | None = None,
    hang_s: float | None = None,
    actor: ControlActor | None = None,
) -> Iterator[ControlChannel]:
    """Poll the control actor and show progress until the block ends.

    Args:
        plan: Plan of the run, for the number of steps.
        console: Console for the progress.
        on_metrics: Callback for each metrics line too; None for no callback.
        hang_s: Seconds without movement after which the workers are ended; None for never.
        actor: Control actor that is running; None starts one.
    """
    actor = start_control_actor() if actor is None else actor
    stop = threading.Event()
    progress = TrainingProgress(plan, console)
    listeners = (progress.show,) if on_metrics is None else (progress.show, on_metrics)
    control = ControlChannel(actor, console)
    thread = threading.Thread(target=_poll, args=(control, listeners, Watchdog(hang_s), stop), daemon=True)
    thread.start()
    try:
        yield control
    finally:
        # The thread stops first: lines must not be shown by two threads, and the last ones come after it.
        stop.set()
        thread.join()
        _take_news(control, listeners)
        progress.close()
        ray.kill(actor)


def _poll(control: ControlChannel, listeners: Sequence[OnMetrics], watchdog: Watchdog, stop: threading.Event) -> None:
    while not stop.wait(_POLL_S):
        news = _take_news(control, listeners)
        hang = None if news is None else watchdog.find_hang(news.beats, news.counts)
        if hang is not None:
            control.end_hung_workers(hang)


def _take_news(control: ControlChannel, listeners: Sequence[OnMetrics]) -> _WorkerNews | None:
    try:
        answer: ray.ObjectRef[_WorkerNews] = control.actor.take_news.remote()
        news = ray.get(answer)
    except RayError:
        # The cluster shuts down; `run_worker_group` raises the cause.
        return None
    for line in news.metrics:
        for listener in listeners:
            listener(line)
    return news
