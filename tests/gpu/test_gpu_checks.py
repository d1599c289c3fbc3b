"""The GPU checks' own logic, without a run: the table, the grouping of parts, the bounds of packed samples."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

_HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the folder's modules importable, as `run.py` does."""
    monkeypatch.syspath_prepend(str(_HERE))


def test_readme_has_a_place_for_each_half_and_explains_each_part() -> None:
    from parts import PARTS
    from results import README, between_markers

    text = README.read_text(encoding="utf-8")
    for half in ("gpu", "cpu"):
        changed = between_markers(text, half, "new")
        assert f"<!-- {half} -->\nnew\n<!-- /{half} -->" in changed
        assert changed.count("<!-- ") == text.count("<!-- ") == 4
    assert [name for name in PARTS if f"| `{name}` |" not in text] == []


def test_table_shows_rows_and_why_a_part_did_not_end_well() -> None:
    from results import PartResult, Results, Row

    rows = [Row("a | b", "1\n2", True), Row("c", "3", False)]
    results = Results("cpu", {"device": "none", "torch": "2.11"})
    results.parts = {"zero": PartResult("stopped", 7.4, "at its limit", rows), "facts": PartResult("ok", 1.0)}
    assert results.table().splitlines() == [
        "none, torch 2.11.",
        "",
        "| part | s | what | figure | |",
        "| --- | --- | --- | --- | --- |",
        "| zero | 7 | a / b | 1 2 | ok |",
        "|  |  | c | 3 | **failed** |",
        "|  |  | stopped | at its limit | **failed** |",
    ]


def test_a_call_for_some_parts_keeps_the_others_of_the_same_machine(tmp_path: Path, monkeypatch: Any) -> None:
    import results
    from results import PartResult, Results, Row

    monkeypatch.setattr(results, "README", tmp_path / "README.md")
    results.README.write_text("<!-- cpu -->\n<!-- /cpu -->", encoding="utf-8")
    earlier = Results("cpu", {"torch": "2.11", "date": "yesterday"}, {"zero": PartResult("ok", 1.0, "", [])})
    earlier.parts["zero"].rows.append(Row("a", "1", True))
    earlier.write(tmp_path / "out")
    assert "| zero | 1 | a | 1 | ok |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    same, other = Results("cpu", {"torch": "2.11", "date": "today"}), Results("cpu", {"torch": "2.13", "date": "today"})
    for later in (same, other):
        later.keep_others(tmp_path / "out")
    assert same.parts == earlier.parts and other.parts == {}


def test_no_part_may_take_half_of_the_time_and_timed_ones_come_one_by_one() -> None:
    from parts import PARTS

    assert max(part.gpu_s for part in PARTS.values()) <= 300
    assert sum(part.gpu_s for part in PARTS.values() if part.alone) <= 600


def test_bounds_of_packed_samples_cover_the_batch() -> None:
    torch = pytest.importorskip("torch")
    from gpu_tasks import sequence_bounds

    places = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert sequence_bounds(places).tolist() == [0, 3, 5, 6, 12]
    assert sequence_bounds(places).dtype == torch.int32


def test_scripts_parse() -> None:
    for name in ("bundle.sh", "install.sh"):
        subprocess.run(["bash", "-n", str(_HERE / name)], check=True)
