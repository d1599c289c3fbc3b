"""Finds the cause of a worker group's failure inside Ray's exceptions. Runs on the head (the driver).

`worker_group.py` raises the result; `failure_policy.py` decides on it.
"""

import re
from collections.abc import Iterator, Mapping

from ray.exceptions import RayError

from launcher import errors
from launcher.errors import LauncherError, TrainingError, WorkerLostError

# Raised by wrong code, a user's task for example: a restart would raise the same.
_BUGS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    NameError,
    ImportError,
    AssertionError,
    NotImplementedError,
)
# Words of gloo and NCCL when another worker has exited.
_CONNECTION_LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process has terminated", "NCCL",
                    "Socket Timeout", "Timed out waiting")  # fmt: skip
_MAX_CHARACTERS = 300


def unwrap_ray_error(error: BaseException) -> LauncherError:
    """Return the launcher's own error inside Ray's exception; otherwise one that says what happened to which rank.

    Returns:
        `WorkerLostError` if a restart may succeed, `TrainingError` if the code is wrong.
    """
    causes = list(_causes(error))
    for cause in causes:
        # Outermost first: an error that was raised on purpose counts, not the one that it was raised from.
        if isinstance(cause, LauncherError):
            return cause
    # Ray pickles some exceptions as their text alone; it still holds the class and the message of ours.
    named = re.findall(r"launcher\.errors\.(\w+): (.+)", str(error))
    if named:
        # A text with several tracebacks ends with the error that was raised last.
        class_name, message = named[-1]
        kind = getattr(errors, class_name, None)
        if isinstance(kind, type) and issubclass(kind, LauncherError):
            # Of several problems of a job file only the first line is in the text.
            return kind((message,)) if issubclass(kind, errors.SpecError) else kind(message)
    failures = next((f for f in map(_worker_failures, causes) if f), {})
    lost = _describe_loss(failures)
    if lost is not None:
        return WorkerLostError(lost)
    # Breadth first, so the last one is wrapped the deepest.
    root = causes[-1]
    rank = next((f" of rank {rank}" for rank, failure in failures.items() if root in _causes(failure)), "")
    # Ray puts the traceback of the worker before the message: only the last line is of use here.
    lines = str(root if len(causes) > 1 else error).strip().splitlines() or [type(error).__name__]
    error_type = TrainingError if isinstance(root, _BUGS) else WorkerLostError
    return error_type(f"a worker{rank} stopped: {type(root).__name__}: {lines[-1][:_MAX_CHARACTERS]}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Iterate over an exception and everything wrapped in it, outermost first."""
    seen: list[BaseException] = []
    queue: list[object] = [error]
    while queue:
        current = queue.pop(0)
        if not isinstance(current, BaseException) or current in seen:
            continue
        seen.append(current)
        yield current
        queue += list(_worker_failures(current).values())
        # Attributes of Ray Train V2's exceptions (ray 2.60), then Python's own.
        names = ("cause", "controller_failure", "health_check_failure", "_base_exc", "__cause__", "__context__")
        queue += [getattr(current, name, None) for name in names]


def _worker_failures(error: BaseException) -> Mapping[int, BaseException]:
    """Return the failure of each rank that Ray Train knows of."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    return failures


def _describe_loss(failures: Mapping[int, BaseException]) -> str | None:
    """Return a sentence on the worker that was lost; None if none was."""
    # First look for a rank that died: that explains the broken connections of all others.
    for rank, failure in failures.items():
        text = " ".join(str(failure).split())
        # By name: the class is internal to Ray Train (ray 2.60, WorkerHealthCheckTimeoutError).
        is_timeout = "Timeout" in type(failure).__name__
        is_ray_error = any(isinstance(cause, RayError) for cause in _causes(failure))
        if not is_timeout and not (is_ray_error and re.search("died|unavailable", text)):
            continue
        if is_timeout:
            return f"the worker of rank {rank} was lost (it did not answer)"
        if "node has died" in text:
            return f"the worker of rank {rank} was lost (its node died)"
        # Ray's memory monitor kills workers; its message names itself and the memory.
        is_oom = "monitor" in text and "memory" in text and ("OOM" in text or "OutOfMemory" in type(failure).__name__)
        hint = ", perhaps for lack of memory" if is_oom else ""
        return f"the worker of rank {rank} was lost (its process died{hint})"
    for rank, failure in failures.items():
        if any(words in str(failure) for words in _CONNECTION_LOST):
            return f"a worker was lost (rank {rank} lost its connection to another one)"
    return None
