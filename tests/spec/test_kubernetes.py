"""`cluster.kubernetes:` what is accepted, the sentence of each refusal, and the sizes of the pods."""

from pathlib import Path

import pytest

from launcher.spec.kubernetes_pods import GroupSize, group_sizes
from launcher.spec.loader import dump_job, load_job
from tests.support.job_loader import Load

JOB = """\
name: sst2
task: {type: text-classification}
model: {name: bert-base-uncased}
data: {train: s3://bucket/train/}
cluster:
  workers: 4
  gpus_per_worker: 1
  kubernetes:
    image: registry/launcher:0.1.0
"""
K = "cluster.kubernetes"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.chdir(tmp_path)
    return Load()


def test_an_image_is_enough(load: Load) -> None:
    job = load.job(JOB)
    spec = job.cluster.kubernetes
    assert spec is not None
    assert (spec.submission, spec.backoff_limit, spec.auth, spec.autoscales) == ("K8sJobMode", 2, "token", False)
    assert group_sizes(spec.groups, job.cluster.demand) == {
        "workers": GroupSize(min_pods=4, max_pods=4, cpus=2, gpus=1, memory_mib=20480, shm_mib=10240)
    }


def test_a_dumped_job_with_everything_loads_as_the_same_job(load: Load) -> None:
    job = load.job(
        JOB,
        "cluster.driver=worker",
        f"{K}.volumes.a={{type: pvc, claim: c, path: /a, sub_path: d}}",
        f"{K}.volumes.b={{type: source, source: {{nfs: {{server: s, path: /x}}}}, path: /b}}",
        f"{K}.queue={{type: volcano, queue: q}}",
        f"{K}.fabric={{type: roce, per_pod: 8}}",
        f"{K}.fault_tolerance={{redisAddress: 'redis:6379', redisPassword: {{value: x}}}}",
        f"{K}.groups={{a: {{min_pods: 0, max_pods: 4, pod_template: {{spec: {{tolerations: [{{key: spot}}]}}}}}}}}",
        f"{K}.env_from_secret={{HF_TOKEN: {{secret: hub, key: token}}}}",
    )
    Path("again.yaml").write_text(dump_job(job))
    assert load_job("again.yaml") == job


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["cluster.workers=16", f"{K}.groups.workers.workers_per_pod=8"], GroupSize(2, 2, 9, 8, 135168, 67584)),
        (["cluster.workers=10", f"{K}.groups.workers.workers_per_pod=4"], GroupSize(3, 3, 5, 4, 69632, 34816)),
        (["cluster.workers=2", f"{K}.groups.workers.workers_per_pod=8"], GroupSize(1, 1, 3, 2, 36864, 18432)),
        (["cluster.driver=worker"], GroupSize(4, 4, 3, 1, 24576, 12288)),
        (["cluster.gpus_per_worker=0"], GroupSize(4, 4, 2, 0, 8192, 4096)),
        (["cluster.gpus_per_worker=0.5", f"{K}.groups.workers.workers_per_pod=4"], GroupSize(1, 1, 5, 2, 45056, 22528)),
        (["cluster.cpus_per_worker=0.5"], GroupSize(4, 4, 2, 1, 20480, 10240)),
        ([f"{K}.groups.workers.min_pods=1"], GroupSize(1, 4, 2, 1, 20480, 10240)),
        ([f"{K}.groups.workers.max_pods=6"], GroupSize(0, 6, 2, 1, 20480, 10240)),
        ([f"{K}.groups.workers.min_pods=7"], GroupSize(7, 7, 2, 1, 20480, 10240)),
        ([f"{K}.groups.workers={{memory_gib: 64, shm_gib: 8, cpus: 12}}"], GroupSize(4, 4, 12, 1, 65536, 8192)),
    ],
)
def test_sizes_come_from_the_workers(load: Load, overrides: list[str], size: GroupSize) -> None:
    job = load.job(JOB, *overrides)
    assert job.cluster.kubernetes is not None
    assert group_sizes(job.cluster.kubernetes.groups, job.cluster.demand) == {"workers": size}


# Keys in addition to the image, and the sentence after `cluster.kubernetes.`; `test_loader.py` has the sentences that
# all sections share (unknown keys, choices, bounds, types).
REFUSED = [
    ("ray_version: nightly", "ray_version is nightly"),
    ("name: 7b-sft", "name is 7b-sft, which is not a name KubeRay takes: at most 47 lower-case letters"),
    ("name: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "name is aaaa"),
    ("namespace: My.Team",
     "namespace is My.Team, which is not a namespace: at most 63 lower-case letters, digits and dashes; choose "),
    ("pod_labels: {team: a b}", "pod_labels: team has the value 'a b', which is not a label value; use at most 63"),
    ("groups: {}", "groups is {}, which has fewer than 1 item"),
    ("groups: {Big_Ones: {}}", "groups has the name 'Big_Ones'; use at most 42 lower-case letters, digits and dashes"),
    ("groups: {headgroup: {}}", "groups has the name headgroup, which is the head's; rename the group"),
    ("groups: {a: {pods: 1, max_pods: 2}}",
     "groups.a.pods fixes the number that min_pods and max_pods let change; give only one of the two"),
    ("groups: {a: {min_pods: 3, max_pods: 2}}", "groups.a.min_pods is 3, above max_pods 2; swap them"),
    ("groups: {a: {idle_timeout_s: 5}}",
     "groups.a.idle_timeout_s is for pods that the autoscaler removes; add min_pods"),
    ("groups: {a: {gpu_resource: google.com/tpu}}",
     "groups.a.gpu_resource is google.com/tpu, which Ray would not count as GPUs; it must end with gpu"),
    ("groups: {a: {node_selector: {'a b': c}}}", "groups.a.node_selector: 'a b' is not a label key"),
    ("volumes: {d: {type: pvc, claim: c, path: d}}",
     "volumes.d.path is d, which is not an absolute path of plain letters"),
    ("volumes: {d: {type: pvc, claim: c, path: /tmp}}",
     "volumes has d at /tmp, which the launcher mounts itself; choose another path"),
    ("volumes: {d: {type: pvc, claim: c, path: /d}, e: {type: pvc, claim: f, path: /d}}",
     "volumes has d and e at the same path /d; move one of them"),
    ("volumes: {own-x: {type: pvc, claim: c, path: /d}}",
     "volumes has the name own-x, a prefix of the launcher's own volumes; rename it"),
    ("volumes: {d: {type: source, source: {csi: {driver: s3.csi.aws.com}}, path: /d}}",
     "volumes.d.source: driver s3.csi.aws.com has no ephemeral volumes; create a PersistentVolume"),
    ("volumes: {d: {type: source, source: {}, path: /d}}",
     "volumes.d.source has 0 kinds of volumes; give exactly one, such as nfs or csi"),
    ("pod_template: {tolerations: []}", "pod_template.tolerations is not a key of cluster.kubernetes.pod_template; "),
    ("image_paths: [models]", "image_paths[0] is models, which is not an absolute path"),
    ("working_dir: 'https://x/$Y.zip'",
     'working_dir is "https://x/$Y.zip", which is not the URI of a .zip, .tar.gz or .tgz'),
    ("working_dir: ./code", "working_dir is ./code, which is not the URI of a .zip, .tar.gz or .tgz"),
    ("env: {1A: b}", "env has the name '1A'; use letters, digits, underscores, and no digit first"),
    ("env: {RAY_ADDRESS: x}", "env sets RAY_ADDRESS, which KubeRay and the launcher set; remove it"),
    ("env: {HF_TOKEN: hf_x}", "env shows the value of HF_TOKEN to everyone who reads the manifest; put it in a Secret"),
    ("env: {A: b}, env_from_secret: {A: {secret: s, key: k}}",
     "env and env_from_secret both set A; remove one of them"),
    ("queue: {type: kueue}", "queue.queue is missing, which kueue needs; add the name of the queue"),
    ("queue: {type: scheduler-plugins, queue: q}", "queue.queue is q, but scheduler-plugins has no queues; remove it"),
    ("queue: {type: kai, queue: q, priority: p}",
     "queue.priority is p, which is for kueue; use priorityClassName in pod_template"),
    ("queue: {type: kueue, queue: q}, groups: {a: {min_pods: 1}}",
     "queue kueue admits a fixed number of pods; give the groups pods"),
    ("queue: {type: kueue, queue: q}, groups: {a: {pods: 1}, b: {pods: 1}, c: {pods: 1}, d: {pods: 1}, e: "
     "{pods: 1}, f: {pods: 1}, g: {pods: 1}, h: {pods: 1}}",
     "groups has 8 names, but kueue admits at most 7 of them; join some"),
    ("fabric: {type: efa, interface: eth0}", "fabric.interface is eth0, which has no meaning for efa; remove it"),
    ("fabric: {type: infiniband, resource: rdma}",
     "fabric.resource is rdma, which is not a resource of a device plug-in, such as nvidia.com/gpu or rdma/ib"),
    ("submission: InteractiveMode, retries: 1",
     "retries is 1, but InteractiveMode has none; remove it or choose another submission"),
]  # fmt: skip

# Lines of a `cluster:` section that begins on line 5 of the file.
REFUSED_TOGETHER = [
    ("  kubernetes: {image: My Image}", '6: cluster.kubernetes.image is "My Image", which is not the name of an image'),
    ("  kubernetes: {image: i, head: {shm_gib: 9}}",
     "6: cluster: kubernetes.head.shm_gib is 9, which is all of the 8 GiB of memory it counts against; lower it"),
    ("  kubernetes: {image: i, groups: {a: {}, b: {pods: 1}}}",
     "6: cluster: kubernetes.groups.a has no number of pods; with several groups each needs pods"),
    ("  workers: 4\n  kubernetes: {image: i, groups: {a: {pods: 2}}}",
     "6: cluster.workers is 4, but the pods of kubernetes.groups hold 2; raise pods, max_pods, cpus or gpus of "
     "a group"),
    ("  workers: 2\n  cpus_per_worker: 4\n  kubernetes: {image: i, groups: {a: {cpus: 2}}}",
     "6: cluster.workers need 4 CPUs and 0 GPUs each, but a pod of kubernetes.groups.a has 2 and 0; give its "
     "pods more"),
    ("  driver: worker\n  kubernetes: {image: i, groups: {a: {cpus: 1}}}",
     "6: cluster.workers and a driver among them need 2 CPUs, but the pods of kubernetes.groups have 1; give "
     "the pods more cpus, or write driver: head"),
    ("  kubernetes: {image: i, groups: {a: {memory_gib: 2, shm_gib: 2}}}",
     "6: cluster: kubernetes.groups.a.shm_gib is 2, which is all of the 2 GiB of memory it counts against"),
    ("  kubernetes: {image: i, fault_tolerance: {redisAddress: 'r:1'}}",
     "6: cluster.driver is head, so a head restart (kubernetes.fault_tolerance) ends it; write driver: worker"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "expected"),
    [(f"  kubernetes: {{image: i, {keys}}}", f"job.yaml:6: {K}.{expected}") for keys, expected in REFUSED]
    + REFUSED_TOGETHER,
)
def test_a_broken_section_is_one_sentence_at_its_line(load: Load, section: str, expected: str) -> None:
    head = "name: sst2\ntask: {type: t}\nmodel: {name: m}\ndata: {train: s3://b/t/}\ncluster:\n"
    problems = load.problems(f"{head}{section}\n")
    assert len(problems) == 1, problems
    assert problems[0].startswith("job.yaml:") and expected in problems[0]
    # Every sentence ends with what to do.
    assert ";" in problems[0] or "?" in problems[0]


def test_all_problems_of_the_section_come_at_once(load: Load) -> None:
    text = JOB + "    ttl_s: -5\n    auth: none\n    head: {cpus: 0}\n"
    assert [problem.split(" is ")[0] for problem in load.problems(text)] == [
        "job.yaml:10: cluster.kubernetes.ttl_s",
        "job.yaml:11: cluster.kubernetes.auth",
        "job.yaml:12: cluster.kubernetes.head.cpus",
    ]


def test_a_broken_rule_names_the_override(load: Load) -> None:
    text = JOB + "    groups: {a: {pods: 4}}\n"
    (problem,) = load.problems(text, "cluster.workers=8")
    assert problem.startswith("override cluster.workers=8: cluster.workers is 8, but the pods of kubernetes.groups ho")
