"""Checks the value of `launcher submit --command` before anything is sent. Runs on the client."""

import shlex
from typing import TYPE_CHECKING

from launcher.cli.options import EVALUATE_KEYS, check_evaluate_options, check_overrides
from launcher.errors import RunError
from launcher.formatting import find_secret

if TYPE_CHECKING:
    from launcher.submit.package import Package

_COMMANDS = ("train", "tune", "evaluate", "predict")
# Options of each command, and the form that error messages suggest.
_OPTIONS = {"train": ("--fork", "--chaos"), "evaluate": ("--split", "--data", "--name", "KEY=VALUE")}
_FORMS = {
    "train": "write 'train --fork s3://runs/RUN', with changes as KEY=VALUE after the job file",
    "evaluate": "write 'evaluate --split test', or 'evaluate --data s3://in --name NAME'",
}


def parse_command(command: str, package: "Package | None" = None) -> tuple[str, ...]:
    """Split a command into words and check them.

    Args:
        command: Value of `--command`.
        package: Files that are sent with the job, which must include relative paths of the command. None skips this.

    Raises:
        UserError: The command does not exist, or would be refused on the cluster.
    """
    try:
        # As a shell splits it: the words are quoted again for the driver's shell (`Submission.entrypoint`).
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise RunError(f"--command: {command!r} cannot be split into words ({error}); close its quotes") from error
    if not words or words[0] not in _COMMANDS:
        raise RunError(f"--command: {command!r} is none of {', '.join(_COMMANDS)}; give one of them")
    for word in words:
        secret = find_secret(word)
        if secret is not None:
            raise RunError(
                f"--command: {word} holds {secret}, which is visible to all users of the cluster; remove it, and give "
                "the cluster's nodes a role or the keys as environment variables"
            )
    if words[0] == "tune" and len(words) > 1:
        raise RunError("--command tune: takes no options; give changes as KEY=VALUE after the job file")
    if words[0] == "train":
        _check_train(words[1:])
    if words[0] == "evaluate":
        # Minutes may pass until the cluster runs the command: what can be refused is refused here.
        _check_evaluate(words[1:], package)
    if words[0] == "predict" and not any(word.partition("=")[0] == "--output" for word in words):
        raise RunError("--command predict: needs its data and --output; write 'predict s3://in --output s3://out'")
    return words


def _check_train(words: tuple[str, ...]) -> None:
    """Refuse what `launcher train` would refuse on the cluster."""
    from launcher.spec.fault_injection import parse_faults

    options, overrides = _parse_options("train", words)
    if overrides:
        raise RunError(f"--command train: takes no {overrides[0]}; {_FORMS['train']}")
    if "--chaos" in options:
        parse_faults(options["--chaos"])
    run = options.get("--fork")
    if run is not None and "://" not in run and not run.startswith("/"):
        raise RunError(f"--fork: {run} is a relative path, which the cluster cannot find; give a URI or absolute path")


def _check_evaluate(words: tuple[str, ...], package: "Package | None") -> None:
    """Refuse what `launcher evaluate` would refuse on the cluster."""
    from launcher.spec.messages import not_one_of
    from launcher.spec.scored import EVALUATION_SPLITS, check_scores_name

    options, overrides = _parse_options("evaluate", words)
    split = options.get("--split")
    data = options.get("--data")
    check_evaluate_options(split, data, options.get("--name"))
    check_overrides(overrides, EVALUATE_KEYS)
    if split is not None and split not in EVALUATION_SPLITS:
        raise RunError(not_one_of("--split", split, EVALUATION_SPLITS))
    if "--name" in options:
        check_scores_name(options["--name"])
    if data is not None and package is not None and not package.finds(data):
        raise RunError(
            f"--data: {data} is a relative path that is not sent with the job; give a URI or an absolute path on "
            "storage that all nodes share, or add it to cluster.code if it is small"
        )


def _parse_options(command: str, words: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Return the options of a command by name, and its KEY=VALUE words."""
    options: dict[str, str] = {}
    overrides: list[str] = []
    rest = list(words)
    names = _OPTIONS[command]
    form = _FORMS[command]
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name in names:
            if not equals and (not rest or rest[0].startswith("--")):
                raise RunError(f"--command {command}: {name} has no value; {form}")
            if name in options:
                raise RunError(f"--command {command}: {name} is given twice; {form}")
            options[name] = value if equals else rest.pop(0)
        elif equals and not name.startswith("-"):
            overrides.append(f"{name}={value}")
        else:
            raise RunError(f"--command {command}: takes {', '.join(names[:-1])} and {names[-1]}, not {name}; {form}")
    return options, overrides
