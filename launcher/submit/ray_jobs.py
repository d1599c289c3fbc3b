"""Requests to the Jobs API of one Ray cluster, through Ray's own client. Runs on the client.

Every request has a time limit, and every failure is one sentence. Read `follow.py` next.
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
# A driver mostly waits; train workers leave this much of their CPUs unreserved (`driver/worker_group.py`).
_DRIVER_CPUS = 0.001
_RUN, _STORAGE, _COMMAND = "launcher.run", "launcher.storage", "launcher.command"
_ACTIVE = (JobStatus.PENDING, JobStatus.RUNNING)


@dataclass(frozen=True)
class Job:
    """A submission as the cluster knows it."""

    id: str
    status: JobStatus
    run: str
    """Name of the launcher's run; empty for another kind of job."""
    storage: str
    command: str
    entrypoint: str
    message: str
    exit_code: int | None
    started: datetime | None
    ended: datetime | None

    @property
    def over(self) -> bool:
        """Return whether the job has ended."""
        return self.status.is_terminal()


@dataclass(frozen=True)
class Submission:
    """A command to run on the cluster.

    Args:
        job: Job as it is in the package.
        words: Command (train, tune, evaluate or predict) with the arguments of the latter two.
    """

    job: JobSpec
    words: tuple[str, ...]

    @property
    def command(self) -> str:
        """Return the name of the command."""
        return self.words[0]

    @property
    def entrypoint(self) -> str:
        """Return the shell command of the driver; `exec` passes on the stop signal and the exit code."""
        run = join(self.job.output.storage, self.job.name)
        is_training = self.command in ("train", "tune")
        # The job file in a run directory grants no permissions; those of the submitted one are passed as overrides.
        permissions = () if is_training else permission_overrides(self.job, self.words)
        words = [self.command, JOB_FILE if is_training else run, *self.words[1:], *permissions]
        line = "exec " + shlex.join(["python", "-m", "launcher", *words])
        prepare = self.job.cluster.prepare if is_training else None
        return f"{prepare} && {line}" if prepare else line


class _Client(JobSubmissionClient):
    """Ray's client with time limits. Without them it hangs where a network drops packets (Ray 2.60)."""

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:  # Ray's own signature
        return super()._do_request(method, endpoint, timeout=(_CONNECT_S, _ANSWER_S), **kwargs)


class RayJobs:
    """The Jobs API of one cluster.

    Args:
        address: Address of the dashboard: `http://host:8265`, https behind a proxy, or `host:8265`.

    Raises:
        ClusterError: The dashboard does not answer, or the token is missing or wrong.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
        # Both modules set their loggers to INFO at import (Ray 2.60), so an earlier level of ours is lost.
        for name in ("job.sdk", "dashboard_sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
        with _translated_errors(self.address):
            # requests reads this variable by itself, but the log's WebSocket (aiohttp) does not.
            verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
            self._client = _Client(self.address, headers=_headers(), verify=verify)

    def submit(self, submission: Submission, package: Path) -> str:
        """Upload the package, a zip file, start the driver, and return the submission id.

        Raises:
            ClusterError: The cluster refuses.
        """
        job = submission.job
        cluster = job.cluster
        passed = {name: os.environ[name] for name in cluster.pass_env if name in os.environ}
        with _translated_errors(self.address):
            return str(
                self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    # The random part is needed: Ray refuses an id that it knows, with the status 500 of a bug (2.60).
                    submission_id=f"{job.name}-{submission.command}-{uuid.uuid4().hex[:8]}",
                    runtime_env={
                        "working_dir": str(package),
                        # Ray's supervisor reads this variable in the job's own environment. Its default of 3 s before
                        # SIGKILL is too short for a checkpoint (2.60, job_supervisor.py).
                        "env_vars": {**passed, "RAY_JOB_STOP_WAIT_TIME_S": str(cluster.grace_s)},
                    },
                    metadata={_RUN: job.name, _STORAGE: job.output.storage, _COMMAND: submission.command},
                    **self._placement(cluster.driver),
                )
            )

    def _placement(self, driver: str) -> dict[str, Any]:  # keyword arguments of submit_job
        # Without resources Ray pins the driver to the head (2.60, JobManager._get_label_selector).
        if driver == "head":
            return {}
        # JobSubmissionClient has no public call for the nodes (2.60), hence the dashboard's own route.
        nodes = self._client._do_request("GET", "/nodes?view=summary").json()["data"]["summary"]
        heads = [node["raylet"]["nodeId"] for node in nodes if node["raylet"].get("isHeadNode")]
        # Any resource lifts Ray's pin, but a head that offers CPUs could still be chosen; the label excludes it.
        selector = {"ray.io/node-id": f"!in({','.join(heads)})"} if heads else {}
        return {"entrypoint_num_cpus": _DRIVER_CPUS, "entrypoint_label_selector": selector}

    def jobs(self) -> list[Job]:
        """Return all submissions that the cluster knows, newest first."""
        with _translated_errors(self.address):
            # Drivers that were not submitted (a ray.init on a node) are listed as well, without a submission id.
            jobs = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        oldest = datetime.fromtimestamp(0, timezone.utc)
        return sorted(jobs, key=lambda job: job.started or oldest, reverse=True)

    def find(self, name: str) -> Job:
        """Return the submission of that id, or the newest one of the run of that name.

        Raises:
            RunError: There is none.
        """
        jobs = self.jobs()
        for job in (*(job for job in jobs if job.id == name), *(job for job in jobs if job.run == name)):
            return job
        raise RunError(f"{self.address}: there is no job {name}; `launcher jobs list` lists the jobs")

    def get(self, job_id: str) -> Job:
        """Return the submission of that id.

        Raises:
            RunError: The cluster does not know it.
        """
        with _translated_errors(self.address):
            try:
                return _job(self._client.get_job_info(job_id))
            except RuntimeError as error:
                if not _has_status(error, 404):
                    raise
                raise RunError(f"{self.address}: there is no job {job_id} (any more)") from error

    def at_work_on(self, spec: JobSpec) -> Job | None:
        """Return the active submission of the job's run, to which a second one would write the same files."""
        same = [job for job in self.jobs() if (job.run, job.storage) == (spec.name, spec.output.storage)]
        return next((job for job in same if job.status in _ACTIVE), None)

    def stop(self, job_id: str) -> None:
        """Stop the driver, which has `cluster.grace_s` to save a checkpoint."""
        with _translated_errors(self.address):
            self._client.stop_job(job_id)

    def logs(self, job_id: str) -> str:
        """Return the driver's log so far."""
        with _translated_errors(self.address):
            return str(self._client.get_job_logs(job_id))

    def tail(self, job_id: str) -> AsyncIterator[str]:
        """Yield the driver's log from the beginning; ends or raises when the connection does."""
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
    """Return headers for a proxy in front of the cluster, as the `ray job` commands read them.

    Raises:
        ClusterError: They are not a JSON object.
    """
    text = os.environ.get("RAY_JOB_HEADERS", "{}")
    try:
        return {str(name): str(value) for name, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise ClusterError('RAY_JOB_HEADERS: is not a JSON object; write it as {"Name": "value"}') from error


@contextmanager
def _translated_errors(address: str) -> Iterator[None]:
    """Turn whatever the client raises into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # process border: the client passes on the errors of its libraries
        raise ClusterError(_sentence(address, error)) from error


def _has_status(error: Exception, status: int) -> bool:
    # Ray's client has the status only in the text of a RuntimeError (2.60, SubmissionClient._raise_error). The number
    # alone may also be a part of the job's name.
    return f"status code {status}" in str(error)


def _sentence(address: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, AuthenticationError):
        is_missing = "401" in text or "no authentication token" in text.lower() or "Unauthenticated" in text
        what = "requires a token and got none" if is_missing else "does not accept this token"
        return (
            f"{address}: {what}; set RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH "
            "(`ray get-auth-token` on the head prints the token)"
        )
    # Ray's client turns requests' ConnectionError into the builtin one in its first check, and not later (2.60).
    # Neither class is a subclass of the other.
    if isinstance(error, (ConnectionError, requests.ConnectionError, requests.Timeout)):
        return (
            f"{address}: no Ray dashboard answers ({type(error).__name__}); give --address http://HEAD:8265, or "
            "forward its port"
        )
    if _has_status(error, 413):
        return f"{address}: refuses a package of more than {MAX_BYTES >> 20} MiB; keep data on shared storage"
    return f"{address}: the cluster refuses ({text[:300]})"
