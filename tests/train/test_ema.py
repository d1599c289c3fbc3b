"""The moving average of the weights: its value, no effect on training, and resume on any cluster and ZeRO stage."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.driver.prepare import PreparedJob
from launcher.train.ema import EMA
from launcher.train.sync_check import digest_weights
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here, with_job

_STEPS, _DECAY = 8, 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation_changes_neither_average_nor_weights(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.arange(100).to(dtype))
    ema = EMA(0.99, [("weight", weight)], sharded=False)
    for step in range(3):
        weight.data += 0.3
        ema.update(step)
    average, before = ema._average[0].clone(), weight.data.clone()
    with ema.swapped_in(lambda: None):
        assert torch.equal(weight.data, average.to(dtype)) and not torch.equal(weight.data, before)
    assert torch.equal(ema._average[0], average) and torch.equal(weight.data, before)


def _train_all(jobs: list[tuple[PreparedJob, int | None]]) -> list[Any]:
    """Train each job to completion or for some steps; return this attempt's losses and all logged evaluations."""
    results = []
    for job, steps in jobs:
        numbers = itertools.count(1)
        lines = train_here(job, leave=lambda: next(numbers) == steps)["lines"]  # noqa: B023  # called at once
        evaluations = [(line.step, line.loss) for line in job.run.read_metrics() if line.kind == "evaluation"]
        results.append({"steps": lines, "evaluations": evaluations})
    return results


def _difference_from_reference(job: PreparedJob) -> float:
    """Return the largest difference of the average from one in double precision."""
    reference: dict[str, Any] = {}
    engines: list[Any] = []

    def follow(engine: Any) -> None:
        engines.append(engine)
        reference.update((name, weight.detach().double()) for name, weight in engine.model.named_parameters())
        inner = engine.step

        def step(rate: float, number: int) -> None:
            inner(rate, number)
            decay = min(_DECAY, (2 + number) / (11 + number))
            for name, weight in engine.model.named_parameters():
                reference[name] = decay * reference[name] + (1 - decay) * weight.detach().double()

        engine.step = step

    train_here(job, on_engine=follow)
    average = engines[0].ema.full_weights()
    assert list(average) == list(reference)
    return max(float((average[name] - reference[name]).abs().max()) for name in average)


@pytest.fixture(scope="module")
def job(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedJob:
    folder = tmp_path_factory.mktemp("average")
    data = write_splits(folder / "data", train=88, validation=40, row_group=37)
    return prepared_job(
        tiny_bert, data, folder, train={"max_steps": _STEPS, "learning_rate": 5e-3, "ema": _DECAY},
        evaluation={"every_steps": 2}, checkpoint={"every_steps": 3, "every_minutes": None}, parallel={"zero": 0},
        cluster={"workers": 1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(job: PreparedJob) -> Any:
    """Return the losses of one worker without ZeRO."""
    return run_group(1, _train_all, [(with_job(job, name="alone"), None)])[0]


def test_average_is_that_of_the_formula(job: PreparedJob) -> None:
    assert run_group(1, _difference_from_reference, with_job(job, name="reference")) < 1e-6


def test_average_does_not_change_training(job: PreparedJob, alone: Any) -> None:
    # In half precision as well, where weights are swapped through another dtype.
    plain, half = {"ema": None}, {"precision": "bf16"}
    jobs = [with_job(job, name="plain", train=plain)]
    for zero in (0, 1, 3):
        for name, train in (("with", half), ("without", half | plain)):
            jobs.append(with_job(job, name=f"{name}-{zero}", train=train, parallel={"zero": zero}))
    bare, *halves = run_group(1, _train_all, [(job, None) for job in jobs])
    assert bare["steps"] == alone["steps"]
    pairs = zip(bare["evaluations"], alone["evaluations"], strict=True)
    assert min(abs(loss - averaged) for (_, loss), (_, averaged) in pairs) > 1e-4
    for averaged, without in zip(halves[::2], halves[1::2], strict=True):
        assert averaged["steps"] == without["steps"]
        assert averaged["evaluations"] != without["evaluations"]


@pytest.mark.parametrize("stages", [(0, 2, 3), pytest.param((1,), marks=pytest.mark.long)])  # 1 shards as 2 does
def test_average_does_not_depend_on_the_cluster(job: PreparedJob, alone: Any, stages: tuple[int, ...]) -> None:
    # Three workers stop after 3 and 6 steps, and one finishes the run: the same evaluations as uninterrupted.

    def cut(run: str, zero: int, workers: int) -> PreparedJob:
        parallel = {"zero": zero, "micro_batch": 3 if workers == 3 else None}
        return with_job(job, name=f"{run}-{zero}", parallel=parallel, cluster={"workers": workers})

    jobs = [(cut("whole", zero, 3), None) for zero in stages]
    jobs += [(cut("part", zero, 3), 3) for _ in range(2) for zero in stages]
    results = run_group(3, _train_all, jobs)
    ends = run_group(1, _train_all, [(cut("part", zero, 1), None) for zero in stages])
    for zero, whole, second, end in zip(stages, results, results[2 * len(stages) :], ends, strict=False):
        assert [step for step, _ in second["evaluations"]] == [2, 4, 6]
        assert [step for step, _ in end["evaluations"]] == [2, 4, 6, 8]
        for result, expected, tolerance in ((whole, alone, 1e-5), (end, alone, 1e-5), (second, whole, 1e-7)):
            for (step, loss), (_, near) in zip(result["evaluations"], expected["evaluations"], strict=False):
                assert abs(loss - near) < tolerance, f"ZeRO {zero}, step {step}"


def _export(job: PreparedJob) -> list[float]:
    """Return the difference of the exported weights from the average, and 1 if the weights are the same afterwards."""
    numbers: list[float] = []

    def check_at_close(engine: Any) -> None:
        inner = engine.close

        def close() -> None:
            before = digest_weights(engine)
            state = engine.full_state_dict()
            average = engine.ema.full_weights()
            if state is not None:
                numbers.append(max(float((state[name] - value).abs().max()) for name, value in average.items()))
            numbers.append(float(digest_weights(engine) == before))
            inner()

        engine.close = close

    train_here(job, on_engine=check_at_close)
    return numbers


@pytest.mark.parametrize("zero", [0, 2])
def test_average_is_exported(job: PreparedJob, zero: int) -> None:
    exported = with_job(job, name=f"exported-{zero}", parallel={"zero": zero}, cluster={"workers": 3})
    assert run_group(3, _export, exported) == [0.0, 1.0]


def test_checkpoint_without_an_average_starts_from_its_weights() -> None:
    average = EMA(0.5, [("w", torch.nn.Parameter(torch.ones(3)))], sharded=False)
    average._average[0].zero_()
    average.load(Path("nowhere"))
    assert average._average[0].tolist() == [1.0, 1.0, 1.0]
