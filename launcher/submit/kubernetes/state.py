"""What a RayJob or RayCluster says about itself. Pure; runs on the client.

The RayJob's own status is what counts: the pod that submits can end well for a job that failed, and the other way.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.submit.kubernetes.manifest import Manifest, name_of

_AGAIN = "`launcher kube apply --replace` goes on from the last checkpoint"
_REMEDIES = {
    "SubmissionFailed": "the submitting pod lost the job's log or could not submit, and the training may go on: look "
    "at the Ray dashboard, and raise cluster.kubernetes.submitter_retries",
    "DeadlineExceeded": f"raise cluster.kubernetes.active_deadline_s; {_AGAIN}",
    "PreRunningDeadlineExceeded": "its pods did not start in time: see what they wait for with `launcher kube status`, "
    "or raise cluster.kubernetes.pre_running_deadline_s",
    "AppFailed": f"`launcher kube logs` says why; {_AGAIN}",
    "JobStatusCheckTimeoutExceeded": f"the operator could not reach Ray's dashboard; {_AGAIN}",
    "ValidationFailed": "KubeRay refuses the manifest; mend it there",
}


@dataclass(frozen=True)
class JobState:
    """A RayJob's status.

    Args:
        name: of the RayJob.
        deployment: what KubeRay does with it: Initializing, Running, Complete, Failed, Suspended ...; "" at first.
        status: what Ray says of the driver: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED; "" before it starts.
        reason: why it failed, in one word.
        message: the same in KubeRay's words.
        failed: attempts that failed.
        cluster: name of the RayCluster of the present attempt.
        job_id: Ray's submission id of the present attempt.
        dashboard: address of Ray's dashboard inside the Kubernetes cluster.
        mode: how it is submitted.
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
        """Read off an object of the API server."""
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
        """Whether nothing more will happen."""
        return self.deployment in ("Complete", "Failed", "ValidationFailed")

    @property
    def succeeded(self) -> bool:
        """Whether the job did what it should."""
        return self.deployment == "Complete" and self.status == "SUCCEEDED"

    @property
    def line(self) -> str:
        """The state in a few words."""
        words = self.deployment or "not taken up by the operator yet"
        ray = f", job {self.status}" if self.status else ""
        again = f", {self.failed} failed before" if self.failed and not self.is_final else ""
        return f"{words}{ray}{again}"

    @property
    def failure(self) -> str:
        """Why it did not succeed, as one sentence."""
        if self.status == "STOPPED" and self.deployment == "Complete":
            return f"RayJob {self.name} was stopped; {_AGAIN}"
        why = f"{self.reason or self.deployment}{': ' + ' '.join(self.message.split())[:300] if self.message else ''}"
        attempts = f" after {self.failed} attempts" if self.failed > 1 else ""
        remedy = _REMEDIES.get(self.reason or self.deployment, _REMEDIES["AppFailed"])
        return f"RayJob {self.name} failed{attempts} ({why}); {remedy}"


@dataclass(frozen=True)
class PodGroup:
    """The pods of one group in one phase."""

    group: str
    phases: Mapping[str, int]
    waiting: str
    """Why the first pod that waits does, or ""."""


def pod_groups(pods: Sequence[Manifest]) -> list[PodGroup]:
    """Pods by their group, the head first."""
    groups: dict[str, list[Manifest]] = {}
    for pod in pods:
        groups.setdefault(pod["metadata"].get("labels", {}).get("ray.io/group", "submitter"), []).append(pod)
    order = sorted(groups, key=lambda name: (name != "headgroup", name))
    return [
        PodGroup(
            "head" if name == "headgroup" else name,
            Counter(_phase(pod) for pod in groups[name]),
            next((why for why in map(_waiting, groups[name]) if why), ""),
        )
        for name in order
    ]


def _phase(pod: Manifest) -> str:
    if pod["metadata"].get("deletionTimestamp"):
        return "Terminating"
    return str(pod.get("status", {}).get("phase", "Unknown"))


def _waiting(pod: Manifest) -> str:
    status = pod.get("status", {})
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return " ".join(str(condition.get("message") or condition.get("reason") or "").split())
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") and waiting["reason"] not in ("PodInitializing", "ContainerCreating"):
            return f"{waiting['reason']}: {' '.join(str(waiting.get('message', '')).split())}".rstrip(": ")
    return ""
