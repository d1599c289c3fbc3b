"""Judges what is installed: the same versions everywhere, libraries that import, and how long that takes. Pure."""

import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping

from launcher.submit.doctor.complaints import Issue, group_issues
from launcher.submit.doctor.facts import Finding, Imports, Software
from launcher.submit.doctor.words import some

TRAINING = ("torch", "transformers", "deepspeed")
# What decides the numbers of a run, or what processes of a run send each other.
_MATTERS = (
    "python", "ray", "launcher", *TRAINING, "pyarrow", "numpy", "pydantic", "cloudpickle", "tokenizers", "safetensors",
    "datasets", "torchmetrics", "peft", "pillow", "fsspec",
)  # fmt: skip
# Ray Train gives a group of workers 60 s to start; half of that may go into imports.
_SLOW_IMPORT_S = 30.0
_FEW_S = 10.0  # below it, who is how much slower than others does not matter
_OUTLIER = 3.0


def versions(here: Software, nodes: Mapping[str, Software], closure: Collection[str]) -> list[Finding]:
    """Compare the packages of every node with those beside the command.

    Args:
        here: what the command itself runs on.
        nodes: what each node has.
        closure: names of the packages the launcher needs, those that they need, and so on.
    """
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = defaultdict(list)
    for name, software in nodes.items():
        alike[_differences(here, software, closure)].append(name)
    findings: list[Finding] = []
    for (grave, small), names in alike.items():
        who = f"all {len(nodes)} nodes" if len(names) == len(nodes) > 1 else some(names)
        if grave:
            found = f"{who}: {some(grave, 6)}"
            findings.append(Finding(check="versions", level="problem", found=found, remedy=_SAME.format(who=who)))
        if small:
            found = f"{who}: {some(small, 6)}"
            findings.append(Finding(check="versions", level="warning", found=found, remedy=_SAME.format(who=who)))
    if not findings:
        shown = ("python", "ray", *TRAINING)
        what = ", ".join(f"{name} {_version(here, name)}" for name in shown if _version(here, name))
        found = f"{what} and {len(closure)} packages in all are the same on {_count(nodes)} and here"
        findings.append(Finding(check="versions", level="ok", found=found))
    return findings


_SAME = (
    "give {who} the versions that are here: the same image on all nodes, or `pip install` of the same constraints file "
    "(or run the command where the nodes' versions are)"
)


def _count(nodes: Collection[str]) -> str:
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"


def _version(software: Software, name: str) -> str | None:
    return software.python if name == "python" else software.packages.get(name)


def _differences(here: Software, there: Software, closure: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What differs and matters, what differs besides; each as `torch 2.12.0 (here 2.13.0)`."""
    grave: list[str] = []
    small: list[str] = []
    for name in (*_MATTERS, *sorted(set(closure) - set(_MATTERS))):
        mine, theirs = _version(here, name), _version(there, name)
        if mine is None or mine == theirs:  # what is not here cannot matter to a run that starts here
            continue
        patch_only = name == "python" and theirs is not None and mine.split(".")[:2] == theirs.split(".")[:2]
        said = f"{name} {theirs or 'missing'} (here {mine})"
        (grave if name in _MATTERS and not patch_only else small).append(said)
    same_version = _version(here, "launcher") == _version(there, "launcher")
    if same_version and here.launcher_sha256 != there.launcher_sha256:
        what = "other code of launcher" if there.launcher_sha256 else "no code of launcher"
        grave.append(f"{what} under the same version {_version(here, 'launcher') or '(not installed)'}")
    return tuple(grave), tuple(small)


def imports(nodes: Mapping[str, Imports]) -> list[Finding]:
    """Libraries that cannot be imported, and nodes where that takes long: a cold or slow disk."""
    complaints: list[Issue] = []
    totals = {name: sum(found.seconds.values()) for name, found in nodes.items() if found.seconds}
    median = statistics.median(totals.values()) if totals else 0.0
    for name, found in nodes.items():
        for library, why in found.errors.items():
            text = f"{library} cannot be imported ({why})"
            remedy = f"mend the installation on {{who}}: an import of {library} must work there"
            complaints.append(Issue(name, "problem", library, text, remedy))
        total = totals.get(name, 0.0)
        if total > _SLOW_IMPORT_S or (total > _FEW_S and total > _OUTLIER * median):
            text = f"{total:.1f} s to import ({_each(found)}); median of the nodes {median:.1f} s"
            complaints.append(Issue(name, "warning", "slow", text, _SLOW))
    if complaints or not totals:
        return group_issues("imports", complaints) or [
            Finding(check="imports", level="skipped", found="no node answered")
        ]
    slowest = max(totals, key=lambda name: totals[name])
    text = f"{totals[slowest]:.1f} s on the slowest node, {slowest} ({_each(nodes[slowest])})"
    return [Finding(check="imports", level="ok", found=text)]


_SLOW = (
    "put the Python environment of {who} on a local disk or into the image, and look for other load there; "
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S gives workers more time to start"
)


def _each(found: Imports) -> str:
    return ", ".join(f"{library} {seconds:.1f} s" for library, seconds in found.seconds.items())
