"""What is wrong with single nodes, told once for all that share it. Pure; runs on the client."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from launcher.submit.doctor.facts import Finding, Level
from launcher.submit.doctor.words import some

_SPELLED_OUT = 3


@dataclass(frozen=True)
class Issue:
    """One node's trouble.

    Args:
        node: its name.
        level: how bad it is.
        kind: complaints of one kind and level become one finding.
        text: what was found there, with figures.
        remedy: what to do; `{who}` in it becomes the nodes' names.
    """

    node: str
    level: Level
    kind: str
    text: str
    remedy: str


def group_issues(check: str, complaints: Iterable[Issue]) -> list[Finding]:
    """A finding per kind of trouble: on a cluster of 64 nodes a wrong image is one line, not 64."""
    kinds: dict[tuple[Level, str], list[Issue]] = defaultdict(list)
    for complaint in complaints:
        kinds[complaint.level, complaint.kind].append(complaint)
    findings: list[Finding] = []
    for (level, _), alike in kinds.items():
        who = some(dict.fromkeys(each.node for each in alike))
        if len({each.text for each in alike}) == 1:
            found = f"{who}: {alike[0].text}"
        else:
            found = "; ".join(f"{each.node}: {each.text}" for each in alike[:_SPELLED_OUT])
            more = dict.fromkeys(each.node for each in alike[_SPELLED_OUT:])
            found += f"; also on {some(more)}" if more else ""
        remedy = alike[0].remedy.replace("{who}", who)
        findings.append(Finding(check=check, level=level, found=found, remedy=remedy))
    return findings
