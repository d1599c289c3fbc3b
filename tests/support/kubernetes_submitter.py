"""The command of KubeRay's submitter pod for a RayJob: the same words in the same order, so that tests can run it.

Rebuilt from KubeRay 1.7.0 (`BuildJobSubmitCommand` for K8sJobMode). Only the check of the
dashboard's health is not KubeRay's own; it has the same effect.
"""

import json
import re
from typing import Any

import yaml

_HEALTHY = (
    "python3 -c \"import sys, urllib.request; r = urllib.request.urlopen('{url}/api/gcs_healthz', timeout=5); "
    "sys.exit(0 if b'success' in r.read() else 1)\""
)
JOB_ID = "launcher-test-1"


def submitter_command(rayjob: dict[str, Any], address: str, job_id: str = JOB_ID) -> list[str]:
    """Return the argv of the submitter's container.

    Args:
        rayjob: Rendered manifest in K8sJobMode.
        address: Address of the dashboard, `host:8265` or `http://host:8265`.
        job_id: Submission id, which the operator draws.

    Returns:
        `/bin/bash -ce -- LINE`; the line waits for the dashboard, submits unless it is submitted, follows the log.
    """
    spec = rayjob["spec"]
    assert spec.get("submissionMode", "K8sJobMode") == "K8sJobMode"
    address = address if address.startswith("http://") else f"http://{address}"
    wait = [
        "until", _HEALTHY.format(url=address), ">/dev/null", "2>&1", ";", "do",
        "echo", go_quoted(f"Waiting for Ray Dashboard GCS to become healthy at {address} ..."), ";", "sleep", "2", ";",
        "done", ";",
    ]  # fmt: skip
    submitted = ["ray", "job", "status", "--address", address, job_id, ">/dev/null", "2>&1"]
    submit = ["ray", "job", "submit", "--address", address, "--no-wait"]
    if spec.get("runtimeEnvYAML"):
        runtime_env = json.dumps(yaml.safe_load(spec["runtimeEnvYAML"]), sort_keys=True, separators=(",", ":"))
        submit += ["--runtime-env-json", go_quoted(runtime_env)]
    if spec.get("metadata"):
        submit += ["--metadata-json", go_quoted(json.dumps(spec["metadata"], sort_keys=True, separators=(",", ":")))]
    submit += ["--submission-id", job_id]
    for flag, key in {"cpus": "entrypointNumCpus", "gpus": "entrypointNumGpus"}.items():
        if spec.get(key, 0) > 0:
            submit += [f"--entrypoint-num-{flag}", f"{spec[key]:f}"]
    if spec.get("entrypointResources"):
        submit += ["--entrypoint-resources", go_quoted(spec["entrypointResources"])]
    submit += ["--", spec["entrypoint"].strip(), ";"]
    follow = ["ray", "job", "logs", "--address", address, "--follow", job_id]
    line = " ".join([*wait, "if", "!", *submitted, ";", "then", *submit, "fi", ";", *follow])
    return ["/bin/bash", "-ce", "--", line]


def go_quoted(text: str) -> str:
    """Quote printable text like Go's strconv.Quote: only double quotes and backslashes are escaped.

    Dollar signs and backticks stay as they are, which is why the shell acts on them.
    """
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    escaped = escaped.replace("\n", "\\n").replace("\t", "\\t")
    assert not re.search(r"[\x00-\x1f]", escaped)
    return f'"{escaped}"'
