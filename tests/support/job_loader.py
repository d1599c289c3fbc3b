"""Job files written to the working directory and loaded from there."""

from pathlib import Path

import pytest

from launcher.errors import SpecError
from launcher.spec.job import JobSpec
from launcher.spec.loader import TaskParamsLookup, load_job


class Load:
    """Loader of job files, each written to job.yaml in the working directory.

    Args:
        params_of: Lookup of a task's parameters; None does not check them.
    """

    def __init__(self, params_of: TaskParamsLookup | None = None) -> None:
        self._params_of = params_of

    def job(self, text: str, *overrides: str) -> JobSpec:
        Path("job.yaml").write_text(text, encoding="utf-8")
        return load_job("job.yaml", overrides, self._params_of)

    def problems(self, text: str, *overrides: str) -> list[str]:
        with pytest.raises(SpecError) as caught:
            self.job(text, *overrides)
        return list(caught.value.problems)
