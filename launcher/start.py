"""What Ray Train is given to run in its workers. Any process: its controller imports this and need not import torch."""


def work(config: dict[str, object]) -> None:
    """`launcher.worker.work`, imported where it runs."""
    from launcher.worker import work

    work(config)
