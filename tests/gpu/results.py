"""Results of the GPU checks: a JSON file, and a table in README.md between two markers, written as each part ends."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

README = Path(__file__).resolve().parent / "README.md"
_STATES = {True: "ok", False: "**failed**", None: ""}


@dataclass
class Row:
    """One line of the table.

    Args:
        what: What was checked.
        figure: What came of it.
        passed: Whether it is as it should be; None for a figure alone.
    """

    what: str
    figure: str
    passed: bool | None


@dataclass
class PartResult:
    """What came of a part.

    Args:
        state: How it ended; `stopped` by its limit.
        seconds: Wall time.
        why: Reason of what is not `ok`.
        rows: Its rows so far.
    """

    state: Literal["ok", "failed", "stopped", "not run"]
    seconds: float
    why: str = ""
    rows: list[Row] = field(default_factory=list)


@dataclass
class Results:
    """All parts of one call.

    Args:
        half: Which half of the checks.
        machine: Device, versions and date, by name.
        parts: Results by part, in the order of `parts.PARTS`.
    """

    half: Literal["gpu", "cpu"]
    machine: dict[str, str]
    parts: dict[str, PartResult] = field(default_factory=dict)

    def keep_others(self, folder: Path) -> None:
        """Take over the parts of an earlier call's JSON file in `folder`, if it was of the same device and versions."""
        file = folder / f"results-{self.half}.json"
        if not file.is_file():
            return
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if {**earlier["machine"], "date": ""} == {**self.machine, "date": ""}:
            for name, part in earlier["parts"].items():
                self.parts[name] = PartResult(**{**part, "rows": [Row(**row) for row in part["rows"]]})

    def write(self, folder: Path) -> None:
        """Write the JSON file into `folder`, and the table into README.md and a copy of it in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"results-{self.half}.json").write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        text = between_markers(README.read_text(encoding="utf-8"), self.half, self.table())
        README.write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(text, encoding="utf-8")

    def table(self) -> str:
        """Return the results as Markdown."""
        facts = ", ".join(f"{name} {value}" if name != "device" else value for name, value in self.machine.items())
        lines = [facts + ".", "", "| part | s | what | figure | |", "| --- | --- | --- | --- | --- |"]
        for name, part in self.parts.items():
            rows = list(part.rows)
            if part.state != "ok" and part.why:
                rows.append(Row(part.state, part.why, False))
            for number, row in enumerate(rows):
                first = (name, f"{part.seconds:.0f}") if number == 0 else ("", "")
                cells = (*first, row.what, row.figure, _STATES[row.passed])
                lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
        return "\n".join(lines)


def between_markers(text: str, name: str, content: str) -> str:
    """Return a text with what stands between `<!-- name -->` and `<!-- /name -->` replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content}\n{end}{after}"
