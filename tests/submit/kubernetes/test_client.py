"""`launcher kube apply | status | logs | wait | delete` against a fake API server, whose operator the test plays."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import urllib3
from kubernetes import client
from kubernetes.client import CustomObjectsApi
from typer.testing import CliRunner

from launcher.cli import kube as cli
from launcher.cli.main import app
from launcher.errors import ClusterError, SpecError, TrainingError
from launcher.spec.loader import load_job
from launcher.submit.kubernetes import apply as applying
from launcher.submit.kubernetes import follow as following
from launcher.submit.kubernetes.api import Api, AwayError
from launcher.submit.kubernetes.apply import apply
from launcher.submit.kubernetes.manifest import Manifest
from launcher.submit.kubernetes.render import objects
from launcher.submit.kubernetes.state import JobState, pod_groups
from tests.submit.kubernetes.conftest import Validate
from tests.support.fake_kubernetes import FakeApi, Running

KEY = ("rayjobs", "team", "sst2")


class Command:
    """The real command, with a kubeconfig that points to the server."""

    def __init__(self, running: Running, folder: Path) -> None:
        self.config = folder / "kubeconfig"
        self.config.write_text(running.kubeconfig())
        self.folder = folder

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        env = {**os.environ, "KUBECONFIG": str(self.config), "COLUMNS": "200"}
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", "kube", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=self.folder,
        )  # fmt: skip

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        return process.returncode, out, err


@pytest.fixture
def kube(server: Running, job_file: Path) -> Command:
    return Command(server, job_file.parent)


@pytest.fixture
def api(server: Running) -> Api:
    settings = client.Configuration(host=server.url)
    settings.retries = False
    settings.safe_chars_for_path_param = "/:"
    return Api(client.ApiClient(settings), "team", server.url, False)


@pytest.fixture
def manifests(job_file: Path) -> list[Manifest]:
    return objects(load_job(job_file), "train", "job")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_POLL_S", 0.05)
    monkeypatch.setattr(applying, "_POLL_S", 0.02)


class Lines(list[str]):
    """What somebody was told."""

    def __call__(self, line: str) -> None:
        self.append(line)


def _run(api: FakeApi, **status: Any) -> None:
    """Set the status of a job that the operator has started."""
    at = {"rayClusterName": "sst2-abc", "jobId": "sst2-xyz", "dashboardURL": "sst2-abc-head-svc.team.svc:8265"}
    api.set_status(*KEY, **{"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", **at, **status})


def _pod(api: FakeApi, name: str, labels: dict[str, str], phase: str = "Running", **status: Any) -> None:
    api.put("pods", "team", {"metadata": {"name": name, "labels": labels}, "status": {"phase": phase, **status}})


def _submitter(api: FakeApi, *lines: str, ended: bool = True) -> None:
    _pod(api, "sst2-sub", {"job-name": "sst2"}, "Succeeded" if ended else "Running")
    for line in lines:
        api.log_line("sst2-sub", line)
    if not ended:
        api.open_logs.add("sst2-sub")


@contextmanager
def _later(*steps: Callable[[], None]) -> Iterator[None]:
    """Run functions in a thread during the block, a moment apart."""

    def run() -> None:
        for step in steps:
            time.sleep(0.2)
            step()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()


# The commands as a user runs them


def test_a_job_from_apply_to_delete(kube: Command, server: Running, validate: Validate) -> None:
    fake = server.api
    fake.validate = validate
    code, out, err = kube("apply", "job.yaml")
    assert (code, out) == (0, "ConfigMap sst2-job created\nRayJob sst2 created\n"), err
    assert fake.get(*KEY)["spec"]["submissionMode"] == "K8sJobMode"
    assert set(fake.owners[KEY].values()) == {"launcher"}
    _run(fake)
    waiting = {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes: 3 Insufficient gpu."}]}
    _pod(fake, "head", {"ray.io/cluster": "sst2-abc", "ray.io/group": "headgroup"})
    _pod(fake, "w1", {"ray.io/cluster": "sst2-abc", "ray.io/group": "workers"})
    _pod(fake, "w2", {"ray.io/cluster": "sst2-abc", "ray.io/group": "workers"}, "Pending", **waiting)
    code, out, _ = kube("status", "job.yaml")
    assert code == 0
    for shown in ("sst2 in namespace team", "Running", "RUNNING", "sst2-abc", "sst2-xyz", "1 Running, 1 Pending"):
        assert shown in out
    assert "0/3 nodes: 3 Insufficient gpu." in out and "kubectl port-forward svc/sst2-abc-head-svc 8265" in out
    _submitter(fake, "step 1", "step 2", ended=False)
    steps = (
        lambda: fake.log_line("sst2-sub", "step 3"),
        lambda: fake.set_status(*KEY, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED"),
        lambda: fake.end_log("sst2-sub"),
    )
    with _later(*steps):
        code, out, err = kube("logs", "--follow", "sst2")
    assert (code, out) == (0, "step 1\nstep 2\nstep 3\n")
    assert "log of the submitting pod sst2-sub" in err and "RayJob sst2: Complete, job SUCCEEDED" in err
    code, out, _ = kube("delete", "job.yaml")
    assert (code, out) == (0, "RayJob sst2 deleted\nConfigMap sst2-job deleted\n")
    assert not [key for key in fake.objects if key[0] in ("rayjobs", "configmaps")]


def test_the_exit_code_is_the_jobs_and_not_the_submitters(
    kube: Command, server: Running, manifests: list[Manifest]
) -> None:
    for manifest in manifests:
        server.api.put("rayjobs" if manifest["kind"] == "RayJob" else "configmaps", "team", manifest)
    _run(server.api, jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed", message="exit code 1")
    _submitter(server.api, "all is well")  # its pod succeeded
    code, out, err = kube("logs", "-f", "sst2")
    assert (code, out) == (1, "all is well\n")
    assert err.endswith(
        "RayJob sst2 failed (AppFailed: exit code 1); `launcher kube logs` says why; `launcher kube apply --replace` "
        "resumes from the last checkpoint\n"
    )


def test_ctrl_c_leaves_the_job_alone(kube: Command, server: Running, manifests: list[Manifest]) -> None:
    server.api.put("rayjobs", "team", manifests[1])
    process = kube.start("wait", "sst2")
    deadline = time.monotonic() + 30
    while not any("rayjobs/sst2" in request for request in server.api.requests) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "no longer watching; RayJob sst2 keeps running (`launcher kube delete sst2` stops it)" in err


def test_nobody_there(kube: Command, server: Running, tmp_path: Path) -> None:
    code, _, err = kube("status", "sst2")
    assert (code, err) == (
        2,
        "there is no RayJob sst2 in namespace team; check the name and --namespace, or apply it first\n",
    )
    server.stop()
    code, _, err = kube("apply", "job.yaml")
    assert code == 2 and f"the API server {server.url} does not answer (" in err and "Connection refused" in err
    code, _, err = kube("apply", "job.yaml", "--context", "prod")
    assert code == 2 and "no Kubernetes cluster: " in err and "choose a --context in it" in err
    kube.config.unlink()
    code, _, err = kube("wait", "sst2")
    assert code == 2 and "no Kubernetes cluster: " in err and "set KUBECONFIG, or" in err


def test_render_writes_a_file_per_object(job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["kube", "render", "job.yaml", "train.epochs=2", "-o", "out", "--command", "tune"])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["configmap.yaml", "rayjob.yaml"]
    text = (tmp_path / "out" / "rayjob.yaml").read_text()
    assert text.startswith("# Made by `launcher kube render job.yaml train.epochs=2 --command tune` for KubeRay 1.7.\n")
    assert "launcher tune /etc/launcher/job.yaml" in text
    done = CliRunner().invoke(app, ["kube", "render", "job.yaml", "-o", "job.yaml"])
    assert isinstance(done.exception, ClusterError)
    assert done.exception.message == "--output job.yaml: cannot be written (File exists); name a directory"


def test_edited_manifests_are_checked_before_anything_is_sent(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    CliRunner().invoke(app, ["kube", "render", "job.yaml", "-o", "out"])
    path = tmp_path / "out" / "rayjob.yaml"
    path.write_text(path.read_text().replace("K8sJobMode", "K8SJobMode").replace("backoffLimit: 2", "backoffLimit: -2"))
    done = CliRunner().invoke(app, ["kube", "apply", "out"])
    assert isinstance(done.exception, SpecError)
    assert [problem.split(" is ")[0] for problem in done.exception.problems] == [
        "RayJob sst2: spec.submissionMode",
        "RayJob sst2: spec.backoffLimit",
    ]
    done = CliRunner().invoke(app, ["kube", "apply", "out", "train.epochs=3"])
    assert isinstance(done.exception, ClusterError)
    assert done.exception.message == "out: manifests take no overrides (train.epochs=3); edit them, or name a job file"


def test_without_the_kubernetes_package(monkeypatch: pytest.MonkeyPatch, job_file: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "kubernetes" or name.endswith("kubernetes.api")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    assert CliRunner().invoke(app, ["kube", "render", str(job_file)]).exit_code == 0
    done = CliRunner().invoke(app, ["kube", "status", "sst2"])
    assert isinstance(done.exception, ClusterError)
    assert done.exception.message.startswith("the Kubernetes client is not installed; pip install 'launcher[kube]', or")


def test_importing_the_command_line_does_not_import_kubernetes() -> None:
    code = "import sys, launcher.cli.main; print('kubernetes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# Applying


def test_the_same_again_changes_nothing(api: Api, server: Running, manifests: list[Manifest]) -> None:
    lines = Lines()
    for _ in range(2):
        apply(api, manifests, lines)
    assert lines[2:] == ["ConfigMap sst2-job unchanged", "RayJob sst2 unchanged"]
    assert server.api.get(*KEY)["metadata"]["generation"] == 1


def test_a_dry_run_stores_nothing(api: Api, server: Running, manifests: list[Manifest]) -> None:
    lines = Lines()
    apply(api, manifests, lines, dry_run=True)
    assert lines == ["ConfigMap sst2-job created (dry run)", "RayJob sst2 created (dry run)"]
    assert server.api.objects == {}


def test_a_job_that_runs_is_not_changed(api: Api, server: Running, manifests: list[Manifest], job_file: Path) -> None:
    apply(api, manifests, Lines())
    _run(server.api)
    other = objects(load_job(job_file, ["train.epochs=9"]), "train", "job")
    with pytest.raises(ClusterError, match=r"RayJob sst2 already exists .Running, job RUNNING., and KubeRay ignores"):
        apply(api, other, Lines())
    assert "epochs: 3" in server.api.get("configmaps", "team", "sst2-job")["data"]["job.yaml"]
    lines = Lines()
    apply(api, other, lines, replace=True)
    assert lines == ["RayJob sst2 deleted", "ConfigMap sst2-job changed", "RayJob sst2 created"]
    assert "status" not in server.api.get(*KEY)


def test_a_job_that_is_over_is_replaced_on_request(api: Api, server: Running, manifests: list[Manifest]) -> None:
    apply(api, manifests, Lines())
    _run(server.api, jobDeploymentStatus="Failed", jobStatus="FAILED")
    with pytest.raises(
        ClusterError, match=r"is over .Failed, job FAILED. and KubeRay never runs it again; repeat with"
    ):
        apply(api, manifests, Lines())
    obj = server.api.get(*KEY)
    obj["metadata"]["finalizers"] = ["ray.io/rayjob-finalizer"]
    server.api.put("rayjobs", "team", obj)
    lines = Lines()

    def stop_the_job() -> None:
        while "deletionTimestamp" not in server.api.get(*KEY)["metadata"]:
            time.sleep(0.05)
        time.sleep(0.2)
        server.api.edit(*KEY, {"metadata": {"finalizers": None}})

    with _later(stop_the_job):
        apply(api, manifests, lines, replace=True)
    assert lines[:2] == ["RayJob sst2: waiting until it has stopped", "RayJob sst2 deleted"]


def test_nothing_is_sent_when_one_object_is_refused(api: Api, server: Running, manifests: list[Manifest]) -> None:
    server.api.validate = lambda _: [("spec.ttl", "unknown field")]
    with pytest.raises(ClusterError) as caught:
        apply(api, manifests, Lines())
    assert caught.value.message == (
        'RayJob sst2 in namespace team: refused by the API server (RayJob "sst2" is invalid: spec.ttl: unknown field); '
        "fix it in the job file or manifest"
    )
    assert server.api.objects == {}


def test_somebody_elses_change_is_a_conflict(api: Api, server: Running, manifests: list[Manifest]) -> None:
    apply(api, manifests, Lines())
    server.api.edit(*KEY, {"spec": {"ttlSecondsAfterFinished": 5}})
    with pytest.raises(ClusterError, match=r"another manager has changed it .*kubectl-edit.*ttlSecondsAfterFinished"):
        apply(api, manifests, Lines())
    apply(api, manifests, Lines(), force=True, replace=True)
    assert server.api.get(*KEY)["spec"]["ttlSecondsAfterFinished"] == 600


def test_namespaces(api: Api, server: Running, job_file: Path) -> None:
    first = objects(load_job(job_file, ["cluster.kubernetes.namespace=mine"]), "train", "job")
    apply(api, first, Lines())
    assert ("rayjobs", "mine", "sst2") in server.api.objects
    # A job of that name in the namespace of the context is another one.
    server.api.put("rayjobs", "team", {"metadata": {"name": "sst2"}})
    lines = Lines()
    apply(api, first, lines, replace=True)
    assert "RayJob sst2 deleted" in lines and ("rayjobs", "team", "sst2") in server.api.objects
    other = Api(api.rest, "other", api.host, namespace_given=True)
    with pytest.raises(ClusterError, match=r"belongs to namespace mine, not to other; remove --namespace"):
        apply(other, first, Lines())


# What the server says no with


def test_refusals(api: Api, server: Running, manifests: list[Manifest]) -> None:
    server.api.forbidden.add(("rayjobs", "patch"))
    with pytest.raises(ClusterError, match=r"RayJob sst2 in namespace team: forbidden .rayjobs is forbidden.*ask for"):
        apply(api, manifests, Lines())
    server.api.missing.add("rayjobs")
    with pytest.raises(ClusterError, match=r"knows no RayJob: KubeRay is not installed there; `helm install kuberay"):
        apply(api, manifests, Lines())
    server.api.token = "secret"
    with pytest.raises(
        ClusterError, match=r"does not know this account .Unauthorized.; log in again, or fix the kubeconfig"
    ):
        api.find("RayJob", "sst2")
    server.api.token, server.api.unavailable = None, 1
    with pytest.raises(AwayError, match=r"cannot answer now .503 the server is currently unable to handle the request"):
        api.find("RayJob", "sst2")


def test_a_namespace_that_is_not_there(api: Api, monkeypatch: pytest.MonkeyPatch, server: Running) -> None:
    from tests.support.fake_kubernetes import Refusal

    def refuse(*_: object) -> None:
        raise Refusal(404, "NotFound", 'namespaces "team" not found', "team", "namespaces")

    monkeypatch.setattr(server.api, "apply", refuse)
    with pytest.raises(ClusterError, match=r'not found .namespaces "team" not found.; check the name and --namespace'):
        api.apply({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "team"}}, force=False)
    monkeypatch.setattr(server.api, "read", refuse)
    with pytest.raises(ClusterError, match=r'not found .namespaces "team" not found.'):
        api.find("ConfigMap", "team")  # which is no object of that name that could be missing


# Waiting


def test_waiting_survives_a_server_that_is_away(api: Api, server: Running, manifests: list[Manifest]) -> None:
    server.api.put("rayjobs", "team", manifests[1])
    lines = Lines()

    def go_away() -> None:
        server.api.unavailable = 4

    def succeed() -> None:
        _run(server.api, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")

    with _later(go_away, lambda: _run(server.api), succeed):
        state = following.wait(api, "sst2", None, lines)
    assert state.succeeded
    assert lines[0] == "RayJob sst2: not yet seen by the operator"
    assert any("cannot answer now" in line and line.endswith("; waiting") for line in lines)
    assert lines[-1] == "RayJob sst2: Complete, job SUCCEEDED"


def test_waiting_has_an_end(api: Api, server: Running, manifests: list[Manifest]) -> None:
    server.api.put("rayjobs", "team", manifests[1])
    _run(server.api)
    with pytest.raises(
        TrainingError, match=r"RayJob sst2 has not ended after 0.2 s .Running, job RUNNING.; it continues"
    ):
        following.wait(api, "sst2", 0.2, Lines())
    with (
        _later(lambda: server.api.drop(*KEY)),
        pytest.raises(TrainingError, match=r"RayJob sst2 was deleted; apply it again"),
    ):
        following.wait(api, "sst2", None, Lines())
    with pytest.raises(ClusterError, match=r"there is no RayJob sst2 in namespace team"):
        following.wait(api, "sst2", None, Lines())


def test_a_retry_is_not_the_end(api: Api, server: Running, manifests: list[Manifest]) -> None:
    server.api.put("rayjobs", "team", manifests[1])
    _run(server.api, jobDeploymentStatus="Retrying", jobStatus="FAILED", failed=1)
    with _later(lambda: _run(server.api, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", failed=1)):
        assert following.wait(api, "sst2", None, Lines()).succeeded


@pytest.mark.parametrize("cuts", [[0], [3], [1, 2, 4], [5]])
def test_a_log_that_breaks_off_goes_on_without_gaps(
    api: Api, server: Running, manifests: list[Manifest], cuts: list[int]
) -> None:
    server.api.put("rayjobs", "team", manifests[1])
    _run(server.api)
    _submitter(server.api, *(f"step {n}" for n in range(5)), ended=False)
    server.api.cut_after = list(cuts)
    written = Lines()

    def end() -> None:
        server.api.log_line("sst2-sub", "last")
        _run(server.api, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
        server.api.end_log("sst2-sub")

    with _later(lambda: server.api.log_line("sst2-sub", "step 5"), end):
        log = following.Log(api, Lines(), written, follow=True)
        state = following.wait(api, "sst2", None, Lines(), log)
    assert state.succeeded and written == [*(f"step {n}" for n in range(6)), "last"]


def test_lines_of_the_same_moment_are_told_apart(api: Api, server: Running, manifests: list[Manifest]) -> None:
    state = JobState.of({**manifests[1], "status": {"jobDeploymentStatus": "Running"}})
    _pod(server.api, "sst2-sub", {"job-name": "sst2"})
    times = ("05:00.5Z", "05:00.5Z", "05:00.51Z", "05:01Z", "05:01Z")
    for number, moment in enumerate(times):
        server.api.log_line("sst2-sub", str(number), f"2026-01-01T00:{moment}")
    server.api.cut_after = [1, 2, 4]
    written = Lines()
    log = following.Log(api, Lines(), written, follow=True)
    for _ in range(5):
        log.catch_up(state)
    assert written == ["0", "1", "2", "3", "4"]


def test_without_a_submitting_pod_the_dashboard_has_the_log(
    api: Api, server: Running, manifests: list[Manifest]
) -> None:
    manifests[1]["spec"]["submissionMode"] = "HTTPMode"
    server.api.put("rayjobs", "team", manifests[1])
    server.api.put("secrets", "team", {"metadata": {"name": "sst2-abc"}, "data": {"auth_token": "dG9rZW4="}})
    place = "sst2-abc-head-svc:8265/api/jobs/sst2-xyz/logs"
    _run(server.api)
    lines, written = Lines(), Lines()
    log = following.Log(api, lines, written, follow=True)
    server.api.dashboard[place] = {"logs": "step 1\nst"}  # the driver is in the middle of a line
    log.catch_up(JobState.of(api.get("RayJob", "sst2")))
    assert written == ["step 1"]
    server.api.dashboard[place] = {"logs": "step 1\nstep 2\nlast"}
    _run(server.api, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    log.catch_up(JobState.of(api.get("RayJob", "sst2")))
    assert written == ["step 1", "step 2", "last"]
    assert "log of the driver, from the Ray dashboard of sst2-abc (no submitting pod)" in lines
    assert server.api.headers[place]["x-ray-authorization"] == "Bearer token"


def test_the_dashboard_stands_in_for_a_submitting_pod_that_is_gone(
    api: Api, server: Running, manifests: list[Manifest]
) -> None:
    server.api.put("rayjobs", "team", manifests[1])
    _run(server.api)
    server.api.dashboard["sst2-abc-head-svc:8265/api/jobs/sst2-xyz/logs"] = {"logs": "step 1\n"}
    written = Lines()
    log = following.Log(api, Lines(), written, follow=False)
    log.catch_up(JobState.of(api.get("RayJob", "sst2")))
    assert written == ["step 1"] and log.has_source


def test_a_log_that_is_not_there(kube: Command, server: Running, manifests: list[Manifest]) -> None:
    server.api.put("rayjobs", "team", manifests[1])
    code, _, err = kube("logs", "sst2")
    assert code == 2 and err == (
        "RayJob sst2 has no log to read (not yet seen by the operator): its pods have not started, or are gone; "
        "what the run wrote is in its output.storage\n"
    )


# What is read off objects


@pytest.mark.parametrize(
    ("status", "final", "succeeded", "expected"),
    [
        ({}, False, False, "failed"),
        ({"jobDeploymentStatus": "Initializing"}, False, False, "failed"),
        ({"jobDeploymentStatus": "Suspended"}, False, False, "failed"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, True, True, ""),
        (
            {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"},
            True,
            False,
            "RayJob sst2 was stopped; `launcher",
        ),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "failed": 3}, True, False, "failed after 3 attempts"),
        (
            {"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "SubmissionFailed"},
            True,
            False,
            "(SubmissionFailed); the submitting pod lost the job's log or could not submit, and training may continue",
        ),
        (
            {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "too\nlate"},
            True,
            False,
            "(DeadlineExceeded: too late); raise cluster.kubernetes.active_deadline_s",
        ),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "no"}, True, False, "(ValidationFailed: no); KubeRay"),
    ],
)
def test_states(status: dict[str, Any], final: bool, succeeded: bool, expected: str) -> None:
    state = JobState.of({"metadata": {"name": "sst2"}, "status": status})
    assert (state.is_final, state.succeeded) == (final, succeeded)
    assert expected in state.failure and "\n" not in state.failure


def test_pods_by_group() -> None:
    pulling = {
        "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}]
    }
    obj = pod_groups(
        [
            {
                "metadata": {"name": "b", "labels": {"ray.io/group": "workers"}},
                "status": {"phase": "Pending", **pulling},
            },
            {"metadata": {"name": "c", "labels": {"ray.io/group": "workers"}, "deletionTimestamp": "now"}},
            {"metadata": {"name": "a", "labels": {"ray.io/group": "headgroup"}}, "status": {"phase": "Running"}},
        ]
    )
    assert [(pod.group, dict(pod.phases), pod.waiting) for pod in obj] == [
        ("head", {"Running": 1}, ""),
        ("workers", {"Pending": 1, "Terminating": 1}, "ImagePullBackOff: no such image"),
    ]


def test_targets(job_file: Path, tmp_path: Path, manifests: list[Manifest]) -> None:
    from launcher.submit.kubernetes.job_file import find_target
    from launcher.submit.kubernetes.manifest import dump_manifests

    assert find_target("sst2", (), "job").name == "sst2"
    assert find_target(str(job_file), ["cluster.kubernetes.namespace=n"], "cluster").namespace == "n"
    path = tmp_path / "found" / "all.yaml"
    path.parent.mkdir()
    path.write_text(dump_manifests(manifests))
    assert find_target(str(path), (), "cluster").kind == "RayJob"
    path.write_text(dump_manifests(manifests * 2))
    with pytest.raises(ClusterError, match=r"holds 2 RayJobs and RayClusters; name one of them instead"):
        find_target(str(path.parent), (), "job")
    with pytest.raises(SpecError, match=r"jobs/nope.yaml: there is no such file"):
        find_target("jobs/nope.yaml", (), "job")


def test_a_cluster_has_a_status_too(api: Api, server: Running, job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(api, objects(load_job(job_file), "train", "cluster"), Lines())
    server.api.set_status("rayclusters", "team", "sst2", state="ready")
    monkeypatch.setattr(cli, "_connect", lambda *_: api)
    done = CliRunner().invoke(app, ["kube", "status", "sst2", "--kind", "cluster"])
    assert done.exit_code == 0 and "ready" in done.output


def test_errors_of_the_network_are_one_line(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise urllib3.exceptions.ProtocolError("Connection broken", OSError("reset"))

    monkeypatch.setattr(CustomObjectsApi, "get_namespaced_custom_object", fail)
    with pytest.raises(AwayError) as caught:
        api.find("RayJob", "sst2")
    assert "\n" not in caught.value.message
