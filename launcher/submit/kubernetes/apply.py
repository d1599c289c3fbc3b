"""Manifests go to a cluster, and away again. Runs on the client.

Nothing is changed before the rules and a dry run on the server have passed for all of them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.errors import ClusterError
from launcher.submit.kubernetes.api import Api
from launcher.submit.kubernetes.manifest import Manifest, name_of
from launcher.submit.kubernetes.rules.check import check
from launcher.submit.kubernetes.state import JobState

_GONE_S = 300.0
_POLL_S = 0.5

Say = Callable[[str], None]


@dataclass(frozen=True)
class How:
    """How manifests are applied.

    Args:
        force: take over fields that somebody else has changed.
        dry_run: change nothing.
        replace: delete a RayJob of the same name first.
    """

    force: bool = False
    dry_run: bool = False
    replace: bool = False


def apply(api: Api, manifests: Sequence[Manifest], how: How, say: Say) -> None:
    """Send manifests.

    Raises:
        SpecError: the rules found something.
        ClusterError: the server refuses one, or a RayJob of that name is there and would not run again.
    """
    check(manifests)
    tried = [(one, api.find_as(one), api.apply(one, how.force, dry_run=True)) for one in manifests]
    changed = [_changes(before, after) for _, before, after in tried]
    for one, before, _ in tried:
        if one["kind"] == "RayJob" and before is not None:
            _may_run_again(JobState.of(before), any(changed), how)
            if how.replace and not how.dry_run:
                delete(api, "RayJob", name_of(one), say)
    for (one, before, _), is_changed in zip(tried, changed, strict=True):
        replaced = how.replace and one["kind"] == "RayJob"
        verb = "created" if before is None or replaced else "changed" if is_changed else "unchanged"
        if not how.dry_run:
            api.apply(one, how.force)
        say(f"{one['kind']} {name_of(one)} {verb}{' (dry run)' if how.dry_run else ''}")


def _changes(before: Manifest | None, after: Manifest) -> bool:
    return before is None or any(before.get(key) != after.get(key) for key in ("spec", "data"))


def _may_run_again(state: JobState, is_changed: bool, how: How) -> None:
    if how.replace:
        return
    if state.is_final:
        raise ClusterError(
            f"RayJob {state.name} is over ({state.line}) and KubeRay never runs it again; repeat with --replace to "
            "delete it first: the run goes on from its last checkpoint, in a new cluster"
        )
    if is_changed:
        raise ClusterError(
            f"RayJob {state.name} is there already ({state.line}), and KubeRay ignores changes of its pods; repeat "
            "with --replace to stop it first: the run goes on from its last checkpoint, in a new cluster"
        )


def delete(api: Api, kind: str, name: str, say: Say) -> bool:
    """Delete an object and wait until it is gone; False when there was none.

    Raises:
        ClusterError: the server refuses, or it is still there after five minutes.
    """
    if not api.delete(kind, name):
        return False
    deadline = time.monotonic() + _GONE_S
    waiting = False
    while api.find(kind, name) is not None:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{kind} {name} is still there after {_GONE_S:g} s; is the KubeRay operator running? It must take its "
                "finalizers away"
            )
        if not waiting:
            waiting = True
            say(f"{kind} {name}: waiting until it has stopped")
        time.sleep(_POLL_S)
    say(f"{kind} {name} deleted")
    return True
