"""Manifests: kubectl (YAML 1.1) and we (1.2) read the same values back; each run has a name that KubeRay takes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from launcher.errors import ClusterError
from launcher.spec.job import JobSpec
from launcher.submit.kubernetes.manifest import (
    config_name,
    dump_manifests,
    is_manifest,
    job_name,
    read_manifests,
)

_TRICKY = [
    "yes", "No", "on", "~", "null", "", " ", "1", "0x1f", "1e5", "1_000", "1:30", "=", "<<", "2024-01-01", "- a",
    "a: b", "a #b", "#", "@x", "`x`", "*x", "&x", "!x", "%x", "{}", "[]", "'", '"', "|", ">", "a\n", "\na",
    "a\n\n  b\n", "\t",
    "registry:5000/x", "a:", "é", "0", "true", ".5", "-1", "+1", "/", "a b", " a", "a ", "Infinity", ".inf", "NaN",
]  # fmt: skip
TEXTS = st.sampled_from(_TRICKY) | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20)
VALUES = st.recursive(
    TEXTS | st.integers(-(10**6), 10**6) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(value=VALUES)
def test_both_dialects_read_it_back(value: Any) -> None:
    text = dump_manifests([{"kind": "X", "v": value}])
    assert yaml.safe_load(text) == {"kind": "X", "v": value}
    assert YAML(typ="safe", pure=True).load(text) == {"kind": "X", "v": value}


@pytest.mark.parametrize("text", _TRICKY)
def test_tricky_texts_stay_texts(text: str) -> None:
    dumped = dump_manifests([{"v": text, text: "k"}])
    assert yaml.safe_load(dumped) == {"v": text, text: "k"}


def test_documents_and_comment() -> None:
    text = dump_manifests([{"a": 1}, {"b": ["x", {"c": "no"}]}], "Made by x.\n\nSee y.")
    assert text == '# Made by x.\n#\n# See y.\na: 1\n---\nb:\n- x\n- c: "no"\n'


def test_files_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.yml").write_text(
        "apiVersion: v1\nkind: B\nflag: yes\nrate: 5e-5\n---\n# nothing\n---\napiVersion: v1\nkind: C\n"
    )
    (tmp_path / "a.yaml").write_text("apiVersion: v1\nkind: A\n")
    manifests = read_manifests(tmp_path)
    assert [text_value["kind"] for text_value in manifests] == ["A", "B", "C"]
    assert manifests[1]["flag"] is True and manifests[1]["rate"] == 5e-5  # as kubectl reads them


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [", "x.yaml: not valid YAML ("),
        ("- 1\n", "x.yaml: document 1 is not a Kubernetes object (it has no apiVersion and kind); remove it"),
        ("apiVersion: v1\nkind: A\n---\nkind: B\n", "x.yaml: document 2 is not a Kubernetes object"),
        (b"\xff", "x.yaml: cannot be read ("),
        (None, "x.yaml: cannot be read ("),
    ],
)
def test_what_is_no_manifest_is_told(tmp_path: Path, content: str | bytes | None, expected: str) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ClusterError) as caught:
        read_manifests(path)
    assert expected in caught.value.message and "\n" not in caught.value.message


def test_an_empty_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"this directory has no \.yaml file; write some with"):
        read_manifests(tmp_path)


def test_a_job_file_is_no_manifest(job_file: Path) -> None:
    assert not is_manifest(job_file) and is_manifest(job_file.parent)


RUNS = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


def _job(run: str, **kubernetes: str) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": run,
            "task": {"type": "t"},
            "model": {"name": "m"},
            "data": {"train": "d"},
            "cluster": {"kubernetes": {"image": "i", **kubernetes}},
        }
    )


@given(name=RUNS)
def test_kuberay_takes_every_name(name: str) -> None:
    name_of_job = job_name(_job(name))
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name_of_job) and len(name_of_job) <= 47
    assert len(config_name(name_of_job)) <= 63


@given(name=RUNS, other=RUNS)
def test_two_runs_have_two_names(name: str, other: str) -> None:
    assert name == other or job_name(_job(name)) != job_name(_job(other))


def test_a_name_stays_or_can_be_recognised() -> None:
    assert job_name(_job("bert-base")) == "bert-base"
    assert re.fullmatch(r"run-7b-sft-[0-9a-f]{6}", job_name(_job("7b-sft")))
    assert re.fullmatch(r"bert-large-v2-[0-9a-f]{6}", job_name(_job("Bert_large.v2")))
    assert re.fullmatch(r"a{40}-[0-9a-f]{6}", job_name(_job("a" * 63)))
    assert job_name(_job("7b-sft", name="seven")) == "seven"
