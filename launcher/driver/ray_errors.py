"""What ended the workers, out of all that Ray wraps around it, as one error of the launcher's own. Runs on the head."""

import re
from collections.abc import Iterator, Mapping

from ray.exceptions import RayError

from launcher import errors
from launcher.errors import LauncherError, TrainingError, WorkerLostError

# What code that is wrong raises, a user's task for one: it would raise it again.
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
# What gloo and NCCL say where another worker has gone.
_CUT = ("closed by peer", "reset by peer", "Broken pipe", "remote process has terminated", "NCCL", "Socket Timeout",
        "Timed out waiting")  # fmt: skip
_WORDS = 300


def unwrap_ray_error(error: BaseException) -> LauncherError:
    """The launcher's own error inside Ray's wrapping; else what happened to which rank.

    Returns:
        `WorkerLostError` where a new start may go on, `TrainingError` where the code is wrong.
    """
    seen = list(_causes(error))
    for cause in seen:
        if isinstance(cause, LauncherError):
            return cause
    # Ray pickles some errors as text alone; ours are still to be read off it.
    named = re.findall(r"launcher\.errors\.(\w+): (.+)", str(error))
    if named and issubclass(getattr(errors, named[-1][0], type(None)), LauncherError):
        return getattr(errors, named[-1][0])(named[-1][1])  # type: ignore[no-any-return]  # by name
    failures = next((found for cause in seen if (found := _failures(cause))), {})
    lost = _lost(failures)
    if lost is not None:
        return WorkerLostError(lost)
    root = seen[-1]
    rank = next((f" of rank {rank}" for rank, failure in failures.items() if root in _causes(failure)), "")
    last = str(root if len(seen) > 1 else error).strip().splitlines() or [type(error).__name__]
    kind = TrainingError if isinstance(root, _BUGS) else WorkerLostError
    return kind(f"a worker{rank} stopped: {type(root).__name__}: {last[-1][:_WORDS]}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that is wrapped in it, outermost first."""
    seen: list[BaseException] = []
    queue: list[object] = [error]
    while queue:
        current = queue.pop(0)
        if not isinstance(current, BaseException) or current in seen:
            continue
        seen.append(current)
        yield current
        queue += list(_failures(current).values())
        names = ("cause", "controller_failure", "health_check_failure", "_base_exc", "__cause__", "__context__")
        queue += [getattr(current, name, None) for name in names]


def _failures(error: BaseException) -> Mapping[int, BaseException]:
    """What happened by rank, as far as Ray Train knows."""
    found: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    return found


def _lost(failures: Mapping[int, BaseException]) -> str | None:
    """Who was lost, in a sentence; None where nobody was."""
    for rank, failure in failures.items():
        text = " ".join(str(failure).split())
        timeout = "Timeout" in type(failure).__name__
        if timeout or (
            any(isinstance(cause, RayError) for cause in _causes(failure)) and re.search("died|unavailable", text)
        ):
            memory = "memory" in text and ("OOM" in text or "OutOfMemory" in type(failure).__name__)
            how = "it did not answer" if timeout else "its node died" if "node has died" in text else "its process died"
            note = ", perhaps for want of memory" if memory and how == "its process died" and "monitor" in text else ""
            return f"the worker of rank {rank} was lost ({how}{note})"
    for rank, failure in failures.items():
        found = next((word for word in _CUT if word in str(failure)), None)
        if found is not None:
            return f"a worker was lost (rank {rank} has lost its connection to another one)"
    return None
