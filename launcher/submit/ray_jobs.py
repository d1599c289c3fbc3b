"""The Jobs API of one Ray cluster, spoken through Ray's own client. Runs on the client.

Every answer comes within a time limit and every failure is one sentence. Read `follow.py` next.
"""

import json
import logging
import os
import shlex
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from launcher.errors import ClusterError, RunError, UserError
from launcher.rundir.uri import join
from launcher.spec.job import JobSpec
from launcher.spec.permissions import permission_overrides
from launcher.submit.package import JOB_FILE, MAX_BYTES

LOCAL = "http://127.0.0.1:8265"
_CONNECT_S, _ANSWER_S = 10.0, 60.0
# A driver mostly waits, and train workers leave as little of their CPUs (`driver/worker_group.py`).
_DRIVER_CPUS = 0.001
_RUN, _STORAGE, _COMMAND = "launcher.run", "launcher.storage", "launcher.command"
_AT_WORK = (JobStatus.PENDING, JobStatus.RUNNING)


@dataclass(frozen=True)
class Job:
    """What a cluster knows of one submission."""

    id: str
    status: JobStatus
    run: str
    """Name of the launcher's run, or nothing for a job of another kind."""
    storage: str
    command: str
    entrypoint: str
    message: str
    exit_code: int | None
    started: datetime | None
    ended: datetime | None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status.is_terminal()


@dataclass(frozen=True)
class Submission:
    """What to send.

    Args:
        job: the job as it is in the package.
        words: train, tune, evaluate or predict, with the latter two's arguments.
    """

    job: JobSpec
    words: tuple[str, ...]

    @property
    def command(self) -> str:
        """What is done with the job."""
        return self.words[0]

    @property
    def entrypoint(self) -> str:
        """The shell command of the driver; `exec` gives it the stop signal, and Ray its exit."""
        run = join(self.job.output.storage, self.job.name)
        trains = self.command in ("train", "tune")
        # A run's own job file permits nothing; the one that was submitted is the user's.
        permits = () if trains else permission_overrides(self.job, self.words)
        words = [self.command, JOB_FILE if trains else run, *self.words[1:], *permits]
        line = "exec " + shlex.join(["python", "-m", "launcher", *words])
        prepare = self.job.cluster.prepare if trains else None
        return f"{prepare} && {line}" if prepare else line


class _Client(JobSubmissionClient):
    """Ray's client with time limits: it has none, and hangs where a network drops packets."""

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:  # Ray's own signature
        return super()._do_request(method, endpoint, timeout=(_CONNECT_S, _ANSWER_S), **kwargs)


class RayJobs:
    """One cluster's Jobs API.

    Args:
        address: of its dashboard: `http://host:8265`, https behind a proxy, or `host:8265`.

    Raises:
        ClusterError: nobody answers there, or the token is missing or wrong.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
        for name in ("job.sdk", "dashboard_sdk"):  # which set their own levels when they are imported
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
        with _told(self.address):
            # The requests library reads this variable by itself; the log's WebSocket does not.
            verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
            self._client = _Client(self.address, headers=_headers(), verify=verify)

    def submit(self, it: Submission, package: Path) -> str:
        """Upload the package, a zip file, and start the driver; returns the submission id.

        Raises:
            ClusterError: the cluster refuses.
        """
        cluster = it.job.cluster
        passed = {name: os.environ[name] for name in cluster.pass_env if name in os.environ}
        with _told(self.address):
            return str(
                self._client.submit_job(
                    entrypoint=it.entrypoint,
                    submission_id=f"{it.job.name}-{it.command}-{uuid.uuid4().hex[:8]}",
                    runtime_env={
                        "working_dir": str(package),
                        "env_vars": {**passed, "RAY_JOB_STOP_WAIT_TIME_S": str(cluster.grace_s)},
                    },
                    metadata={_RUN: it.job.name, _STORAGE: it.job.output.storage, _COMMAND: it.command},
                    **self._placement(cluster.driver),
                )
            )

    def _placement(self, driver: str) -> dict[str, Any]:  # keyword arguments of submit_job
        if driver == "head":
            return {}
        nodes = self._client._do_request("GET", "/nodes?view=summary").json()["data"]["summary"]
        heads = [node["raylet"]["nodeId"] for node in nodes if node["raylet"].get("isHeadNode")]
        away = {"ray.io/node-id": f"!in({','.join(heads)})"} if heads else {}
        return {"entrypoint_num_cpus": _DRIVER_CPUS, "entrypoint_label_selector": away}

    def jobs(self) -> list[Job]:
        """All submissions the cluster remembers, newest first."""
        with _told(self.address):
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        oldest = datetime.fromtimestamp(0, timezone.utc)
        return sorted(found, key=lambda job: job.started or oldest, reverse=True)

    def find(self, name: str) -> Job:
        """The submission of that id, or the newest one of the run of that name.

        Raises:
            RunError: there is none.
        """
        found = self.jobs()
        for job in found:
            if name == job.id:
                return job
        for job in found:
            if name == job.run:
                return job
        raise RunError(f"{self.address}: no job {name} there; `launcher jobs list` shows what there is")

    def get(self, job_id: str) -> Job:
        """The submission of that id.

        Raises:
            RunError: the cluster does not know it.
        """
        with _told(self.address):
            try:
                return _job(self._client.get_job_info(job_id))
            except RuntimeError as error:
                if "404" not in str(error):
                    raise
                raise RunError(f"{self.address}: no job {job_id} there (any more)") from error

    def at_work_on(self, it: JobSpec) -> Job | None:
        """The submission that works on the job's run now: a second one would write the same files."""
        same = [job for job in self.jobs() if (job.run, job.storage) == (it.name, it.output.storage)]
        return next((job for job in same if job.status in _AT_WORK), None)

    def stop(self, job_id: str) -> None:
        """Ask the driver to stop; it has its grace to save a checkpoint."""
        with _told(self.address):
            self._client.stop_job(job_id)

    def logs(self, job_id: str) -> str:
        """All that the driver printed so far."""
        with _told(self.address):
            return str(self._client.get_job_logs(job_id))

    def tail(self, job_id: str) -> AsyncIterator[str]:
        """What the driver printed and prints, from the beginning; ends, or raises, when the connection does."""
        return self._client.tail_job_logs(job_id)


def _job(details: JobDetails) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=details.submission_id or "",
        status=JobStatus(details.status),
        run=metadata.get(_RUN, ""),
        storage=metadata.get(_STORAGE, ""),
        command=metadata.get(_COMMAND, ""),
        entrypoint=details.entrypoint,
        message=" ".join((details.message or "").split()),
        exit_code=details.driver_exit_code,
        started=_time(details.start_time),
        ended=_time(details.end_time),
    )


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc) if milliseconds else None


def _headers() -> dict[str, str]:
    """Headers for a proxy before the cluster, as the `ray job` commands read them.

    Raises:
        ClusterError: they are no JSON object.
    """
    text = os.environ.get("RAY_JOB_HEADERS", "{}")
    try:
        return {str(name): str(value) for name, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise ClusterError('RAY_JOB_HEADERS: is no JSON object; write it as {"Name": "value"}') from error


@contextmanager
def _told(address: str) -> Iterator[None]:
    """What the client raises, in one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # process border: the client raises whatever its libraries raise
        raise ClusterError(_sentence(address, error)) from error


def _sentence(address: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, AuthenticationError):
        missing = "401" in text or "no authentication token" in text.lower() or "Unauthenticated" in text
        what = "asks for a token and got none" if missing else "does not accept this token"
        return (
            f"{address}: {what}; set RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH "
            "(`ray get-auth-token` on the head prints the token)"
        )
    if isinstance(error, (ConnectionError, requests.ConnectionError, requests.Timeout)):
        return (
            f"{address}: no Ray dashboard answers there ({type(error).__name__}); give --address http://HEAD:8265, or "
            "forward its port"
        )
    if "413" in text:
        return f"{address}: refuses a package of more than {MAX_BYTES >> 20} MiB; keep data on shared storage"
    return f"{address}: the cluster refuses ({text[:300]})"
