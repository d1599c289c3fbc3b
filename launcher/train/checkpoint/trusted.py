"""Checkpoints hold numbers and a few of DeepSpeed's classes; anything else could run code. Train workers.

A run directory may be another person's, or writable by others. torch reads its files through a pickle machine that
knows tensors, plain values and the classes named here, also where DeepSpeed asks it to read whatever there is.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from launcher.errors import RunError

_REMEDY = "delete this checkpoint and those after it, or restore the run from a copy that nobody else could write to"
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def check_file_names(file: Path, shown: str) -> None:
    """Refuse a file of a checkpoint that holds more than a training has saved; only its pickle is looked at.

    Args:
        file: Local path.
        shown: Path or URI for the message.

    Raises:
        RunError: It does.
    """
    with _safe():
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except (ValueError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise RunError(f"{shown}: is no file that torch has saved for a training; {_REMEDY}") from error
    if foreign:
        raise RunError(
            f"{shown}: holds {', '.join(sorted(foreign)[:3])}, which no training saves and could run code when it is "
            f"loaded; {_REMEDY}"
        )


@contextmanager
def weights_only_loads(shown: str) -> Iterator[None]:
    """Let torch read nothing but numbers and DeepSpeed's classes inside the block, whatever its callers ask for.

    Args:
        shown: Path or URI of the checkpoint, for the message.

    Raises:
        RunError: A file that is read holds something else.
    """
    # DeepSpeed (0.19.8) passes weights_only=False in some twenty places; torch lets this variable overrule them.
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with _safe():
            yield
    except pickle.UnpicklingError as error:
        raise RunError(f"{shown}: a file of it holds what no training saves ({_first(error)}); {_REMEDY}") from error
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _first(error: pickle.UnpicklingError) -> str:
    found = re.search(r"(?:GLOBAL|global:|class) ([A-Za-z_][\w.]*\.\w+)", str(error))
    return found.group(1) if found else "no pickle of numbers"


def _safe() -> "torch.serialization.safe_globals":
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
