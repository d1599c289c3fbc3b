"""What a killed controller had reserved is free again for the next start, without Ray Train's own actor for that."""

import pytest
import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.placement_group import placement_group

from launcher.driver.worker_group import _DataParallelTrainer, _remove_placement_groups

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class _Controller:
    def reserve(self, cpus: float) -> None:
        ray.get(placement_group([{"CPU": cpus}]).ready())


def test_it_is_free(ray_cluster: None) -> None:
    everything = ray.cluster_resources()["CPU"]
    controller = _Controller.remote()
    ray.get(controller.reserve.remote(everything))
    ray.kill(controller)
    following = placement_group([{"CPU": everything}])
    assert not following.wait(1)  # Ray keeps it until the driver ends
    _remove_placement_groups()  # this one as well, as it is of the same driver
    following = placement_group([{"CPU": everything}])
    assert following.wait(20)
    _remove_placement_groups()


def test_a_run_does_not_start_that_actor(ray_cluster: None) -> None:
    def cleaners(kind: type[TorchTrainer]) -> int:
        trainer = kind(lambda: None, scaling_config=ScalingConfig(num_workers=1))
        callbacks = trainer._create_default_callbacks()  # type: ignore[attr-defined]
        return sum(isinstance(callback, PlacementGroupCleanerCallback) for callback in callbacks)

    assert (cleaners(TorchTrainer), cleaners(_DataParallelTrainer)) == (1, 0)
