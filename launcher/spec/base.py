"""The base of every section of the job file. Runs anywhere; read `spec/job.py` next."""

from pydantic import BaseModel, ConfigDict

PATTERN_WORDS = "patternErrorMessage"
"""Key of a field's JSON Schema that says a pattern in words; editors show it, and so do our messages."""


class Section(BaseModel):
    """One frozen section of a job file: unknown keys are refused, docstrings are descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )
