"""Apply manifests to a cluster and delete objects. Runs on the client.

Nothing is changed before a dry run on the server has passed for all manifests.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

from launcher.errors import ClusterError
from launcher.submit.kubernetes.api import Api
from launcher.submit.kubernetes.manifest import Manifest, name_of
from launcher.submit.kubernetes.state import JobState

_GONE_S = 300.0
_POLL_S = 0.5

Say = Callable[[str], None]


def apply(
    api: Api,
    manifests: Sequence[Manifest],
    say: Say,
    *,
    force: bool = False,
    dry_run: bool = False,
    replace: bool = False,
) -> None:
    """Apply manifests to a cluster.

    Args:
        api: Cluster to apply them to.
        manifests: Objects that have passed the rules, in the order in which they must be applied.
        say: Function that shows the result of each object.
        force: True to overwrite fields that another manager has changed.
        dry_run: True to change nothing.
        replace: True to delete a RayJob of the same name first.

    Raises:
        ClusterError: The server refuses one, or a RayJob of that name exists and would not run again.
    """
    before = [api.find(obj["kind"], name_of(obj), api.namespace_of(obj)) for obj in manifests]
    after = [api.apply(manifest, force, dry_run=True) for manifest in manifests]
    changed = [_has_changed(old, new) for old, new in zip(before, after, strict=True)]
    for manifest, old in zip(manifests, before, strict=True):
        if manifest["kind"] == "RayJob" and old is not None:
            if not replace:
                _check_runs_again(JobState.of(old), any(changed))
            elif not dry_run:
                # Deleted before anything is applied: the pods of the old run mount the ConfigMap, and must not see the
                # new job file.
                there = dataclasses.replace(api, namespace=api.namespace_of(manifest))
                delete(there, "RayJob", name_of(manifest), say)
    for manifest, old, is_changed in zip(manifests, before, changed, strict=True):
        is_new = old is None or (replace and manifest["kind"] == "RayJob")
        verb = "created" if is_new else "changed" if is_changed else "unchanged"
        if not dry_run:
            api.apply(manifest, force)
        say(f"{manifest['kind']} {name_of(manifest)} {verb}{' (dry run)' if dry_run else ''}")


def _has_changed(before: Manifest | None, after: Manifest) -> bool:
    # Only what the launcher writes: metadata such as managedFields may differ by itself, and the status is KubeRay's.
    return before is None or any(before.get(key) != after.get(key) for key in ("spec", "data"))


def _check_runs_again(state: JobState, is_changed: bool) -> None:
    if state.is_final:
        raise ClusterError(
            f"RayJob {state.name} is over ({state.line}) and KubeRay never runs it again; repeat with --replace to "
            "delete it first: the run resumes from its last checkpoint, in a new cluster"
        )
    if is_changed:
        raise ClusterError(
            f"RayJob {state.name} already exists ({state.line}), and KubeRay ignores changes of its pods; repeat "
            "with --replace to stop it first: the run resumes from its last checkpoint, in a new cluster"
        )


def delete(api: Api, kind: str, name: str, say: Say) -> bool:
    """Delete an object and wait until it is gone; return False when there was none.

    Raises:
        ClusterError: The server refuses, or the object still exists after five minutes.
    """
    if not api.delete(kind, name):
        return False
    # KubeRay's finalizer keeps a RayJob until its Ray job has been told to stop. Applied before that, the new one would
    # be a change of the dying object.
    deadline = time.monotonic() + _GONE_S
    is_waiting = False
    while api.find(kind, name) is not None:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{kind} {name} is still there after {_GONE_S:g} s; check that the KubeRay operator runs, which must "
                "remove its finalizers"
            )
        if not is_waiting:
            is_waiting = True
            say(f"{kind} {name}: waiting until it has stopped")
        time.sleep(_POLL_S)
    say(f"{kind} {name} deleted")
    return True
