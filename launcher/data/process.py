"""Care of a process: that its imports are whole, and its collector idle where it finds nothing. Any process."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_done = False


@contextmanager
def whole_imports() -> Iterator[None]:
    """A task that is cancelled before its process has all its imports ends the process.

    Ray cancels what reads for train workers that were lost, by KeyboardInterrupt. Within an import that leaves
    half a module behind (transformers then raises ModuleNotFoundError for ever), and the next task would find it.
    """
    global _done
    try:
        yield
    except KeyboardInterrupt:
        if not _done:
            os._exit(1)
        raise
    _done = True


@contextmanager
def uncollected() -> Iterator[None]:
    """While many objects are made that all stay: Python's collector would walk through them again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
