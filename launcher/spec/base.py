"""Base class of every section of the job file. Runs anywhere; read `spec/job.py` next."""

from pydantic import BaseModel, ConfigDict

KeyPath = tuple[str | int, ...]
"""Keys and list indices that lead from the top of the job file to one value."""

PATTERN_WORDS = "patternErrorMessage"
"""JSON Schema key that explains a pattern in words. Editors show it, and so do our error messages."""


class Section(BaseModel):
    """One frozen section of a job file. Unknown keys are errors, and field docstrings become schema descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        # pydantic reads the docstrings from the source file: without sources the schema loses its descriptions
        # silently.
        use_attribute_docstrings=True,
        # pydantic does not check defaults by itself: a wrong one would first show in a run.
        validate_default=True,
        # YAML has .nan and .inf, and no key of a job means anything with them.
        allow_inf_nan=False,
    )
