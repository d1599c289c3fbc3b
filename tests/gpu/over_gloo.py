"""The launcher's command with gloo between ranks that train on a GPU: NCCL refuses two ranks on one device."""

import ray.train.torch

_config = ray.train.torch.TorchConfig


def _over_gloo(*args: object, **settings: object) -> object:
    return _config(*args, **{**settings, "backend": "gloo"})


# Before the launcher imports it by name; Ray Train itself holds the class elsewhere.
ray.train.torch.TorchConfig = _over_gloo  # type: ignore[assignment, misc]  # called as the class is

from launcher.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
