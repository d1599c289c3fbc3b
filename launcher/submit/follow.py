"""Follow the log of a submitted job until the job has ended, across dropped connections. Runs on the client.

The log arrives over a WebSocket that starts at the first line each time, may die silently, and does not say how the job
ended. So the characters already shown are counted, and the job's own state decides.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import aiohttp

from launcher.errors import ClusterError
from launcher.submit.ray_jobs import Job

_QUIET_S = 10.0
"""Seconds without a line after which the job's state is read."""
_SILENT_S = 120.0
"""Seconds without a line after which the connection is replaced, which loses nothing."""
_RETRY_S = 2.0
_GIVE_UP_S = 300.0


class Source(Protocol):
    """The source of a job's log and state."""

    def get(self, job_id: str, /) -> Job:
        """Return the current state of the job."""

    def logs(self, job_id: str, /) -> str:
        """Return the whole log so far."""

    def tail(self, job_id: str, /) -> AsyncIterator[str]:
        """Yield the log from the beginning."""


class Follower:
    """A follower of a job's log that shows each character once.

    Args:
        source: Cluster of the job.
        job_id: Id of the submission.
        show: Function that prints a piece of the log.
        notice: Function that reports a lost connection.
    """

    def __init__(self, source: Source, job_id: str, show: Callable[[str], None], notice: Callable[[str], None]) -> None:
        self._source = source
        self._id = job_id
        self._show = show
        self._notice = notice
        self._num_shown = 0
        self._last_answer = time.monotonic()

    def follow(self) -> Job:
        """Follow until the job has ended, and return its last state.

        Raises:
            ClusterError: The cluster has not answered for minutes; the job may still run.
            RunError: The cluster no longer knows the job.
        """
        is_lost = False
        while True:
            try:
                # A stream ends with the job, with the connection, or after too long a silence. It does not say which of
                # them it was, so the job's state is read after each stream.
                asyncio.run(self._stream())
                job = self._source.get(self._id)
                if job.over:
                    # The stream may lack the last lines. The log is read after the state is final, never before: a line
                    # written between the two would be lost.
                    self._add(self._source.logs(self._id), 0)
                    return job
            # asyncio.TimeoutError is an OSError only from Python 3.11 on. RuntimeError is what Ray's client raises for
            # an abnormal close of the WebSocket (2.60, tail_job_logs). A RunError, for a job that is not known any
            # more, must end the loop. aiohttp raises ClientError where a proxy answers, or the server drops the line.
            except (OSError, RuntimeError, ClusterError, aiohttp.ClientError, asyncio.TimeoutError) as error:
                if time.monotonic() - self._last_answer > _GIVE_UP_S:
                    raise ClusterError(
                        f"no answer for {int(_GIVE_UP_S)} s ({error}); the job may still run: "
                        f"`launcher jobs logs {self._id} --follow` resumes the log"
                    ) from error
                if not is_lost:
                    self._notice("the connection was lost; the job continues, reconnecting")
                is_lost = True
            else:
                is_lost = False
            time.sleep(_RETRY_S)

    async def _stream(self) -> None:
        """Show the log until the connection or the job ends."""
        num_received = 0
        lines = self._source.tail(self._id)
        pending: asyncio.Task[str | None] | None = None
        silent_since = time.monotonic()
        try:
            while True:
                # The same task waits through quiet periods. Cancelling anext() would end the generator and its
                # connection.
                pending = pending or asyncio.ensure_future(_next(lines))
                done, _ = await asyncio.wait([pending], timeout=_QUIET_S)
                if not done:
                    # In a thread, because Ray's client blocks (requests), and lines may arrive meanwhile.
                    job = await asyncio.to_thread(self._source.get, self._id)
                    self._last_answer = time.monotonic()
                    # A peer that died without a word looks like a quiet job: nobody sends, so TCP notices nothing.
                    if job.over or self._last_answer - silent_since > _SILENT_S:
                        return
                    continue
                text = pending.result()
                pending = None
                if text is None:
                    return
                silent_since = self._last_answer = time.monotonic()
                self._add(text, num_received)
                num_received += len(text)
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)

    def _add(self, text: str, position: int) -> None:
        """Show the part of `text`, which starts at `position` of the log, that has not been shown."""
        new = text[max(0, self._num_shown - position) :]
        if new:
            self._show(new)
            self._num_shown += len(new)


async def _next(lines: AsyncIterator[str]) -> str | None:
    return await anext(lines, None)  # a coroutine, which asyncio.ensure_future needs


def wait(source: Source, job_id: str) -> Job:
    """Wait until a job has ended, and return its last state.

    Raises:
        ClusterError: The cluster has not answered for minutes.
    """
    last_answer = time.monotonic()
    while True:
        try:
            job = source.get(job_id)
        # A RunError passes: a cluster that has forgotten the job will not remember it.
        except ClusterError:
            if time.monotonic() - last_answer > _GIVE_UP_S:
                raise
        else:
            last_answer = time.monotonic()
            if job.over:
                return job
        time.sleep(_RETRY_S)
