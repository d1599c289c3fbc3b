"""Secrets in URIs are neither shown nor sent with a job (`launcher/formatting.py`)."""

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.options import MaskedConsole
from launcher.cli.remote_command import parse_command
from launcher.errors import RunError, SpecError, UserError
from launcher.formatting import (
    clip,
    find_secret,
    format_duration,
    format_number,
    format_param,
    format_rounded,
    format_size,
    mask_secrets,
)
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
def test_other_uris_are_not_masked(text: str) -> None:
    assert mask_secrets(text) == text and find_secret(text) is None


@pytest.mark.parametrize("uri, shown, _", _S3CR3TS)
def test_errors_and_printed_lines_are_masked(uri: str, shown: str, _: str) -> None:
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
def test_a_job_with_a_secret_is_not_sent(key: str, sections: dict[str, Any], tmp_path: Path) -> None:
    kubernetes = {"image": "x", "volumes": {}}
    job = make_job(Path("m"), {"train": ["s3://b/t"], **sections.pop("data", {})}, Path("s3://b/runs"),
                   **{"output": {"storage": "s3://b/runs"}, "model": {"name": "bert"}, **sections})  # fmt: skip
    with pytest.raises(SpecError) as refused:
        make_package(job, None)
    (sentence,) = [problem for problem in refused.value.problems if problem.startswith(key)]
    assert "S3CR3T" not in sentence and "for everyone who can see the cluster" in sentence and "a role" in sentence
    cluster = {**job.cluster.model_dump(), "kubernetes": kubernetes}
    pods = make_job(Path("m"), {"train": []} | job.data.model_dump(), Path("x"),
                    **{**job.model_dump(exclude={"data", "cluster"}), "cluster": cluster})  # fmt: skip
    assert pods.cluster.kubernetes is not None
    sentences = [place.sentence for place in misplaced(pods, pods.cluster.kubernetes) if "an account" in place.sentence
             or "a key" in place.sentence]  # fmt: skip
    assert len(sentences) == 1 and "env_from_secret" in sentences[0] and "S3CR3T" not in sentences[0]


def test_a_remote_command_with_a_secret_is_refused() -> None:
    with pytest.raises(UserError, match="--command: s3://b/x holds an account, which is visible"):
        parse_command("evaluate --data s3://KEY:S3CR3T@b/x")


def test_an_edited_manifest_with_a_secret_is_refused() -> None:
    from launcher.submit.kubernetes.rules.check import check

    text = yaml.safe_dump({"output": {"storage": "s3://KEY:S3CR3T@b/runs"}})
    manifest: dict[str, Any] = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"job.yaml": text},
    }  # fmt: skip
    with pytest.raises(SpecError, match=r"ConfigMap x: data\.job\.yaml holds an account"):
        check([manifest])


_FORMATTED: list[tuple[Callable[[Any], str], list[tuple[float, str]]]] = [
    (format_number, [(0.78, "0.7800"), (1.0, "1.0000"), (0.0, "0.0000"), (-0.25, "-0.2500"), (2e-5, "2.000e-05"),
                     (12.3456, "12.35"), (12345.0, "12,345"), (math.nan, "not finite"), (math.inf, "not finite")]),
    (format_rounded, [(0.78351, "0.784"), (0.5, "0.500"), (0, "0"), (149.7, "150"), (12345.6, "12,346"),
                      (math.nan, "not finite")]),
    (format_duration, [(0.84, "0.8 s"), (59.6, "1 min 00 s"), (190, "3 min 10 s"), (3600 * 2 + 301, "2 h 05 min"),
                       (3600 * 75, "3 d 3 h")]),
    (format_size, [(0, "0 B"), (2048, "2 KiB"), (1_400_000_000, "1.3 GiB"), (80 * 2**30, "80.0 GiB")]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("format_value", "value", "text"),
    [(function, value, text) for function, cases in _FORMATTED for value, text in cases],
)
def test_a_number_is_formatted_for_a_reader(format_value: Callable[[Any], str], value: float, text: str) -> None:
    assert format_value(value) == text


def test_a_long_text_is_shortened() -> None:
    assert (clip("abcdef", 6), clip("abcdefg", 6)) == ("abcdef", "abcde…")
    assert [format_param(value, 8) for value in ("/a/b/model", 1.23456e-5, 7)] == ["…b/model", "1.23e-05", "7"]
