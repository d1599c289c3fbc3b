"""What a person sees while a run goes on: a progress bar on a terminal, plain lines in a log. Runs on the head.

Rank 0 tells an actor of every line of metrics.jsonl; a thread beside the waiting driver shows them. The other way, the
actor tells rank 0 that the person wants the run to stop.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from launcher.driver.watchdog import Watchdog
from launcher.rundir.plan import Plan
from launcher.rundir.records import EvaluationRecord, MetricsLine, StepRecord
from launcher.train.worker_heartbeat import Beat

_POLL_S = 0.5
_EVERY_S = 5.0
_ANSWER_S = 5.0
_Shows = tuple[Callable[[MetricsLine], None], ...]
_News = tuple[list[MetricsLine], dict[int, Beat], dict[int, int]]
"""Lines since the last time, the last beat of each rank, and how many came from each."""


@ray.remote(num_cpus=0)
class _Mailbox:
    """Lines on their way from rank 0 to the driver, and its wish to stop on the way back."""

    def __init__(self) -> None:
        self._lines: list[MetricsLine] = []
        self._training = self._stop = self._leave = self._hangs = False
        self._beats: dict[int, Beat] = {}
        self._counts: dict[int, int] = {}

    def at_work(self, training: bool) -> None:
        self._training = training

    def ask_stop(self) -> bool:
        self._stop = True
        return self._training

    def ask_leave(self) -> None:
        self._leave = True

    def begin(self) -> None:
        self._training = self._leave = self._hangs = False
        self._beats, self._counts = {}, {}

    def beat(self, beat: Beat) -> bool:
        self._beats[beat.rank] = beat
        self._counts[beat.rank] = self._counts.get(beat.rank, 0) + 1
        return self._hangs

    def end_hang(self) -> None:
        self._hangs = True

    def stop_asked(self) -> bool:
        return self._stop or self._leave

    def put(self, line: MetricsLine) -> None:
        self._lines.append(line)

    def take(self) -> _News:
        lines, self._lines = self._lines, []
        return lines, self._beats, self._counts


class Post:
    """Puts lines into the mailbox and asks it without waiting; travels to the workers, as listener and as caller."""

    def __init__(self, mailbox: "ActorHandle[_Mailbox]") -> None:
        self._mailbox = mailbox
        self._answer: ray.ObjectRef[bool] | None = None

    def __call__(self, line: MetricsLine) -> None:
        self._mailbox.put.remote(line)

    def at_work(self, training: bool) -> None:
        self._mailbox.at_work.remote(training)

    def beat(self, beat: Beat) -> bool:
        """Tell what this worker is doing; whether it should dump its stacks and end."""
        try:
            return bool(ray.get(self._mailbox.beat.remote(beat), timeout=_ANSWER_S))
        except RayError:
            return False  # busy, or gone with its driver

    def stop_asked(self) -> bool:
        if self._answer is None:
            self._answer = self._mailbox.stop_asked.remote()
        ready, _ = ray.wait([self._answer], timeout=0)
        if not ready:
            return False
        answer, self._answer = self._answer, None
        try:
            return bool(ray.get(answer))
        except RayError:
            return False  # the driver is gone; Ray ends its workers


class Watch:
    """What goes between the driver and its workers while they work.

    Args:
        mailbox: between them.
        console: tells the person that a stop takes a moment.
    """

    def __init__(self, mailbox: "ActorHandle[_Mailbox]", console: Console) -> None:
        self.post = Post(mailbox)
        """For the workers."""
        self.stop_asked = False
        self.hang: str | None = None
        """What was said of the workers that stand still, since they were started."""
        self.mailbox, self._console = mailbox, console

    def begin(self) -> None:
        """Workers are about to start; those before them may have ended without a word."""
        ray.get(self.mailbox.begin.remote())
        self.hang = None

    def end_hang(self, said: str) -> None:
        """End the workers, which stand still."""
        if self.hang is None:
            self.hang = said
            self.mailbox.end_hang.remote()

    def ask_leave(self) -> None:
        """Ask the workers to save and leave, to start again in another number."""
        self.mailbox.ask_leave.remote()

    def ask_stop(self) -> bool:
        """Ask the workers to save and stop; False when they do not train, so that there is nothing to wait for."""
        self.stop_asked = True
        try:
            training = bool(ray.get(self.mailbox.ask_stop.remote(), timeout=_ANSWER_S))
        except RayError:
            return False  # the cluster goes down
        if training:
            again = "; Ctrl-C again stops at once" if self._console.is_terminal else ""
            self._console.print(f"stopping: saving a checkpoint first{again}", highlight=False, soft_wrap=True)
        return training


Mailbox = ActorHandle[_Mailbox]


def start_mailbox() -> Mailbox:
    """Start the actor between driver and workers; returns at once."""
    # With the driver, as a node that goes away must not take it along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined,no-any-return]


@contextmanager
def watch(
    plan: Plan,
    console: Console,
    hear: Callable[[MetricsLine], None] | None = None,
    hang_s: float | None = None,
    mailbox: Mailbox | None = None,
) -> Iterator[Watch]:
    """Show lines until the block ends.

    Args:
        plan: of the run.
        console: where they are shown.
        hear: is told of each, too.
        hang_s: seconds of standing still after which the workers are ended.
        mailbox: Actor that was started before; None starts one.
    """
    mailbox = start_mailbox() if mailbox is None else mailbox
    stop = threading.Event()
    view = _Bar(plan, console) if console.is_terminal else _Lines(plan, console)
    shows = (view.show,) if hear is None else (view.show, hear)
    watched = Watch(mailbox, console)
    thread = threading.Thread(target=_pump, args=(watched, shows, hang_s, stop), daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        stop.set()
        thread.join()
        _show(mailbox, shows)
        view.close()
        ray.kill(mailbox)


def _pump(watched: Watch, shows: _Shows, hang_s: float | None, stop: threading.Event) -> None:
    dog = Watchdog(hang_s)
    while not stop.wait(_POLL_S):
        news = _show(watched.mailbox, shows)
        if news is not None and (said := dog.hang(*news[1:])) is not None:
            watched.end_hang(said)


def _show(mailbox: "ActorHandle[_Mailbox]", shows: _Shows) -> _News | None:
    try:
        answer: ray.ObjectRef[_News] = mailbox.take.remote()
        news = ray.get(answer)
    except RayError:
        return None  # the cluster goes down; what ended the run is told by whoever waits for it
    for line in news[0]:
        for show in shows:
            show(line)
    return news


def evaluation_text(line: EvaluationRecord) -> str:
    """One evaluation on one line."""
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in line.metrics.items())
    best = "  (best so far)" if line.best else ""
    skipped = f", {line.skipped_rows} skipped" if line.skipped_rows else ""
    return f"{line.split} at step {line.step}: {metrics}  loss {line.loss:.4f}  ({line.rows} rows{skipped}){best}"


@contextmanager
def reading_files(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Shows how many footers are read, from the fifth second on: on a terminal in place, in a log line by line."""
    began = shown = time.monotonic()
    status = console.status("") if console.is_terminal else None

    def tell(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < (_POLL_S if status is not None else _EVERY_S) or now - began < _EVERY_S:
            return
        shown = now
        text = f"reading footers: {done:,} of {total:,} files"
        if status is None:
            console.print(text, highlight=False, soft_wrap=True)
        else:
            status.update(text)
            status.start()

    try:
        yield tell
    finally:
        if status is not None:
            status.stop()


class _Bar:
    """A rich progress bar; evaluations are printed above it."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            TextColumn("ETA"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._task: TaskID = self._progress.add_task("starting workers", total=plan.total_steps)
        self._progress.start()

    def show(self, line: MetricsLine) -> None:
        if isinstance(line, StepRecord):
            text = f"loss {line.loss:.4f}  {line.samples_per_s:.1f} samples/s"
            self._progress.update(self._task, completed=line.step, description=text)
        elif isinstance(line, EvaluationRecord):  # what a model writes is looked at in the report
            self._progress.console.print(evaluation_text(line), highlight=False)

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """Plain lines, at most one every few seconds between evaluations."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan, self._console = plan, console
        self._shown = 0.0
        self._first: tuple[float, int] | None = None

    def show(self, line: MetricsLine) -> None:
        if isinstance(line, EvaluationRecord):
            self._console.print(evaluation_text(line), highlight=False, soft_wrap=True)
        if not isinstance(line, StepRecord):
            return
        now = time.monotonic()
        self._first = self._first or (now, line.step)
        if now - self._shown < _EVERY_S and line.step != self._plan.total_steps:
            return
        self._shown = now
        self._console.print(
            f"step {line.step}/{self._plan.total_steps}  epoch {line.epoch}  loss {line.loss:.4f}  "
            f"lr {line.learning_rate:.2e}  {line.samples_per_s:.1f} samples/s  {self._eta(now, line.step)}",
            highlight=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Nothing to take down."""

    def _eta(self, now: float, step: int) -> str:
        assert self._first is not None
        started, first = self._first
        if step == first:
            return "ETA ?"
        left = (now - started) / (step - first) * (self._plan.total_steps - step)
        return f"ETA {int(left // 60)}:{int(left % 60):02d}"
