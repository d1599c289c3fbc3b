"""The function that Ray Train runs in every worker; its controller imports this too, and must not load torch."""

from contextlib import suppress
from threading import Thread

import ray.train

from launcher.train.worker_config import WorkerConfig


def train_loop_per_worker(config: dict[str, object]) -> None:
    """Train, evaluate or export on this rank.

    Args:
        config: Dictionary with `worker`, a `WorkerConfig`, and optionally `stream`, the name of the Ray Data stream.
    """
    stream = config.get("stream")
    if isinstance(stream, str):
        # Ray Data's processes start meanwhile: torch and the model classes take seconds to import.
        Thread(target=_request_stream, args=(stream,), name="stream", daemon=True).start()
    from launcher.train import worker

    worker_config = config["worker"]
    assert isinstance(worker_config, WorkerConfig)
    if worker_config.export_to is not None:
        worker.export_worker(worker_config, worker_config.export_to)
    elif worker_config.evaluate_only is not None:
        worker.evaluate_worker(worker_config, worker_config.evaluate_only)
    else:
        worker.train_worker(worker_config)


def _request_stream(name: str) -> None:
    # It is requested again where it is read, and raises there.
    with suppress(Exception):
        ray.train.get_dataset_shard(name)
