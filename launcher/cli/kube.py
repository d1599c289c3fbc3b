"""The commands of `launcher kube`: render, apply, status, logs, wait, delete. Runs on the client."""

import shlex
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from launcher.cli.options import ERR, OUT, JobFile, Overrides, print_line
from launcher.errors import ClusterError, RunInterrupted, TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.submit.kubernetes.api import Api
    from launcher.submit.kubernetes.job_file import Target
    from launcher.submit.kubernetes.manifest import Manifest
    from launcher.submit.kubernetes.state import JobState

commands = typer.Typer()
kube = typer.Typer(help="Run a job on Kubernetes with KubeRay.", no_args_is_help=True)
commands.add_typer(kube, name="kube")

_SOURCE_HELP = "Job file, or manifests: a file or a directory."
Source = Annotated[str, typer.Argument(help=_SOURCE_HELP, metavar="JOB.yaml|DIR|FILE")]
Named = Annotated[
    str, typer.Argument(help="Job file, manifests, or name of the RayJob.", metavar="JOB.yaml|DIR|FILE|NAME")
]
Kind = Literal["job", "cluster"]
Command = Literal["train", "tune"]
KindOption = Annotated[Kind, typer.Option(help="RayJob that runs the job, or RayCluster for interactive work.")]
CommandOption = Annotated[Command, typer.Option(help="Command that the RayJob runs.")]
Context = Annotated[str | None, typer.Option(help="Context in the kubeconfig; the default is the current one.")]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace; default: of the job file or context.")
]


@kube.command()
def render(
    job: JobFile,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory for one file per object.")] = None,
    kind: KindOption = "job",
    command: CommandOption = "train",
) -> None:
    """Print the Kubernetes manifests of a job, validated with KubeRay's rules."""
    from launcher.submit.kubernetes.manifest import dump_manifests

    manifests = _render(job, overrides, kind, command)
    comment = _make_header(job, overrides, kind, command)
    if output is None:
        # Not by rich: the output goes to kubectl, and wrapped lines would change it.
        typer.echo(dump_manifests(manifests, comment), nl=False)
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        for manifest in manifests:
            # By kind: read_manifests sorts the names, and the ConfigMap has to be applied before the RayJob that mounts
            # it.
            path = output / f"{manifest['kind'].lower()}.yaml"
            path.write_text(dump_manifests([manifest], comment), encoding="utf-8")
            print_line(str(path))
    except OSError as error:
        raise ClusterError(f"--output {output}: cannot be written ({error.strerror}); name a directory") from error


@kube.command()
def apply(  # noqa: PLR0913 -- the options of a command
    source: Source,
    overrides: Overrides = None,
    kind: KindOption = "job",
    command: CommandOption = "train",
    context: Context = None,
    namespace: Namespace = None,
    replace: Annotated[bool, typer.Option("--replace", help="First stop and delete the RayJob of that name.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only let the server validate; change nothing.")] = False,
    force_conflicts: Annotated[
        bool, typer.Option("--force-conflicts", help="Overwrite fields changed by others.")
    ] = False,
) -> None:
    """Create or update a job, or manifests, on the cluster."""
    from launcher.submit.kubernetes.manifest import is_manifest, read_manifests
    from launcher.submit.kubernetes.rules.check import check

    path = Path(source)
    if path.exists() and is_manifest(path):
        if overrides:
            raise ClusterError(f"{source}: manifests take no overrides ({overrides[0]}); edit them, or name a job file")
        manifests = read_manifests(path)
        # Before the cluster is asked for: wrong manifests are refused without one.
        check(manifests)
    else:
        manifests = _render(path, overrides, kind, command)
    api = _connect(context, namespace)
    from launcher.submit.kubernetes.apply import apply as send

    send(api, manifests, print_line, force=force_conflicts, dry_run=dry_run, replace=replace)


@kube.command()
def status(
    source: Named,
    overrides: Overrides = None,
    kind: KindOption = "job",
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Show the state of a RayJob or RayCluster and its pods."""
    target, api = _find(source, overrides, kind, context, namespace)
    manifest = api.get(target.kind, target.name)
    table = Table(show_header=False, box=None)
    if target.kind == "RayJob":
        from launcher.submit.kubernetes.state import JobState

        state = JobState.of(manifest)
        cluster = state.cluster
        rows = _make_job_rows(state)
    else:
        cluster = target.name
        # The operator writes the status, so a new object has none.
        rows = {"state": str((manifest.get("status") or {}).get("state") or "not yet seen by the operator")}
    for name, value in {target.kind: f"{target.name} in namespace {api.namespace}", **rows}.items():
        if value:
            table.add_row(name, Text(value))
    OUT.print(table)
    _print_pods(api, cluster, target.name)


@kube.command()
def wait(
    source: Named,
    overrides: Overrides = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait at most.")] = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Wait until a RayJob has ended.

    Exit code: 0 if it succeeded, 1 if not.
    """
    target, api = _find(source, overrides, "job", context, namespace)
    from launcher.submit.kubernetes.follow import wait as wait_until_over

    with _explain_interrupt(target):
        _raise_if_failed(wait_until_over(api, target.name, timeout, _print_note))


@kube.command()
def logs(
    source: Named,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the log until the RayJob has ended.")] = False,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Print the log of the driver.

    With --follow the exit code is that of 'launcher kube wait'.
    """
    target, api = _find(source, overrides, "job", context, namespace)
    from launcher.submit.kubernetes.follow import Log
    from launcher.submit.kubernetes.follow import wait as wait_until_over
    from launcher.submit.kubernetes.state import JobState

    log = Log(api, _print_note, typer.echo, follow)
    with _explain_interrupt(target):
        if follow:
            _raise_if_failed(wait_until_over(api, target.name, None, _print_note, log))
            return
        state = JobState.of(api.get("RayJob", target.name))
        log.catch_up(state)
    if not log.has_source:
        raise ClusterError(
            f"RayJob {target.name} has no log to read ({state.line}): its pods have not started, or are gone; what the "
            "run wrote is in its output.storage"
        )


@kube.command()
def delete(
    source: Named,
    overrides: Overrides = None,
    kind: KindOption = "job",
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Stop and delete a RayJob or RayCluster and its ConfigMap.

    The run directory is kept.
    """
    target, api = _find(source, overrides, kind, context, namespace)
    from launcher.submit.kubernetes.apply import delete as remove

    # The RayJob first: without the ConfigMap, pods that KubeRay still starts would wait for it for ever.
    has_deleted = remove(api, target.kind, target.name, print_line)
    # The call stands before the `or`, which would skip it otherwise.
    has_deleted = remove(api, "ConfigMap", target.config_map, print_line) or has_deleted
    if not has_deleted:
        raise ClusterError(f"there is no {target.kind} {target.name} in namespace {api.namespace}; nothing was deleted")


def _render(path: Path, overrides: list[str] | None, kind: Kind, command: Command) -> "list[Manifest]":
    from launcher.submit.kubernetes.job_file import load_for_pods
    from launcher.submit.kubernetes.render import objects
    from launcher.submit.kubernetes.rules.check import check
    from launcher.tasks import params_class

    manifests = objects(load_for_pods(path, overrides or (), params_class), command, kind)
    check(manifests)
    return manifests


def _make_header(path: Path, overrides: list[str] | None, kind: Kind, command: Command) -> str:
    words = ["launcher", "kube", "render", str(path), *(overrides or ())]
    words += [] if kind == "job" else ["--kind", kind]
    words += [] if command == "train" else ["--command", command]
    return (
        f"Made by `{shlex.join(words)}` for KubeRay 1.7.\n"
        "Change the job file and render it again; or edit this, and `launcher kube apply` checks it before it is sent."
    )


def _connect(context: str | None, namespace: str | None) -> "Api":
    try:
        from launcher.submit.kubernetes.api import connect
    except ModuleNotFoundError as error:
        # Another module that is missing is a broken installation, and not the optional extra.
        if error.name is None or error.name.split(".")[0] != "kubernetes":
            raise
        raise ClusterError(
            "the Kubernetes client is not installed; pip install 'launcher[kube]', or use kube render and kubectl"
        ) from error
    return connect(context, namespace)


def _find(
    source: str, overrides: list[str] | None, kind: Kind, context: str | None, namespace: str | None
) -> "tuple[Target, Api]":
    from launcher.submit.kubernetes.job_file import find_target

    target = find_target(source, overrides or (), kind)
    api = _connect(context, namespace)
    if namespace is None and target.namespace is not None:
        # dataclasses.replace; in `apply` an option of that name hides it.
        api = replace(api, namespace=target.namespace)
    return target, api


def _make_job_rows(state: "JobState") -> dict[str, str]:
    return {
        "deployment": state.deployment or "not yet seen by the operator",
        "job": state.status or "not started",
        "reason": state.reason,
        "message": state.message,
        "failed attempts": str(state.failed) if state.failed else "",
        "ray cluster": state.cluster,
        "submission": state.job_id,
        "dashboard": f"{state.dashboard} (kubectl port-forward svc/{state.cluster}-head-svc 8265)"
        if state.dashboard
        else "",
    }


def _print_pods(api: "Api", cluster: str, name: str) -> None:
    from launcher.submit.kubernetes.state import pod_groups

    # Two labels: KubeRay's for the cluster, and Kubernetes' own for the pods of the submitting Job.
    pods = [*(api.pods(f"ray.io/cluster={cluster}") if cluster else []), *api.pods(f"job-name={name}")]
    if not pods:
        return
    table = Table("pods", "phase", "waiting for", box=None, padding=(0, 2))
    for group in pod_groups(pods):
        phases = ", ".join(f"{count} {phase}" for phase, count in group.phases.items())
        table.add_row(group.group, phases, group.waiting)
    OUT.print(table)


def _raise_if_failed(state: "JobState") -> None:
    """Raise an error with the reason if the RayJob failed; the exit code is then 1."""
    if not state.succeeded:
        raise TrainingError(state.failure)


@contextmanager
def _explain_interrupt(target: "Target") -> "Iterator[None]":
    try:
        yield
    except KeyboardInterrupt as error:
        raise RunInterrupted(
            f"no longer watching; RayJob {target.name} keeps running (`launcher kube delete {target.name}` stops it)"
        ) from error


def _print_note(line: str) -> None:
    """Print to stderr, so that stdout holds only the log."""
    print_line(line, ERR)
