"""What `prepare` fills in where the job file says `auto`."""

from pathlib import Path
from typing import Any

import pytest

from launcher.spec.curve import spec_hash
from launcher.spec.job import TaskSpec
from tests.support.jobs import prepared_job, write_splits


@pytest.mark.parametrize(("sections", "packs"), [({}, False), ({"data": {"group_by_length": False}}, True)])
def test_packing_auto_packs_on_a_cpu_only_without_length_grouping(
    sections: dict[str, Any], packs: bool, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    data = write_splits(tmp_path / "data", train=20, task="causal-lm")
    merged = {**data, **sections.get("data", {})}
    job = prepared_job(tiny_models["causal-lm"], merged, tmp_path, task={"type": "causal-lm", "max_length": 48}).job
    assert job.task.parameters()["packing"] is packs
    assert spec_hash(job) == spec_hash(
        job.model_copy(update={"task": TaskSpec.model_validate({**job.task.model_dump(), "packing": not packs})})
    )
