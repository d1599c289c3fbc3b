"""Checks of a run directory against its certificate, without training: `launcher verify`. Runs anywhere."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from launcher.errors import RunError, StorageUnavailableError
from launcher.rundir import certificate as proof
from launcher.rundir.certificate import CERTIFICATE, Certificate
from launcher.rundir.directory import RunDir, read_job
from launcher.rundir.plan import Plan
from launcher.spec.curve import spec_hash
from launcher.spec.scored import EVALUATION_SPLITS


@dataclass(frozen=True)
class Check:
    """One comparison of a run directory with its certificate.

    Args:
        subject: File, and what of it was compared.
        difference: Difference in words; "" if there is none.
    """

    subject: str
    difference: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: " + (f"differs, {self.difference}" if self.difference else "ok")


def read_certificate(run: RunDir) -> Certificate:
    """Return the certificate of a run.

    Raises:
        RunError: There is none, or it cannot be read.
    """
    certificate = run.find_record(CERTIFICATE, Certificate)
    if certificate is None:
        raise RunError(f"{run.uri}: has no {CERTIFICATE}; write one with `launcher replay {run.uri} --prove`")
    return certificate


def verify_files(run: RunDir, certificate: Certificate) -> Iterator[Check]:
    """Yield the result of each check that needs the run directory alone.

    Raises:
        StorageUnavailableError: The storage did not answer, so nothing is known.
    """
    hashes = certificate.hashes
    edited = "" if certificate.is_intact else "as it was changed after it was written"
    yield Check(f"{CERTIFICATE}, its own content", edited)
    for shape in certificate.shapes:
        yield Check(f"{CERTIFICATE}, proof on {shape.shape}", f"as recorded: {shape.failure}" if shape.failure else "")
    losses = f"metrics.jsonl, losses of {certificate.steps:,} steps"
    yield _compare(losses, hashes.losses, partial(proof.hash_losses, run))
    yield _compare("metrics.jsonl, evaluations", hashes.evaluations, partial(proof.hash_evaluations, run))
    # Security: the certificate of a copied run may name any path, so only files that the run itself lists are read.
    for split in EVALUATION_SPLITS:
        if split in hashes.scores:
            yield _compare(f"scores-{split}.json", hashes.scores[split], partial(proof.hash_scores, run, split))
    files = proof.list_weights(run)
    for path in dict.fromkeys((*hashes.weights, *files)):
        if path in hashes.weights and path in files:
            yield _compare(f"{path}, weights", hashes.weights[path], partial(proof.hash_file, run, path))
        else:
            where = CERTIFICATE if path in files else "the run directory"
            yield Check(f"{path}, weights", f"as {where} does not have this file")
    yield _compare("job.yaml, keys of the loss curve", certificate.spec_hash, lambda: spec_hash(read_job(run)))
    fingerprint = certificate.data_fingerprint
    yield _compare("plan.json, data fingerprint", fingerprint, lambda: run.read_record("plan.json", Plan).fingerprint)


def compare_fingerprint(certificate: Certificate, fingerprint: str) -> Check:
    """Compare the training data as they are now with those of the certificate."""
    return _compare("training data as they are now", certificate.data_fingerprint, lambda: fingerprint)


def _compare(subject: str, expected: str, compute: Callable[[], str]) -> Check:
    try:
        actual = compute()
    except StorageUnavailableError:
        raise
    except RunError as error:
        # A file that is missing or damaged is not what was certified.
        return Check(subject, f"as it cannot be read ({error.message})")
    return Check(subject, "" if actual == expected else f"{actual[:12]} and not {expected[:12]} as in {CERTIFICATE}")
