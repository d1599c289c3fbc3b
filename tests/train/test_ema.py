"""The average of the weights: what it is, that training does not notice it, and that it survives stops and stages."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.driver.prepare import PreparedJob
from tests.support.jobs import prepared_job, write_splits
from tests.support.worker_group import run_group, train_here, with_job

_STEPS, _DECAY = 8, 0.6


def _ways(jobs: list[tuple[PreparedJob, int | None]]) -> list[Any]:
    """Each job's training losses of this attempt, to its end or for so many steps, and all evaluations its log has."""
    found = []
    for job, steps in jobs:
        numbers = itertools.count(1)
        lines = train_here(job, leave=lambda: next(numbers) == steps)["lines"]  # noqa: B023  # called at once
        found.append({"steps": lines, "evaluations": _evaluations(job)})
    return found


def _evaluations(job: PreparedJob) -> list[tuple[int, float]]:
    return [(line.step, line.loss) for line in job.run.read_metrics() if line.kind == "evaluation"]


def _by_hand(job: PreparedJob) -> float:
    """Largest difference of the average from one that is kept in double precision beside it."""
    kept: dict[str, Any] = {}

    def follow(engine: Any) -> None:
        own = {name: weight.detach().double() for name, weight in engine.model.named_parameters()}
        inner, kept["engine"], kept["own"] = engine.step, engine, own

        def step(rate: float, number: int) -> None:
            inner(rate, number)
            decay = min(_DECAY, (2 + number) / (11 + number))
            for name, weight in engine.model.named_parameters():
                own[name] = decay * own[name] + (1 - decay) * weight.detach().double()

        engine.step = step

    train_here(job, on_engine=follow)
    names = [name for name, _ in kept["engine"].ema._weights]
    assert names == list(kept["own"])
    pairs = zip(kept["engine"].ema._average, kept["own"].values(), strict=True)
    return max(float((average - own).abs().max()) for average, own in pairs)


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
    """One worker, without ZeRO."""
    return run_group(1, _ways, [(with_job(job, name="alone"), None)])[0]


def test_it_is_the_average(job: PreparedJob) -> None:
    assert run_group(1, _by_hand, with_job(job, name="by-hand")) < 1e-6


def test_training_does_not_notice_it(job: PreparedJob, alone: Any) -> None:
    """In half precision too, where weights are swapped through other numbers."""
    plain = {"ema": None}
    half = {"precision": "bf16"}
    jobs = [with_job(job, name="plain", train=plain)]
    for zero in (0, 1, 3):
        for name, train in (("with", half), ("without", half | plain)):
            jobs.append(with_job(job, name=f"{name}-{zero}", train=train, parallel={"zero": zero}))
    bare, *halves = run_group(1, _ways, [(one, None) for one in jobs])
    assert bare["steps"] == alone["steps"]
    apart = [abs(one - other) for (_, one), (_, other) in zip(bare["evaluations"], alone["evaluations"], strict=True)]
    assert min(apart) > 1e-4
    for averaged, without in zip(halves[::2], halves[1::2], strict=True):
        assert averaged["steps"] == without["steps"]
        assert averaged["evaluations"] != without["evaluations"]


def test_it_is_the_same_on_any_cluster(job: PreparedJob, alone: Any) -> None:
    """Three workers leave after 3 steps, go on for 3, and one ends it: the same evaluations as in one go."""

    def cut(run: str, zero: int, workers: int) -> PreparedJob:
        parallel = {"zero": zero, "micro_batch": 3 if workers == 3 else None}
        return with_job(job, name=f"{run}-{zero}", parallel=parallel, cluster={"workers": workers})

    stages = (0, 1, 2, 3)
    ways = [(cut("whole", zero, 3), None) for zero in stages]
    ways += [(cut("part", zero, 3), 3) for _ in range(2) for zero in stages]
    found = run_group(3, _ways, ways)
    ends = run_group(1, _ways, [(cut("part", zero, 1), None) for zero in stages])
    for zero, whole, second, end in zip(stages, found, found[8:], ends, strict=False):
        assert [step for step, _ in second["evaluations"]] == [2, 4, 6]
        assert [step for step, _ in end["evaluations"]] == [2, 4, 6, 8]
        for seen, near in ((whole, alone), (end, alone), (second, whole)):
            for (step, loss), (_, expected) in zip(seen["evaluations"], near["evaluations"], strict=False):
                assert abs(loss - expected) < (1e-7 if near is whole else 1e-5), f"ZeRO {zero}, step {step}"


def _exported(job: PreparedJob) -> list[float]:
    """Whether the gathered weights are the average, and the weights in place again afterwards."""
    kept: dict[str, Any] = {}

    def look(engine: Any) -> None:
        inner = engine.close

        def close() -> None:
            before = engine._digest()
            state = engine.full_state_dict() or {}
            whole = {name: engine.ema._whole(i) for i, (name, _) in enumerate(engine.ema._weights)}
            kept["apart"] = (
                max(float((state[name] - value).abs().max()) for name, value in whole.items()) if state else 0
            )
            kept["same"] = float(engine._digest() == before)
            inner()

        engine.close = close

    train_here(job, on_engine=look)
    return [kept["apart"], kept["same"]]


@pytest.mark.parametrize("zero", [0, 2])
def test_the_average_is_exported(job: PreparedJob, zero: int) -> None:
    one = with_job(job, name=f"exported-{zero}", parallel={"zero": zero}, cluster={"workers": 3})
    assert run_group(3, _exported, one) == [0.0, 1.0]


def test_a_checkpoint_without_one_begins_anew(job: PreparedJob) -> None:
    from launcher.train.ema import EMA

    weight = torch.nn.Parameter(torch.ones(3))
    average = EMA(0.5, [("w", weight)], sharded=False)
    average._average[0].zero_()
    average.load(Path("nowhere"))
    assert average._average[0].tolist() == [1.0, 1.0, 1.0]
