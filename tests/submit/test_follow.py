"""The log follower: every character once, whatever the connection does; the job's own state at the end."""

import itertools
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.job_submission import JobStatus

from launcher.errors import ClusterError, RunError
from launcher.submit import follow
from launcher.submit.follow import Follower, wait
from launcher.submit.ray_jobs import Job


def _state(status: JobStatus) -> Job:
    return Job("id", status, "run", "/mnt", "train", "", "", None, None, None)


class Scripted:
    """A cluster whose connections end after so many characters, and whose answers may fail.

    Args:
        text: Whole log.
        drops: Number of characters before each connection breaks; the last one does not break.
        chunk: Number of characters per message.
    """

    def __init__(self, text: str, drops: list[int], chunk: int = 3, end: JobStatus = JobStatus.SUCCEEDED) -> None:
        self.text, self.drops, self.chunk, self.end = text, list(drops), chunk, end
        self.failures = 0
        self.done = not drops

    def get(self, job_id: str) -> Job:
        if self.failures:
            self.failures -= 1
            raise ClusterError("no answer")
        return _state(self.end if self.done else JobStatus.RUNNING)

    def logs(self, job_id: str) -> str:
        return self.text

    async def tail(self, job_id: str) -> AsyncIterator[str]:
        limit = self.drops.pop(0) if self.drops else len(self.text)
        text = self.text[:limit]
        for begin in range(0, len(text), self.chunk):
            yield text[begin : begin + self.chunk]
        self.done = self.done or not self.drops
        if limit < len(self.text):
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_RETRY_S", 0.0)


def _follow(source: Scripted) -> tuple[str, Job, list[str]]:
    shown: list[str] = []
    notices: list[str] = []
    job = Follower(source, "id", shown.append, notices.append).follow()
    return "".join(shown), job, notices


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.integers(0, 40), max_size=5),
    st.integers(1, 7),
)
def test_each_character_is_shown_once(text: str, drops: list[int], chunk: int) -> None:
    follow_retry, follow._RETRY_S = follow._RETRY_S, 0.0
    try:
        shown, job, _ = _follow(Scripted(text, drops, chunk))
    finally:
        follow._RETRY_S = follow_retry
    assert shown == text
    assert job.status == JobStatus.SUCCEEDED


def test_a_lost_connection_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Scripted("0123456789", [2, 4, 6])
    source.failures = 2
    shown, _, notices = _follow(source)
    assert shown == "0123456789"
    assert notices == ["the connection was lost; the job continues, reconnecting"]


@pytest.mark.parametrize("end", [JobStatus.FAILED, JobStatus.STOPPED])
def test_the_state_is_the_jobs_own_and_not_the_streams(end: JobStatus) -> None:
    _, job, _ = _follow(Scripted("x", [], end=end))
    assert job.status == end


def test_a_stream_that_ends_early_is_taken_up_again() -> None:
    """Ray closes the stream in order when an agent restarts; only the job's state ends the following."""
    source = Scripted("0123456789", [10, 10])
    connections = itertools.count()
    tail = source.tail
    source.tail = lambda job_id: (next(connections), tail(job_id))[1]  # type: ignore[method-assign]
    assert _follow(source)[0] == "0123456789"
    assert next(connections) == 2


def test_a_silent_connection_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_QUIET_S", 0.01)
    monkeypatch.setattr(follow, "_SILENT_S", 0.03)
    source = Scripted("0123456789", [])
    source.done = False
    calls = itertools.count()

    async def tail(job_id: str) -> AsyncIterator[str]:
        import asyncio

        yield source.text[:4]
        if next(calls) == 0:
            await asyncio.sleep(3600)
        source.done = True
        yield source.text[4:]

    source.tail = tail  # type: ignore[method-assign]
    assert _follow(source)[0] == "0123456789"


def test_silence_for_minutes_gives_up_and_says_how_to_look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_GIVE_UP_S", -1.0)
    with pytest.raises(ClusterError, match="the job may still run: `launcher jobs logs id --follow` resumes the log"):
        _follow(Scripted("0123", [2, 2]))


def test_a_job_that_is_forgotten_ends_the_following() -> None:
    source = Scripted("0123", [2, 4])

    def get(job_id: str) -> Job:
        raise RunError("no job id there (any more)")

    source.get = get  # type: ignore[method-assign]
    with pytest.raises(RunError, match="no job id"):
        _follow(source)


def test_waiting_outlives_failed_answers() -> None:
    source = Scripted("", [], end=JobStatus.STOPPED)
    source.failures = 3
    assert wait(source, "id").status == JobStatus.STOPPED
