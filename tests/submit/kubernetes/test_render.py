"""Every job file, with many options: KubeRay's schemas and rules take what is rendered, and it says what was asked."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.errors import SpecError
from launcher.spec.loader import load_job
from launcher.submit.kubernetes.job_file import load_for_pods
from launcher.submit.kubernetes.render import GATES, Kind, objects
from launcher.submit.kubernetes.rules.check import problems_of
from tests.submit.kubernetes.conftest import JOB, Validate

_ROOT = Path(__file__).resolve().parents[3]
_JOBS = sorted((_ROOT / "jobs").glob("*.yaml"))
K = "cluster.kubernetes"
# One volume that everything of every job file lies on.
_HERE = [
    f"{K}.image=registry/launcher:0.1.0",
    f"{K}.volumes={{all: {{type: pvc, claim: shared, path: /mnt/all}}}}",
    "output.storage=/mnt/all/runs",
]
OPTIONS: dict[str, list[str]] = {
    "plain": [],
    "driver": ["cluster.driver=worker", "cluster.grace_s=300"],
    "autoscaling": [f"{K}.groups={{a: {{min_pods: 0, max_pods: 64, idle_timeout_s: 60}}}}"],
    "two-groups": [
        f"{K}.groups={{a: {{pods: 32, pod_template: {{spec: {{priorityClassName: high}}}}}}, "
        "b: {min_pods: 0, max_pods: 8, cpus: 8, shm_gib: 1}}"
    ],
    "kueue": [f"{K}.queue={{type: kueue, queue: q, priority: high}}", f"{K}.pre_running_deadline_s=600"],
    "volcano": [
        f"{K}.queue={{type: volcano, queue: q}}",
        f"{K}.pod_template={{spec: {{priorityClassName: high}}}}",
        f"{K}.pod_labels={{volcano.sh/network-topology-mode: hard}}",
    ],
    "yunikorn": [f"{K}.queue={{type: yunikorn, queue: root.team}}"],
    "kai": [f"{K}.queue={{type: kai, queue: q}}"],
    "plugins": [f"{K}.queue={{type: scheduler-plugins}}"],
    "redis": [
        "cluster.driver=worker",
        f"{K}.fault_tolerance={{redisAddress: 'redis:6379', redisUsername: {{value: me}}, "
        "redisPassword: {valueFrom: {secretKeyRef: {name: s, key: p}}}}",
    ],
    "rocksdb": [
        "cluster.driver=worker",
        f"{K}.fault_tolerance={{backend: rocksdb, storage: {{size: 1Gi, storageClassName: ssd}}}}",
        f"{K}.feature_gates=[GCSFaultToleranceEmbeddedStorage]",
    ],
    "http": [f"{K}.submission=HTTPMode", f"{K}.auth=disabled"],
    "sidecar": [f"{K}.submission=SidecarMode"],
    "interactive": [f"{K}.submission=InteractiveMode"],
    "ethernet": [f"{K}.fabric={{type: ethernet, interface: eth0}}", f"{K}.spread=required"],
    "infiniband": [f"{K}.fabric={{type: infiniband}}", f"{K}.spread=preferred", f"{K}.run_as_user=0"],
    "roce": [f"{K}.fabric={{type: roce, interface: ens1}}", f"{K}.env={{NCCL_IB_GID_INDEX: '3'}}"],
    "efa": [f"{K}.fabric={{type: efa, per_pod: 4}}"],
    "gcp-rdma": [f"{K}.fabric={{type: gcp-rdma}}"],
    "volumes": [
        f"{K}.volumes.fuse={{type: source, path: /b, source: {{csi: {{driver: gcsfuse.csi.storage.gke.io, "
        "volumeAttributes: {bucketName: b}}}}",
        f"{K}.volumes.nfs={{type: source, source: {{nfs: {{server: nas, path: /x}}}}, path: /n, read_only: true}}",
        f"{K}.volumes.secret={{type: source, source: {{secret: {{secretName: s}}}}, path: /s}}",
        f"{K}.volumes.config={{type: source, source: {{configMap: {{name: c}}}}, path: /c}}",
        f"{K}.volumes.lustre={{type: source, source: {{hostPath: {{path: /lustre, type: Directory}}}}, path: /l}}",
    ],
    "environment": [
        f"{K}.env={{HF_HOME: /mnt/all/hf, NCCL_DEBUG: INFO}}",
        f"{K}.env_from_secret={{HF_TOKEN: {{secret: hub, key: token}}}}",
        f"{K}.secrets=[aws]",
    ],
    "places": [
        f"{K}.namespace=team", f"{K}.service_account=trainer", f"{K}.pull_policy=Always",
        f"{K}.pod_labels={{team: nlp}}", f"{K}.name=named",
        f"{K}.pod_template={{metadata: {{annotations: {{sidecar.istio.io/inject: 'false'}}}}, "
        "spec: {imagePullSecrets: [{name: reg}]}}",
        f"{K}.head={{cpus: 4, memory_gib: 16, node_selector: {{pool: cpu}}, "
        "pod_template: {spec: {tolerations: [{key: head, operator: Exists}]}}}",
    ],
    "limits": [f"{K}.active_deadline_s=86400", f"{K}.retries=5", f"{K}.ttl_s=0", f"{K}.read_only_root=false"],
    "code": [f"{K}.working_dir=s3://bucket/code.zip", "cluster.prepare='python prepare.py && ls *.py'"],
}  # fmt: skip


def test_the_matrix_is_large() -> None:
    assert len(_CASES) >= 60


def _moved(path: Path) -> list[str]:
    """Return overrides that move a job file's local paths onto the volume."""
    job = load_job(path)
    overrides = [*_HERE]
    for split in ("train", "validation", "test"):
        locations = getattr(job.data, split) or ()
        if locations and not locations[0].startswith(("s3://", "hub:")):
            overrides.append(f"data.{split}=/mnt/all/{locations[0]}")
    if job.model.name.startswith("data/"):
        overrides.append(f"model.name=/mnt/all/{job.model.name}")
    return overrides


# Every option meets every fourth job file, and every job file every fourth option.
_CASES = [
    pytest.param(path, overrides, id=f"{path.stem}-{option}")
    for row, path in enumerate(_JOBS)
    for column, (option, overrides) in enumerate(OPTIONS.items())
    if (row + column) % 4 == 0
]


@pytest.mark.parametrize(("path", "overrides"), _CASES)
def test_schemas_and_rules_take_it(path: Path, overrides: list[str], validate: Validate) -> None:
    job = load_for_pods(path, [*_moved(path), *overrides], None)
    kinds: tuple[Kind, ...] = ("job", "cluster")
    for kind in kinds:
        manifests = objects(job, "tune" if job.tune is not None else "train", kind)
        assert problems_of(manifests) == []
        assert validate(manifests[1]) == []


def _render(folder: Path, *overrides: str, kind: Kind = "job") -> tuple[dict[str, Any], dict[str, Any]]:
    path = folder / "job.yaml"
    path.write_text(JOB)
    config_map, body = objects(load_for_pods(path, overrides, None), "train", kind)
    return config_map, body


def _pods(body: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = body["spec"].get("rayClusterSpec", body["spec"])
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def _env(pod: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in pod["containers"][0]["env"]}


def test_the_job_travels_in_a_config_map(tmp_path: Path) -> None:
    config_map, body = _render(tmp_path, "train.epochs=7", "cluster.address=null")
    inside = tmp_path / "inside.yaml"
    inside.write_text(config_map["data"]["job.yaml"])
    job = load_job(inside)
    assert (job.name, job.train.epochs, job.cluster.address) == ("sst2", 7, "auto")
    assert body["spec"]["entrypoint"] == "exec python -m launcher train /etc/launcher/job.yaml"
    for pod in _pods(body):
        assert {"name": "own-job", "configMap": {"name": "sst2-job"}} in pod["volumes"]
        mount = {"name": "own-job", "mountPath": "/etc/launcher", "readOnly": True}
        assert mount in pod["containers"][0]["volumeMounts"]


def test_defaults(tmp_path: Path) -> None:
    _, body = _render(tmp_path)
    spec = body["spec"]
    assert spec["submissionMode"] == "K8sJobMode" and spec["shutdownAfterJobFinishes"] is True
    assert (spec["ttlSecondsAfterFinished"], spec["backoffLimit"]) == (600, 2)
    assert spec["submitterConfig"] == {"backoffLimit": 10} and "entrypointNumCpus" not in spec
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == "2.60.0" and cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert "enableInTreeAutoscaling" not in cluster
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 4, 4)
    head, worker = _pods(body)
    resources = worker["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"] == {"cpu": "2", "memory": "20Gi", "nvidia.com/gpu": "1"}
    assert worker["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert "tolerations" not in head and _env(head)["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert "NVIDIA_VISIBLE_DEVICES" not in _env(worker)


@pytest.mark.parametrize(("grace", "drain", "kill"), [(60, 90, 120), (5, 35, 65), (3600, 3630, 3660)])
def test_a_pod_has_time_for_a_checkpoint(tmp_path: Path, grace: int, drain: int, kill: int) -> None:
    _, body = _render(tmp_path, f"cluster.grace_s={grace}")
    assert grace < drain < kill
    for pod in _pods(body):
        assert pod["terminationGracePeriodSeconds"] == kill
        assert _env(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == str(drain)
        assert "lifecycle" not in pod["containers"][0]  # a preStop of `ray stop` would leave no time at all
    runtime_env = yaml.safe_load(body["spec"]["runtimeEnvYAML"])
    assert runtime_env == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(grace)}}


def test_nothing_runs_as_root_or_writes_into_the_image(tmp_path: Path) -> None:
    _, body = _render(tmp_path)
    for pod in [*_pods(body), body["spec"]["submitterPodTemplate"]["spec"]]:
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        container = pod["containers"][0]
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True and security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert {"/tmp", "/home/launcher"} <= writable and _env(pod)["HOME"] == "/home/launcher"
        assert pod["automountServiceAccountToken"] is False


def test_shared_memory_is_a_part_of_the_memory(tmp_path: Path) -> None:
    _, body = _render(tmp_path, f"{K}.groups.workers.memory_gib=64", f"{K}.head.shm_gib=1.5")
    shm = [next(entry for entry in pod["volumes"] if entry["name"] == "own-shm")["emptyDir"] for pod in _pods(body)]
    assert shm == [{"medium": "Memory", "sizeLimit": "1536Mi"}, {"medium": "Memory", "sizeLimit": "32Gi"}]


def test_secrets_are_references(tmp_path: Path) -> None:
    _, body = _render(tmp_path, *OPTIONS["environment"])
    for pod in _pods(body):
        assert _env(pod)["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "aws"}}]


def test_a_driver_on_a_worker(tmp_path: Path) -> None:
    _, body = _render(tmp_path, "cluster.driver=worker", f"{K}.pre_running_deadline_s=7200")
    assert body["spec"]["entrypointNumCpus"] == 1
    head, worker = _pods(body)
    assert _env(head)["RAY_JOB_START_TIMEOUT_SECONDS"] == "7200"
    assert worker["containers"][0]["resources"]["limits"]["cpu"] == "3"  # worker, stream, driver


def test_autoscaling_is_version_2_and_said(tmp_path: Path) -> None:
    _, body = _render(tmp_path, f"{K}.groups.workers={{min_pods: 1, idle_timeout_s: 120}}")
    cluster = body["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True and cluster["autoscalerOptions"]["version"] == "v2"
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"], group["idleTimeoutSeconds"]) == (1, 4, 120)
    head, worker = _pods(body)
    assert _env(head)["RAY_JOB_START_TIMEOUT_SECONDS"] == "3600"
    # The autoscaler beside the head talks to the API server; workers have nothing to say there.
    assert "automountServiceAccountToken" not in head and worker["automountServiceAccountToken"] is False


def test_a_service_account_gives_no_pod_the_token_of_the_api_server(tmp_path: Path) -> None:
    _, body = _render(tmp_path, f"{K}.service_account=trainer")
    for pod in _pods(body):
        assert pod["serviceAccountName"] == "trainer" and pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("fabric", "env", "limits", "capabilities"),
    [
        ("{type: ethernet}", {"NCCL_IB_DISABLE": "1"}, {}, None),
        (
            "{type: ethernet, interface: eth0}",
            {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"},
            {},
            None,
        ),
        ("{type: ethernet, interface: ^docker}", {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "^docker"}, {}, None),
        ("{type: infiniband, per_pod: 8}", {"NCCL_IB_DISABLE": "0"}, {"rdma/ib": "8"}, ["IPC_LOCK"]),
        (
            "{type: roce, interface: ens1}",
            {"NCCL_IB_DISABLE": "0", "NCCL_SOCKET_IFNAME": "ens1"},
            {"rdma/roce": "1"},
            ["IPC_LOCK"],
        ),
        (
            "{type: efa, per_pod: 4}",
            {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1"},
            {"vpc.amazonaws.com/efa": "4"},
            None,
        ),
    ],
)
def test_a_network_is_for_workers_alone(
    tmp_path: Path, fabric: str, env: dict[str, str], limits: dict[str, str], capabilities: list[str] | None
) -> None:
    _, body = _render(tmp_path, f"{K}.fabric={fabric}")
    head, worker = _pods(body)

    def network(pod: dict[str, Any]) -> dict[str, Any]:
        prefixes = ("NCCL_", "GLOO_", "FI_")
        return {name: value for name, value in _env(pod).items() if name.startswith(prefixes)}

    assert network(worker) == env and network(head) == {}
    container = worker["containers"][0]
    assert {**{"cpu": "2", "memory": "20Gi", "nvidia.com/gpu": "1"}, **limits} == container["resources"]["limits"]
    assert container["securityContext"]["capabilities"].get("add") == capabilities


def test_the_job_files_environment_wins(tmp_path: Path) -> None:
    _, body = _render(tmp_path, f"{K}.fabric={{type: ethernet}}", f"{K}.env={{NCCL_IB_DISABLE: '0', USER: me}}")
    worker = _pods(body)[1]
    assert _env(worker)["NCCL_IB_DISABLE"] == "0" and _env(worker)["USER"] == "me"
    names = [entry["name"] for entry in worker["containers"][0]["env"]]
    assert len(names) == len(set(names))


def test_queues_are_labels(tmp_path: Path) -> None:
    def labels(option: str) -> dict[str, str]:
        _, body = _render(tmp_path, *OPTIONS[option])
        own = {"app.kubernetes.io/instance": "sst2", "app.kubernetes.io/part-of": "launcher"}
        assert own.items() <= body["metadata"]["labels"].items()
        return {name: value for name, value in body["metadata"]["labels"].items() if name not in own}

    assert labels("kueue") == {"kueue.x-k8s.io/queue-name": "q", "kueue.x-k8s.io/priority-class": "high"}
    assert labels("volcano") == {
        "volcano.sh/queue-name": "q",
        "ray.io/priority-class-name": "high",
        "volcano.sh/network-topology-mode": "hard",
    }
    assert labels("yunikorn") == {
        "ray.io/gang-scheduling-enabled": "true",
        "yunikorn.apache.org/app-id": "sst2",
        "yunikorn.apache.org/queue": "root.team",
    }
    assert labels("kai") == {"kai.scheduler/queue": "q"}
    assert labels("plugins") == {"ray.io/gang-scheduling-enabled": "true"}


def test_fault_tolerance(tmp_path: Path) -> None:
    _, body = _render(tmp_path, *OPTIONS["redis"])
    options = body["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"]
    assert options["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "s", "key": "p"}}}
    # A retry is a new cluster and must not read the old one's state.
    assert "externalStorageNamespace" not in options and GATES not in body["metadata"]["annotations"]
    _, body = _render(tmp_path, *OPTIONS["rocksdb"])
    assert body["metadata"]["annotations"][GATES] == "GCSFaultToleranceEmbeddedStorage"


def test_modes_have_what_belongs_to_them(tmp_path: Path) -> None:
    _, body = _render(tmp_path, f"{K}.submission=SidecarMode")
    assert "submitterPodTemplate" not in body["spec"] and "submitterConfig" not in body["spec"]
    assert _pods(body)[0]["restartPolicy"] == "Never"
    _, body = _render(tmp_path, f"{K}.submission=InteractiveMode")
    assert "entrypoint" not in body["spec"] and body["spec"]["backoffLimit"] == 0


def test_a_pod_template_is_merged_over_the_pods(tmp_path: Path) -> None:
    patch = "{spec: {dnsPolicy: Default, containers: [{name: ray-worker, securityContext: {privileged: true}}]}}"
    _, body = _render(
        tmp_path,
        f"{K}.pod_template={{metadata: {{annotations: {{a: b}}}}, spec: {{automountServiceAccountToken: null}}}}",
        f"{K}.groups.workers.pod_template={patch}",
    )
    head, worker = _pods(body)
    assert "automountServiceAccountToken" not in head and "dnsPolicy" not in head
    assert worker["dnsPolicy"] == "Default" and len(worker["containers"]) == 1
    security = worker["containers"][0]["securityContext"]
    assert security["privileged"] is True and security["readOnlyRootFilesystem"] is True
    group = body["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["template"]["metadata"]["annotations"]["a"] == "b"


def test_an_unknown_field_of_a_pod_template_is_refused(tmp_path: Path) -> None:
    _, body = _render(tmp_path, f"{K}.head.pod_template={{spec: {{nodeSelectr: {{a: b}}}}}}")
    (problem,) = problems_of([body])
    assert problem.endswith(
        "template.spec.nodeSelectr is not a field of a Kubernetes PodSpec; did you mean nodeSelector?"
    )


def test_a_cluster_to_work_on_by_hand(tmp_path: Path) -> None:
    config_map, body = _render(tmp_path, kind="cluster")
    assert (config_map["kind"], body["kind"], body["metadata"]["name"]) == ("ConfigMap", "RayCluster", "sst2")
    assert "entrypoint" not in body["spec"] and body["spec"]["headGroupSpec"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["output.storage=runs"],
            "override output.storage=runs: output.storage is runs, which is local to each pod and lost when the pod "
            "ends; mount a shared volume (cluster.kubernetes.volumes), or give a URI",
        ),
        (
            ["output.storage=/runs", f"{K}.volumes.d={{type: pvc, claim: c, path: /mnt/d}}"],
            "output.storage is /runs, which is local to each pod and lost when the pod ends; put it below /mnt/d",
        ),
        (
            ["output.storage=/d", f"{K}.volumes.d={{type: source, source: {{secret: {{}}}}, path: /d}}"],
            "output.storage is /d, which",
        ),
        (["output.storage=/d/../e", f"{K}.volumes.d={{type: pvc, claim: s, path: /d}}"], "output.storage is /d/../e"),
        (["output.storage=file:///d"], "output.storage is file:///d, which is local to each pod"),
        (
            ["data.validation=[s3://b/v, data/v.parquet]"],
            "data.validation[1] is data/v.parquet, which is not in the pods; mount a volume",
        ),
        (["data.train=hub:./local#train"], "data.train[0] is ./local, which is not in the pods"),
        (["data.train=~/x.parquet", f"{K}.working_dir=s3://b/c.zip"], "data.train[0] is ~/x.parquet, which is not"),
        (["model.name=models/org/bert"], "model.name is models/org/bert, which is not in the pods"),
        (
            ["model.name=/models/bert", f"{K}.image_paths=[/opt]"],
            "model.name is /models/bert, which is not in the pods; put it below /opt, give a URI",
        ),
        (
            ["parallel.offload_optimizer=true", "parallel.offload_path=/mnt/nvme"],
            "parallel.offload_path is /mnt/nvme, which the pods cannot write to; mount a disk of the nodes there",
        ),
        (
            ["data.cache={path: /cache}"],
            "data.cache.path is /cache, which the pods cannot write to; mount a disk of the",
        ),
        (["cluster.code=[my_task.py]"], "cluster.code names my_task.py, which a manifest cannot carry; build it into"),
        (["cluster.kubernetes=null"], "override cluster.kubernetes=null: cluster.kubernetes is missing; add it with"),
    ],
)
def test_paths_that_pods_do_not_have(job_file: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_for_pods(job_file, overrides, None)
    assert len(caught.value.problems) == 1 and expected in caught.value.problems[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.name=/models/bert", f"{K}.image_paths=[/models]"],
        ["model.name=org/name", "data.train=hub:org/name#train"],
        ["data.train=data/x.parquet", f"{K}.working_dir=s3://b/c.zip"],
        ["data.train=/ro/x.parquet", f"{K}.volumes.d={{type: source, source: {{nfs: {{}}}}, path: /ro}}"],
        ["parallel={offload_optimizer: true, offload_path: /tmp}"],
        [
            "parallel={offload_optimizer: true, offload_path: /mnt/nvme/states}",
            f"{K}.volumes.d={{type: source, source: {{hostPath: {{path: /mnt/ssd0}}}}, path: /mnt/nvme}}",
        ],
        ["cluster.code=[my_task.py]", f"{K}.working_dir=https://x/c.zip"],
        [
            "output.storage=file:///d/runs",
            f"{K}.volumes.d={{type: source, source: {{hostPath: {{path: /lustre}}}}, path: /d}}",
        ],
    ],
)
def test_paths_that_pods_have(job_file: Path, overrides: list[str]) -> None:
    assert load_for_pods(job_file, overrides, None).name == "sst2"
