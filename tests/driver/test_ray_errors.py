"""Errors that Ray wraps: the launcher's own come back, whole or from their text."""

from launcher.driver.ray_errors import unwrap_ray_error
from launcher.errors import DataError, SpecError


def test_errors_that_are_left_as_text_come_back() -> None:
    error = unwrap_ray_error(RuntimeError("Traceback ...\nlauncher.errors.DataError: a.csv: row 3: label is null"))
    assert isinstance(error, DataError) and error.message == "a.csv: row 3: label is null"
    spec = unwrap_ray_error(RuntimeError("launcher.errors.SpecError: seed is x, which is not a number"))
    assert isinstance(spec, SpecError) and spec.problems == ("seed is x, which is not a number",)
