"""Placement groups of a killed controller are removed without Ray Train's own actor for that."""

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


def test_resources_of_a_killed_controller_are_free_again(ray_cluster: None) -> None:
    all_cpus = ray.cluster_resources()["CPU"]
    controller = _Controller.remote()
    ray.get(controller.reserve.remote(all_cpus))
    ray.kill(controller)
    following = placement_group([{"CPU": all_cpus}])
    assert not following.wait(1)  # Ray keeps the reservation until the driver ends
    _remove_placement_groups()  # `following` too: it belongs to the same driver
    following = placement_group([{"CPU": all_cpus}])
    assert following.wait(20)
    _remove_placement_groups()


def test_a_run_does_not_start_the_cleaning_actor(ray_cluster: None) -> None:
    def cleaners(kind: type[TorchTrainer]) -> int:
        trainer = kind(lambda: None, scaling_config=ScalingConfig(num_workers=1))
        callbacks = trainer._create_default_callbacks()  # type: ignore[attr-defined]
        return sum(isinstance(callback, PlacementGroupCleanerCallback) for callback in callbacks)

    assert (cleaners(TorchTrainer), cleaners(_DataParallelTrainer)) == (1, 0)
