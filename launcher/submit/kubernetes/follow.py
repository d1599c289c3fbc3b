"""Wait for a RayJob and read its log while it runs. Runs on the client.

A dropped connection or an API server that is unavailable for a while does no harm: the job continues by itself, and its
own status says how it ended. Start reading at `wait`; `Log` reads the log between two looks at the status.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import urllib3

from launcher.errors import ClusterError, TrainingError
from launcher.submit.kubernetes.api import Api, AwayError
from launcher.submit.kubernetes.manifest import Manifest, name_of
from launcher.submit.kubernetes.state import JobState

_POLL_S = 2.0
_PATIENCE_S = 900.0
# After a break the log is read again from this long before it; old lines are recognised by their times.
_OVERLAP_S = 30

Say = Callable[[str], None]


def wait(api: Api, name: str, timeout_s: float | None, say: Say, log: "Log | None" = None) -> JobState:
    """Wait until a RayJob has ended, and return its last state.

    Args:
        api: Cluster of the RayJob.
        name: Name of the RayJob.
        timeout_s: Time limit in seconds; None waits for ever.
        say: Function that shows each change of the state.
        log: Reader that prints the job's log meanwhile; None prints none.

    Raises:
        TrainingError: The time is over, the RayJob was deleted, or the API server was unavailable for 15 minutes.
    """
    # Outside of the loop's patience: a wrong name or a missing permission fails at once.
    state = JobState.of(api.get("RayJob", name))
    shown = ""
    start = answered = time.monotonic()
    while True:
        if state.line != shown:
            shown = state.line
            say(f"RayJob {name}: {shown}")
        # Before the return below, so that the log is read once more after the final state.
        if log is not None:
            log.catch_up(state)
        if state.is_final:
            return state
        now = time.monotonic()
        if timeout_s is not None and now - start >= timeout_s:
            raise TrainingError(
                f"RayJob {name} has not ended after {timeout_s:g} s ({state.line}); it continues by itself"
            )
        time.sleep(_POLL_S if timeout_s is None else min(_POLL_S, max(0.0, timeout_s - (now - start))))
        try:
            rayjob = api.find("RayJob", name)
        # Nothing but AwayError: time does not change a refusal.
        except AwayError as error:
            if time.monotonic() - answered > _PATIENCE_S:
                raise TrainingError(f"{error.message}; RayJob {name} continues by itself") from error
            if shown != "away":
                say(f"{error.message.split(';')[0]}; waiting")
                shown = "away"
            continue
        answered = time.monotonic()
        if rayjob is None:
            raise TrainingError(f"RayJob {name} was deleted; apply it again to resume the run")
        state = JobState.of(rayjob)


@dataclass
class Log:
    """A reader of a RayJob's log that remembers what it has printed.

    Args:
        api: Cluster of the RayJob.
        say: Function that shows the source of the log.
        write: Function that prints a line of the log.
        follow: True to wait for more of a pod's log while it grows.
    """

    api: Api
    say: Say
    write: Callable[[str], None]
    follow: bool
    _source: str = field(default="", init=False)
    # Time of the last line, by the node's clock. It is compared only with other lines, never with this machine's clock,
    # which `_received` is read from.
    _last_time: str = field(default="", init=False)
    _lines_at_last_time: int = field(default=0, init=False)
    _received: float = field(default=0.0, init=False)  # time.monotonic() of the last line
    _length: int = field(default=0, init=False)  # characters of the dashboard's log that were printed

    def catch_up(self, state: JobState) -> None:
        """Print new lines. With `follow`, return when the connection to the pod ends."""
        try:
            pod = _submitter_pod(self.api, state)
            if pod is not None:
                self._from_pod(pod, state)
            elif state.job_id and (state.mode != "K8sJobMode" or (state.status and not self.follow)):
                # While following, a submitting pod that does not exist yet will be created.
                self._from_dashboard(state)
        except (AwayError, urllib3.exceptions.HTTPError):
            return  # retried at the next poll
        except ClusterError as error:
            # A pod that disappears while its log is read must not end the wait.
            if self._source != error.message:
                self._source = error.message
                self.say(error.message)

    @property
    def has_source(self) -> bool:
        """Return whether there was a log to read."""
        return bool(self._source)

    def _from_pod(self, pod: Manifest, state: JobState) -> None:
        phase = pod.get("status", {}).get("phase", "Pending")
        if phase == "Pending":
            return
        name = name_of(pod)
        # The pod of the head has several containers.
        container = "ray-job-submitter" if state.mode == "SidecarMode" else None
        self._announce(f"log of the submitting pod {name}")
        # While a growing log is read, nobody polls the state. A minute without a line ends that (`Api.log`).
        is_growing = self.follow and phase == "Running" and not state.is_final
        since_s = int(time.monotonic() - self._received) + _OVERLAP_S if self._last_time else None
        # Several lines may have the same time: those printed before are skipped by their number.
        number = 0
        for line_time, line in _lines(self.api.log(name, container, is_growing, since_s)):
            if line_time < self._last_time:
                continue
            number = number + 1 if line_time == self._last_time else 1
            if line_time == self._last_time and number <= self._lines_at_last_time:
                continue
            self._last_time = line_time
            self._lines_at_last_time = number
            self._received = time.monotonic()
            self.write(line)

    def _from_dashboard(self, state: JobState) -> None:
        self._announce(f"log of the driver, from the Ray dashboard of {state.cluster} (no submitting pod)")
        # Ray's Jobs API has no way to ask for a part of a log (2.60): each poll transfers all of it.
        text = str(self.api.dashboard(state.cluster, f"api/jobs/{state.job_id}/logs").get("logs") or "")
        # The driver may be in the middle of a line, whose rest comes with the next poll.
        end = text.rfind("\n") + 1 if self.follow and not state.is_final else len(text)
        for line in text[self._length : end].splitlines():
            self.write(line)
        self._length = end

    def _announce(self, source: str) -> None:
        if source != self._source:
            self._source = source
            self._last_time = ""
            self._lines_at_last_time = self._length = 0
            self.say(source)


def _submitter_pod(api: Api, state: JobState) -> Manifest | None:
    """Return the pod whose log is the run's; None where the job is submitted without one, or it no longer exists."""
    pods: list[Manifest] = []
    if state.mode == "K8sJobMode":
        # KubeRay names the submitting Job like the RayJob.
        pods = api.pods(f"job-name={state.name}")
    elif state.mode == "SidecarMode" and state.cluster:
        pods = api.pods(f"ray.io/cluster={state.cluster},ray.io/node-type=head")
    return pods[-1] if pods else None  # the newest is the current one


def _lines(chunks: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    """Yield lines with their times. A line cut by a dropped connection is read again next time."""
    rest = b""
    for chunk in chunks:
        # Split as bytes and decoded by the line: a chunk may end in the middle of a character.
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield _split_time(line)
    if rest:
        yield _split_time(rest)


def _split_time(line: bytes) -> tuple[str, str]:
    line_time, _, text = line.decode(errors="replace").partition(" ")
    # Without the Z, times with fewer digits sort correctly as text.
    return line_time.rstrip("Z"), text
