"""Keys in URIs are neither shown nor sent (`launcher/formatting.py`)."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.options import MaskedConsole
from launcher.cli.remote_command import words_of
from launcher.errors import RunError, SpecError, UserError
from launcher.formatting import find_secret, mask_secrets
from launcher.rundir.directory import RunDir
from launcher.submit.kubernetes.job_file import misplaced
from launcher.submit.package import make_package
from tests.support.jobs import make_job

_S3CR3TS = [
    ("s3://KEY:S3CR3T@bucket/x", "s3://bucket/x", "an account"),
    ("s3://KEY@bucket/x", "s3://bucket/x", "an account"),
    ("postgresql://mlflow:S3CR3T@db:5432/x", "postgresql://db:5432/x", "an account"),
    ("https://h/x?X-Amz-Signature=S3CR3T&a=1", "https://h/x?X-Amz-Signature=***&a=1", "a key (X-Amz-Signature)"),
    ("abfs://c@a/x?sv=1&sig=S3CR3T", "abfs://c@a/x?sv=1&sig=***", "a key (sig)"),
    ("gs://b/x?access_token=S3CR3T", "gs://b/x?access_token=***", "a key (access_token)"),
    ("s3://b/x?access_key=KEY&secret_key=S3CR3T", "s3://b/x?access_key=***&secret_key=***", "a key (access_key)"),
]


@pytest.mark.parametrize("uri, shown, what", _S3CR3TS)
def test_a_secret_is_found_and_masked(uri: str, shown: str, what: str) -> None:
    assert (mask_secrets(uri), find_secret(uri)) == (shown, what)
    assert mask_secrets(f"'{uri}': not there; {uri} ...") == f"'{shown}': not there; {shown} ..."
    assert mask_secrets(shown) == shown and find_secret(shown) is None


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/x?endpoint_override=http://h:9000&region=x", "abfs://container@account/x", "hdfs://user@host:8020/x",
     "a@b.c", "ray://h:1", "http://h:5000", "file:///a:b@c", "s3://bucket/a@b/c:d@e", "hub:org/name"],
)  # fmt: skip
def test_what_is_none_stays(text: str) -> None:
    assert mask_secrets(text) == text and find_secret(text) is None


@pytest.mark.parametrize("uri, shown, _", _S3CR3TS)
def test_no_error_and_no_line_tells_it(uri: str, shown: str, _: str) -> None:
    error = RunError(f"{uri}: not there")
    assert str(error) == error.message == str(pickle.loads(pickle.dumps(error))) == f"{shown}: not there"
    assert SpecError((f"{uri}: no",)).problems == (f"{shown}: no",)
    assert str(RunDir(uri)) == shown and "S3CR3T" not in repr(RunDir(uri))
    console = MaskedConsole(file=io.StringIO(), width=200)
    console.print(f"report    : {uri}", highlight=False, soft_wrap=True)
    assert console.file.getvalue() == f"report    : {shown}\n"  # type: ignore[attr-defined]


_PLACES: list[tuple[str, dict[str, Any]]] = [
    ("output.storage", {"output": {"storage": "s3://KEY:S3CR3T@b/runs"}}),
    ("data.validation[0]", {"data": {"validation": ["s3://KEY:S3CR3T@b/v"]}}),
    ("model.name", {"model": {"name": "s3://b/m?secret_key=S3CR3T"}}),
    ("logging.mlflow", {"logging": {"mlflow": "https://u:S3CR3T@mlflow"}}),
    ("cluster.prepare", {"cluster": {"prepare": "curl 'https://h/x?sig=S3CR3T'"}}),
]


@pytest.mark.parametrize("key, sections", _PLACES)
def test_a_job_that_travels_holds_none(key: str, sections: dict[str, Any], tmp_path: Path) -> None:
    kubernetes = {"image": "x", "volumes": {}}
    job = make_job(Path("m"), {"train": ["s3://b/t"], **sections.pop("data", {})}, Path("s3://b/runs"),
                   **{"output": {"storage": "s3://b/runs"}, "model": {"name": "bert"}, **sections})  # fmt: skip
    with pytest.raises(SpecError) as refused:
        make_package(job, None)
    (said,) = [problem for problem in refused.value.problems if problem.startswith(key)]
    assert "S3CR3T" not in said and "for everyone who can see the cluster" in said and "a role" in said
    cluster = {**job.cluster.model_dump(), "kubernetes": kubernetes}
    pods = make_job(Path("m"), {"train": []} | job.data.model_dump(), Path("x"),
                    **{**job.model_dump(exclude={"data", "cluster"}), "cluster": cluster})  # fmt: skip
    assert pods.cluster.kubernetes is not None
    found = [place.sentence for place in misplaced(pods, pods.cluster.kubernetes) if "an account" in place.sentence
             or "a key" in place.sentence]  # fmt: skip
    assert len(found) == 1 and "env_from_secret" in found[0] and "S3CR3T" not in found[0]


def test_the_words_of_a_command_hold_none() -> None:
    with pytest.raises(UserError, match="--command: s3://b/x holds an account, which is shown"):
        words_of("evaluate --data s3://KEY:S3CR3T@b/x")


def test_a_manifest_that_was_edited_holds_none() -> None:
    from launcher.submit.kubernetes.rules.check import check

    text = yaml.safe_dump({"output": {"storage": "s3://KEY:S3CR3T@b/runs"}})
    manifest: dict[str, Any] = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"job.yaml": text},
    }  # fmt: skip
    with pytest.raises(SpecError, match=r"ConfigMap x: data\.job\.yaml holds an account"):
        check([manifest])
