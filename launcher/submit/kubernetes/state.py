"""The status of a RayJob and of its pods. Pure; runs on the client.

Only the RayJob's own status counts: the submitting pod can succeed for a job that failed, and the other way round.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.submit.kubernetes.manifest import Manifest, name_of

_RESUME = "`launcher kube apply --replace` resumes from the last checkpoint"
_REMEDIES = {
    "SubmissionFailed": "the submitting pod lost the job's log or could not submit, and training may continue: look "
    "at the Ray dashboard, and raise cluster.kubernetes.submitter_retries",
    "DeadlineExceeded": f"raise cluster.kubernetes.active_deadline_s; {_RESUME}",
    "PreRunningDeadlineExceeded": "its pods did not start in time: see what they wait for with `launcher kube status`, "
    "or raise cluster.kubernetes.pre_running_deadline_s",
    "AppFailed": f"`launcher kube logs` says why; {_RESUME}",
    "JobStatusCheckTimeoutExceeded": f"the operator could not reach Ray's dashboard; {_RESUME}",
    "ValidationFailed": "KubeRay refuses the manifest; fix it there",
}


@dataclass(frozen=True)
class JobState:
    """The status of a RayJob.

    Args:
        name: Name of the RayJob.
        deployment: KubeRay's state: Initializing, Running, Complete, Failed, Suspended ...; "" at first.
        status: Ray's state of the driver: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED; "" before it starts.
        reason: Reason of a failure, in one word.
        message: Reason in KubeRay's words.
        failed: Number of attempts that failed.
        cluster: Name of the RayCluster of the current attempt.
        job_id: Ray's submission id of the current attempt.
        dashboard: Address of Ray's dashboard inside the Kubernetes cluster.
        mode: Submission mode.
    """

    name: str
    deployment: str
    status: str
    reason: str
    message: str
    failed: int
    cluster: str
    job_id: str
    dashboard: str
    mode: str

    @classmethod
    def of(cls, rayjob: Manifest) -> "JobState":
        """Return the status of an object from the API server."""
        status: Mapping[str, Any] = rayjob.get("status") or {}

        def text(key: str) -> str:
            return str(status.get(key) or "")

        return cls(
            name=name_of(rayjob),
            deployment=text("jobDeploymentStatus"),
            status=text("jobStatus"),
            reason=text("reason"),
            message=text("message"),
            failed=int(status.get("failed") or 0),
            cluster=text("rayClusterName"),
            job_id=text("jobId"),
            dashboard=text("dashboardURL"),
            mode=str((rayjob.get("spec") or {}).get("submissionMode") or "K8sJobMode"),
        )

    @property
    def is_final(self) -> bool:
        """Return whether the job has ended."""
        # Not by Ray's status: after FAILED KubeRay may start another cluster (backoffLimit). Suspended is no end
        # either, since a queue may resume the job.
        return self.deployment in ("Complete", "Failed", "ValidationFailed")

    @property
    def succeeded(self) -> bool:
        """Return whether the job has ended successfully."""
        # KubeRay calls a stopped job Complete too: only Ray's FAILED becomes its Failed (rayjob_controller.go).
        return self.deployment == "Complete" and self.status == "SUCCEEDED"

    @property
    def line(self) -> str:
        """Return the state in a few words."""
        deployment = self.deployment or "not yet seen by the operator"
        ray = f", job {self.status}" if self.status else ""
        failed = f", {self.failed} failed before" if self.failed and not self.is_final else ""
        return f"{deployment}{ray}{failed}"

    @property
    def failure(self) -> str:
        """Return why it did not succeed, as one sentence."""
        if self.status == "STOPPED" and self.deployment == "Complete":
            return f"RayJob {self.name} was stopped; {_RESUME}"
        reason = (
            f"{self.reason or self.deployment}{': ' + ' '.join(self.message.split())[:300] if self.message else ''}"
        )
        attempts = f" after {self.failed} attempts" if self.failed > 1 else ""
        remedy = _REMEDIES.get(self.reason or self.deployment, _REMEDIES["AppFailed"])
        return f"RayJob {self.name} failed{attempts} ({reason}); {remedy}"


@dataclass(frozen=True)
class PodGroup:
    """The pods of one group in one phase."""

    group: str
    phases: Mapping[str, int]
    waiting: str
    """Reason why the first waiting pod waits, or ""."""


def pod_groups(pods: Sequence[Manifest]) -> list[PodGroup]:
    """Return pods by their group, the head first."""
    groups: dict[str, list[Manifest]] = {}
    for pod in pods:
        # KubeRay labels the pods of a cluster with their group; the submitting pod belongs to none.
        groups.setdefault(pod["metadata"].get("labels", {}).get("ray.io/group", "submitter"), []).append(pod)
    order = sorted(groups, key=lambda name: (name != "headgroup", name))
    return [
        PodGroup(
            "head" if name == "headgroup" else name,
            Counter(_phase(pod) for pod in groups[name]),
            next((reason for reason in map(_waiting_reason, groups[name]) if reason), ""),
        )
        for name in order
    ]


def _phase(pod: Manifest) -> str:
    # A pod that is being deleted keeps its phase, which is mostly Running.
    if pod["metadata"].get("deletionTimestamp"):
        return "Terminating"
    return str(pod.get("status", {}).get("phase", "Unknown"))


def _waiting_reason(pod: Manifest) -> str:
    status = pod.get("status", {})
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return " ".join(str(condition.get("message") or condition.get("reason") or "").split())
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        # Every pod shows these two for some seconds: they explain nothing.
        if waiting.get("reason") and waiting["reason"] not in ("PodInitializing", "ContainerCreating"):
            return f"{waiting['reason']}: {' '.join(str(waiting.get('message', '')).split())}".rstrip(": ")
    return ""
