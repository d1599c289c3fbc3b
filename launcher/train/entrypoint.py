"""What Ray Train is given to run in its workers. Any process: its controller imports this and need not import torch."""

from contextlib import suppress
from threading import Thread

import ray.train


def train_loop_per_worker(config: dict[str, object]) -> None:
    """Run `run_worker`, imported only here; Ray prepares the `stream` of the config meanwhile."""
    stream = config.get("stream")
    if isinstance(stream, str):
        Thread(target=_ask_for, args=(stream,), name="stream", daemon=True).start()
    from launcher.train.worker import run_worker

    run_worker(config)


def _ask_for(stream: str) -> None:
    with suppress(Exception):  # it is asked for again where it is read, which tells
        ray.train.get_dataset_shard(stream)
