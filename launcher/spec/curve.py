"""Values of a job that the loss curve depends on: their hash, and their differences. Runs anywhere."""

import hashlib
import json

from launcher.spec.job import JobSpec

_CURVE_SECTIONS = {"seed", "task", "model", "data", "train"}
# Keys of these sections that do not change the curve. The hash is in every checkpoint: a change here makes old
# checkpoints unusable.
_EXCLUDED = {
    "train": {"log_every_steps", "sync_check_steps"},
    "data": {"leakage", "cache", "files_below"},
    "task": {"packing"},
}


def spec_hash(job: JobSpec) -> str:
    """Return the SHA-256 (hex) of everything the loss curve depends on. Equal hashes mean equal curves."""
    # One fixed form: the hash is compared with those in old checkpoints, so neither order nor spaces may vary.
    canonical = json.dumps(_dump_curve(job), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def spec_difference(old: JobSpec, new: JobSpec) -> list[str]:
    """Return the keys in which two jobs' loss curves differ, as `train.batch_size: 32 -> 64`; [] if there are none."""
    before = curve_values(old)
    after = curve_values(new)
    keys = [*before, *(key for key in after if key not in before)]
    changed = [key for key in keys if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}" for key in changed]


def curve_values(job: JobSpec) -> dict[str, str]:
    """Return everything the loss curve depends on, as dotted keys with their values as JSON."""
    return _flatten(_dump_curve(job))


def job_values(job: JobSpec) -> dict[str, str]:
    """Return all keys of a job except `name` and `output`, in the form of `curve_values`."""
    return _flatten(job.model_dump(mode="json", exclude={"name", "output"}))


def _dump_curve(job: JobSpec) -> dict[str, object]:
    return job.model_dump(mode="json", include=_CURVE_SECTIONS, exclude=_EXCLUDED)


def _flatten(values: dict[str, object], prefix: str = "") -> dict[str, str]:
    """Flatten nested sections to dotted keys with their values as JSON. A list is one value."""
    leaves: dict[str, str] = {}
    for key, value in values.items():
        # An empty mapping is a value too: flattened, its key would vanish.
        if isinstance(value, dict) and value:
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return leaves
