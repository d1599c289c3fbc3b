"""Follows a job's log to the job's true end, through dropped connections. Runs on the client.

The log comes over a WebSocket that begins at the first line each time, may die without a word, and says nothing about
how the job ended: what was shown is counted, and the job's own state decides.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from launcher.errors import ClusterError
from launcher.submit.ray_jobs import Job

_QUIET_S = 10.0
"""After so long without a line the job is asked for its state."""
_SILENT_S = 120.0
"""After so long the connection is taken for dead; making a new one loses nothing."""
_RETRY_S = 2.0
_GIVE_UP_S = 300.0


class Source(Protocol):
    """Where a job's log and state come from."""

    def get(self, job_id: str, /) -> Job:
        """The job as it is now."""

    def logs(self, job_id: str, /) -> str:
        """All that was printed."""

    def tail(self, job_id: str, /) -> AsyncIterator[str]:
        """What is printed, from the beginning."""


class Follower:
    """Shows each character of a log once.

    Args:
        source: the cluster.
        job_id: the submission.
        show: prints a piece of text.
        notice: tells that the connection was lost, or is back.
    """

    def __init__(self, source: Source, job_id: str, show: Callable[[str], None], notice: Callable[[str], None]) -> None:
        self._source, self._id, self._show, self._notice = source, job_id, show, notice
        self._shown = 0
        self._heard = time.monotonic()

    def follow(self) -> Job:
        """Follow until the job is over; returns its last state.

        Raises:
            ClusterError: the cluster has not answered for minutes; the job may go on.
            RunError: the cluster has forgotten the job.
        """
        lost = False
        while True:
            try:
                asyncio.run(self._stream())
                job = self._source.get(self._id)
                if job.over:
                    self._rest()
                    return job
            except (OSError, RuntimeError, ClusterError, asyncio.TimeoutError) as error:
                if time.monotonic() - self._heard > _GIVE_UP_S:
                    raise ClusterError(
                        f"no answer for {int(_GIVE_UP_S)} s ({error}); the job may go on: "
                        f"`launcher jobs logs {self._id} --follow` looks again"
                    ) from error
                if not lost:
                    self._notice("the connection was lost; the job goes on, trying again")
                lost = True
            else:
                lost = False
            time.sleep(_RETRY_S)

    async def _stream(self) -> None:
        """Show what comes until the connection ends, or the job does."""
        seen = 0
        lines = self._source.tail(self._id)
        waiting: asyncio.Task[str | None] | None = None
        silent_since = time.monotonic()
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(_next(lines))
                done, _ = await asyncio.wait([waiting], timeout=_QUIET_S)
                if not done:
                    job = await asyncio.to_thread(self._source.get, self._id)
                    self._heard = time.monotonic()
                    if job.over or self._heard - silent_since > _SILENT_S:
                        return
                    continue
                finished, waiting = waiting, None
                text = finished.result()
                if text is None:
                    return
                silent_since = self._heard = time.monotonic()
                self._add(text, seen)
                seen += len(text)
        finally:
            if waiting is not None:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

    def _add(self, text: str, position: int) -> None:
        """Show the part of `text`, which begins at `position` of the log, that was not shown before."""
        new = text[max(0, self._shown - position) :]
        if new:
            self._show(new)
            self._shown += len(new)

    def _rest(self) -> None:
        self._add(self._source.logs(self._id), 0)


async def _next(lines: AsyncIterator[str]) -> str | None:
    return await anext(lines, None)


def wait(source: Source, job_id: str) -> Job:
    """Wait until a job is over; returns its last state.

    Raises:
        ClusterError: the cluster has not answered for minutes.
    """
    heard = time.monotonic()
    while True:
        try:
            job = source.get(job_id)
        except ClusterError:
            if time.monotonic() - heard > _GIVE_UP_S:
                raise
        else:
            heard = time.monotonic()
            if job.over:
                return job
        time.sleep(_RETRY_S)
