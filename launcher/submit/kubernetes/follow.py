"""Waiting for a RayJob, and its log while it runs. Runs on the client.

A connection that drops, and a server that is away for a while, cost nothing: the job runs on without us, and its own
status says how it ended. The thread of the story is `wait`; `Log` reads beside it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import urllib3

from launcher.errors import ClusterError, TrainingError
from launcher.submit.kubernetes.api import Api
from launcher.submit.kubernetes.manifest import Manifest
from launcher.submit.kubernetes.refusals import AwayError
from launcher.submit.kubernetes.state import JobState

_POLL_S = 2.0
_PATIENCE_S = 900.0
# Lines are read again for so long before a break, and told from new ones by their times.
_OVERLAP_S = 30

Say = Callable[[str], None]


def wait(api: Api, name: str, timeout_s: float | None, say: Say) -> JobState:
    """Wait until a RayJob is over.

    Args:
        api: where it is.
        name: of the RayJob.
        timeout_s: give up after so long; None never does.
        say: told every change of its state.

    Raises:
        TrainingError: the time is over, somebody deleted it, or the API server was away for a quarter of an hour.
    """
    return _until_final(api, name, timeout_s, say, lambda state: None)


def follow(api: Api, name: str, say: Say, write: Callable[[str], None]) -> JobState:
    """Hand on a RayJob's log until it is over.

    Args:
        api: where it is.
        name: of the RayJob.
        say: told where the log comes from, and every change of the job's state.
        write: gets the lines.

    Raises:
        TrainingError: as `wait` does.
    """
    log = Log(api, say, write, follow=True)
    return _until_final(api, name, None, say, log.catch_up)


def _until_final(
    api: Api, name: str, timeout_s: float | None, say: Say, meanwhile: Callable[[JobState], None]
) -> JobState:
    state = JobState.of(api.get("RayJob", name))  # a name that is wrong is told at once
    shown, heard, start = "", time.monotonic(), time.monotonic()
    while True:
        if state.line != shown:
            shown = state.line
            say(f"RayJob {name}: {shown}")
        meanwhile(state)
        if state.is_final:
            return state
        now = time.monotonic()
        if timeout_s is not None and now - start >= timeout_s:
            raise TrainingError(f"RayJob {name} is not over after {timeout_s:g} s ({state.line}); it runs on by itself")
        time.sleep(_POLL_S if timeout_s is None else min(_POLL_S, max(0.0, timeout_s - (now - start))))
        try:
            found = api.find("RayJob", name)
        except AwayError as error:
            if time.monotonic() - heard > _PATIENCE_S:
                raise TrainingError(f"{error.message}; RayJob {name} runs on by itself") from error
            if shown != "away":
                say(f"{error.message.split(';')[0]}; waiting")
                shown = "away"
            continue
        heard = time.monotonic()
        if found is None:
            raise TrainingError(f"RayJob {name} is gone: somebody deleted it; the run goes on when it is applied again")
        state = JobState.of(found)


@dataclass
class Log:
    """A RayJob's log, read as far as it goes; remembers what was read.

    Args:
        api: where the job is.
        say: told where the log comes from.
        write: gets the lines.
        follow: stay with a pod's log while it grows.
    """

    api: Api
    say: Say
    write: Callable[[str], None]
    follow: bool
    _source: str = field(default="", init=False)
    _last: str = field(default="", init=False)  # time of the last line, by the node's clock
    _at_last: int = field(default=0, init=False)  # lines that had this time
    _heard: float = field(default=0.0, init=False)  # when it came, by our clock
    _length: int = field(default=0, init=False)  # of what the dashboard sent

    def catch_up(self, state: JobState) -> None:
        """Hand on what is new. Follows a pod's log while the job runs, and returns when the connection ends."""
        try:
            pod = submitter_pod(self.api, state)
            if pod is not None:
                self._from_pod(pod, state)
            elif state.job_id and (state.mode != "K8sJobMode" or (state.status and not self.follow)):
                # While following, a submitting pod that is not there yet will come.
                self._from_dashboard(state)
        except (AwayError, urllib3.exceptions.HTTPError):
            return  # asked again with the next look at the job
        except ClusterError as error:
            # The log is a courtesy; a pod that goes away while it is read must not end the wait.
            if self._source != error.message:
                self._source = error.message
                self.say(error.message)

    @property
    def found(self) -> bool:
        """Whether there was anything to read from."""
        return bool(self._source)

    def _from_pod(self, pod: "SubmitterPod", state: JobState) -> None:
        if pod.phase == "Pending":
            return
        self._announce(f"log of the submitting pod {pod.name}")
        growing = self.follow and pod.phase == "Running" and not state.is_final
        since_s = int(time.monotonic() - self._heard) + _OVERLAP_S if self._last else None
        seen = 0
        for time_of, line in _lines(self.api.log(pod.name, pod.container, growing, since_s)):
            if time_of < self._last:
                continue
            seen = seen + 1 if time_of == self._last else 1
            if time_of == self._last and seen <= self._at_last:
                continue
            self._last, self._at_last, self._heard = time_of, seen, time.monotonic()
            self.write(line)

    def _from_dashboard(self, state: JobState) -> None:
        self._announce(f"log of the driver, from the Ray dashboard of {state.cluster} (there is no submitting pod)")
        text = str(self.api.dashboard(state.cluster, f"api/jobs/{state.job_id}/logs").get("logs") or "")
        for line in text[self._length :].splitlines():
            self.write(line)
        self._length = len(text)

    def _announce(self, source: str) -> None:
        if source != self._source:
            self._source, self._last, self._at_last, self._length = source, "", 0, 0
            self.say(source)


@dataclass(frozen=True)
class SubmitterPod:
    """The pod that submitted a job and follows its log."""

    name: str
    container: str | None
    phase: str


def submitter_pod(api: Api, state: JobState) -> SubmitterPod | None:
    """The pod whose log is the run's; None where the job is submitted without one, or it is gone."""
    if state.mode == "K8sJobMode":
        # KubeRay names the submitting Job like the RayJob; the last pod is the one that goes on.
        pods = api.pods(f"job-name={state.name}")
        return _submitter(pods[-1], None) if pods else None
    if state.mode == "SidecarMode" and state.cluster:
        pods = api.pods(f"ray.io/cluster={state.cluster},ray.io/node-type=head")
        return _submitter(pods[-1], "ray-job-submitter") if pods else None
    return None


def _submitter(pod: Manifest, container: str | None) -> SubmitterPod:
    return SubmitterPod(pod["metadata"]["name"], container, str(pod.get("status", {}).get("phase", "Pending")))


def _lines(chunks: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    """Whole lines with their times; a line that a dropped connection cut is read again next time."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield _timed(line)
    if rest:
        yield _timed(rest)


def _timed(line: bytes) -> tuple[str, str]:
    time_of, _, text = line.decode(errors="replace").partition(" ")
    return time_of.rstrip("Z"), text  # without it, times with fewer digits sort as they should
