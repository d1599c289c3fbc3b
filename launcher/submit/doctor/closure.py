"""The packages a distribution needs, those that they need, and so on, as they are installed. Runs on the client."""

import re
from importlib import metadata

from packaging.requirements import Requirement


def dependency_closure(root: str) -> frozenset[str]:
    """Normalised names of all installed packages that `root` needs, itself included; empty when it is not installed."""
    found: set[tuple[str, str]] = set()
    queue = [(root, "")]
    while queue:
        name, extra = queue.pop()
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # an extra's package that nobody installed
            continue
        found.add((name, extra))
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needs = [(normalised(requirement.name), each) for each in ("", *requirement.extras)]
                queue += [need for need in needs if need not in found]
    return frozenset(name for name, _ in found)


def normalised(name: str) -> str:
    """As in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()
