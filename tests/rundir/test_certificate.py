"""What a certificate hashes and says."""

import hashlib
import math
import struct
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.rundir.certificate import (
    CERTIFICATE,
    Certificate,
    RunHashes,
    ShapeProof,
    find_certificate,
    hash_losses,
    list_weights,
)
from launcher.rundir.directory import RunDir
from tests.support.records import shape_proof, step_record

_HASHES = RunHashes(losses="1", evaluations="2", scores={}, weights={})
_CLOSE = {"inexact": ("ZeRO-2 adds gradients in an order of its own",), "largest_difference": 2e-8}


def _certify(*shapes: ShapeProof, hashes: RunHashes = _HASHES) -> Certificate:
    return Certificate(
        steps=3, virtual_ranks=8, hashes=hashes, data_fingerprint="d", spec_hash="s", versions={}, hardware="",
        threads=1, tolerance=1e-5, shapes=shapes,
    ).seal()  # fmt: skip


def test_the_hash_of_the_curve_is_over_steps_and_the_bytes_of_losses(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    losses = [0.1, math.nan, -math.inf]
    run.append_metrics([step_record(step, loss) for step, loss in enumerate(losses, 1)])
    content = b"".join(struct.pack("<qd", step, loss) for step, loss in enumerate(losses, 1))
    assert hash_losses(run) == hashlib.sha256(content).hexdigest()


def test_weights_are_the_safetensors_of_model_and_adapter(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    assert list_weights(run) == ()
    for name in ("model/a.safetensors", "model/config.json", "adapter/adapter_model.safetensors", "other.safetensors"):
        run.write_bytes(name, b"x")
    assert list_weights(run) == ("model/a.safetensors", "adapter/adapter_model.safetensors")


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        ([shape_proof(w, z) for w in (1, 2, 4) for z in (0, 1)],
         "Proven: the same bits on 1, 2 and 4 workers, ZeRO 0 and 1"),
        ([shape_proof(1, 0)], "Proven: the same bits on 1 worker, ZeRO 0"),
        ([shape_proof(1, 0), shape_proof(2, 0), shape_proof(2, 1), shape_proof(3, 2, **_CLOSE)],
         "Proven: the same bits on 1 worker, ZeRO 0, and on 2 workers, ZeRO 0 and 1; the same curve within 1e-05 on 3 "
         "workers, ZeRO 2"),
        ([shape_proof(1, 0), shape_proof(2, 0, failure="loss at step 1")],
         "Proven: the same bits on 1 worker, ZeRO 0; another curve on 2 workers, ZeRO 0"),
        ([shape_proof(2, 0, failure="loss at step 1")], "Not proven: another curve on 2 workers, ZeRO 0"),
    ],
)  # fmt: skip
def test_the_sentence_names_what_is_proven(shapes: list[ShapeProof], sentence: str) -> None:
    assert _certify(*shapes).sentence == f"{sentence} (certificate.json)"


def test_only_a_whole_certificate_without_failures_is_a_proof() -> None:
    certificate = _certify(shape_proof(1, 0))
    assert certificate.is_proven
    assert not _certify().is_proven
    assert not _certify(shape_proof(1, 0), shape_proof(2, 0, failure="weights")).is_proven
    edited = certificate.model_copy(update={"steps": 4})
    assert not edited.is_intact and not edited.is_proven
    assert edited.sentence == "Not proven: certificate.json was changed after it was written"


def test_shapes_of_an_earlier_proof_of_the_same_results_stay() -> None:
    old = _certify(shape_proof(2, 0), shape_proof(2, 1))
    new = _certify(shape_proof(1, 0), shape_proof(2, 0, failure="weights"))
    both = new.with_shapes_of(old)
    assert both.is_intact
    assert [(shape.workers, shape.zero, shape.failure) for shape in both.shapes] == [
        (1, 0, ""), (2, 0, "weights"), (2, 1, ""),
    ]  # fmt: skip
    other = _certify(shape_proof(2, 1), hashes=_HASHES.model_copy(update={"losses": "9"}))
    edited = old.model_copy(update={"steps": 9})
    assert new.with_shapes_of(other) == new and new.with_shapes_of(edited) == new


def test_a_damaged_certificate_counts_as_none_and_that_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    assert find_certificate(run) is None
    run.write_record(CERTIFICATE, _certify(shape_proof(1, 0)))
    whole = run.read_bytes(CERTIFICATE)
    run.write_bytes(CERTIFICATE, whole[:40])
    assert find_certificate(run) is None
    run.write_bytes(CERTIFICATE, whole.replace(b'"steps"', b'"later": 1, "steps"'))
    with pytest.raises(RunError, match="holds later, which this version of the launcher does not know"):
        find_certificate(run)
