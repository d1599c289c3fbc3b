"""`--chaos`: which faults it accepts and refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import UserError
from launcher.spec.fault_injection import Fault, Faults, parse_faults


def test_all_kinds_of_faults_are_parsed() -> None:
    text = "kill=1@step37, term=node@step80,disk_full@step90,kill=driver@step5,freeze=0@step2,nan@step3,corrupt@step9"
    faults = parse_faults(f"{text},flaky@step1,kill=0@save,random=2,seed=7")
    assert faults.explicit[0] == Fault("kill", 1, 37) and faults.explicit[1] == Fault("term", "node", 80)
    assert faults.explicit[-1] == Fault("kill", 0, None, "save") and (faults.num_random, faults.seed) == (2, 7)
    assert ",".join(map(str, faults.explicit[:3])) == "kill=1@step37,term=node@step80,disk_full@step90"


@pytest.mark.parametrize(
    "text",
    ["", "kill", "kill@step3", "kill=1", "kill=1@37", "kill=1@step0", "kill=node@step3", "freeze=driver@step1",
     "disk_full=1@step3", "disk_full@save", "term=1@step3", "nan=0@step1", "explode=1@step3", "kill=1@lunch",
     "kill=-1@step3", "seed=4", "random=x", "kill=1@step3;kill=2@step4", "freeze=1@save"],
)  # fmt: skip
def test_an_invalid_fault_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--chaos: .*; write KIND\[=TARGET\]@WHEN, as kill=1@step37"):
        parse_faults(text)


def test_a_fault_beyond_the_steps_or_ranks_is_refused() -> None:
    with pytest.raises(UserError, match="kill=2@step3 is for rank 2, and the ranks are 0 to 1"):
        parse_faults("kill=2@step3").resolve(10, 2)
    with pytest.raises(UserError, match="nan@step11 is beyond the run's 10 steps"):
        parse_faults("nan@step11").resolve(10, 2)


@given(st.integers(1, 60), st.integers(0, 1000), st.integers(1, 500), st.integers(1, 16))
def test_random_kills_depend_only_on_the_seed(count: int, seed: int, steps: int, workers: int) -> None:
    drawn = Faults(num_random=count, seed=seed).resolve(steps, workers)
    assert drawn == Faults(num_random=count, seed=seed).resolve(steps, workers) and len(drawn) == count
    for fault in drawn:
        assert fault.kind == "kill" and 1 <= (fault.step or 0) <= steps and 0 <= int(fault.target or 0) < workers
