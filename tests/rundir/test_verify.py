"""A run directory against its certificate: untouched it agrees, and every change is found and named."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import CorruptRecordError, RunError
from launcher.rundir.certificate import CERTIFICATE, Certificate
from launcher.rundir.directory import RunDir
from launcher.rundir.verify import compare_fingerprint, read_certificate, verify_files
from tests.support.certified_run import certified_run
from tests.support.jobs import write_splits


@pytest.fixture
def run(tiny_bert: Path, tmp_path: Path) -> RunDir:
    return certified_run(tiny_bert, tmp_path / "runs", write_splits(tmp_path / "data", 40, test=20))


def _find_differences(run: RunDir) -> dict[str, str]:
    checks = verify_files(run, read_certificate(run))
    return {check.subject: check.difference for check in checks if check.difference}


def _replace(name: str, old: str, new: str) -> Callable[[RunDir], None]:
    def change(run: RunDir) -> None:
        text = run.read_bytes(name).decode()
        assert old in text
        run.write_bytes(name, text.replace(old, new, 1).encode())

    return change


def _flip_last_byte(run: RunDir) -> None:
    weights = bytearray(run.read_bytes("model/model.safetensors"))
    weights[-1] ^= 1
    run.write_bytes("model/model.safetensors", bytes(weights))


def test_an_untouched_run_agrees_in_every_part(run: RunDir) -> None:
    assert [str(check) for check in verify_files(run, read_certificate(run))] == [
        "certificate.json, its own content: ok",
        "certificate.json, proof on 1 worker, ZeRO 0: ok",
        "certificate.json, proof on 1 worker, ZeRO 1: ok",
        "certificate.json, proof on 2 workers, ZeRO 0: ok",
        "certificate.json, proof on 2 workers, ZeRO 1: ok",
        "metrics.jsonl, losses of 4 steps: ok",
        "metrics.jsonl, evaluations: ok",
        "scores-test.json: ok",
        "model/model.safetensors, weights: ok",
        "job.yaml, keys of the loss curve: ok",
        "plan.json, data fingerprint: ok",
    ]


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        pytest.param(_replace("metrics.jsonl", '"loss":0.5,', '"loss":0.49999999999999994,'),
                     "metrics.jsonl, losses of 4 steps", id="last-bit-of-a-loss"),
        pytest.param(_replace("metrics.jsonl", '"accuracy":0.75', '"accuracy":0.76'), "metrics.jsonl, evaluations",
                     id="metric-of-an-evaluation"),
        pytest.param(_replace("scores-test.json", "0.75", "0.76"), "scores-test.json", id="test-score"),
        pytest.param(_flip_last_byte, "model/model.safetensors, weights", id="bit-of-a-weight"),
        pytest.param(lambda run: run.delete("model/model.safetensors"), "model/model.safetensors, weights",
                     id="no-weights"),
        pytest.param(lambda run: run.write_bytes("model/extra.safetensors", b"x"), "model/extra.safetensors, weights",
                     id="more-weights"),
        pytest.param(_replace("job.yaml", "learning_rate: 0.001", "learning_rate: 0.002"),
                     "job.yaml, keys of the loss curve", id="learning-rate"),
        pytest.param(_replace("plan.json", '"fingerprint": "', '"fingerprint": "0'), "plan.json, data fingerprint",
                     id="fingerprint"),
        pytest.param(_replace(CERTIFICATE, '"workers": 2', '"workers": 4'), "certificate.json, its own content",
                     id="certificate"),
    ],
)  # fmt: skip
def test_a_changed_file_is_found(run: RunDir, change: Callable[[RunDir], None], subject: str) -> None:
    change(run)
    assert list(_find_differences(run)) == [subject]


def test_a_change_that_means_the_same_is_none(run: RunDir) -> None:
    # Another cluster and the seconds of an evaluation have no part in the curve.
    _replace("job.yaml", "workers: 2", "workers: 4")(run)
    _replace("metrics.jsonl", '"seconds":1.0', '"seconds":2.0')(run)
    run.write_bytes("model/README.md", b"my own card")
    assert _find_differences(run) == {}


def test_an_unreadable_file_differs_and_says_why(run: RunDir) -> None:
    run.write_bytes("metrics.jsonl", b'{"kind":"step"}\n')
    differences = _find_differences(run)
    assert list(differences) == ["metrics.jsonl, losses of 4 steps", "metrics.jsonl, evaluations"]
    assert "metrics.jsonl:1: not a record of a run" in differences["metrics.jsonl, evaluations"]


def test_a_failed_shape_is_a_difference(run: RunDir) -> None:
    certificate = read_certificate(run)
    failed = certificate.shapes[3].model_copy(update={"failure": "loss at step 3: 0.5 and 0.25"})
    shapes = (*certificate.shapes[:3], failed)
    run.write_record(CERTIFICATE, certificate.model_copy(update={"shapes": shapes}).seal())
    assert _find_differences(run) == {
        "certificate.json, proof on 2 workers, ZeRO 1": "as recorded: loss at step 3: 0.5 and 0.25"
    }


def test_a_path_outside_of_the_run_is_not_read(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    certificate = read_certificate(run)
    digest = hashlib.sha256(b"x").hexdigest()
    hashes = certificate.hashes.model_copy(update={"weights": {"../../secret": digest, **certificate.hashes.weights}})
    run.write_record(CERTIFICATE, certificate.model_copy(update={"hashes": hashes}).seal())
    assert _find_differences(run) == {"../../secret, weights": "as the run directory does not have this file"}


def test_other_training_data_are_found(run: RunDir) -> None:
    certificate = read_certificate(run)
    assert compare_fingerprint(certificate, certificate.data_fingerprint).difference == ""
    assert "0123 and not " in compare_fingerprint(certificate, "0123").difference


def test_a_run_without_a_readable_certificate_is_refused(run: RunDir) -> None:
    run.write_bytes(CERTIFICATE, b"{")
    with pytest.raises(
        CorruptRecordError, match=r"certificate\.json: not a valid Certificate \(.*\); write it again with"
    ):
        read_certificate(run)
    run.delete(CERTIFICATE)
    with pytest.raises(RunError, match=r"has no certificate\.json; write one with `launcher replay .* --prove`"):
        read_certificate(run)


def test_the_content_is_sealed_in_any_order_of_keys(run: RunDir) -> None:
    sealed = read_certificate(run).model_copy(update={"versions": {"torch": "2", "ray": "3"}}).seal()
    content = json.loads(sealed.model_dump_json(), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    run.write_bytes(CERTIFICATE, json.dumps(content).encode())
    assert run.read_record(CERTIFICATE, Certificate).is_intact
