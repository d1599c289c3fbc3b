"""The words of `launcher submit --command`, checked before anything is sent. Runs on the client."""

import shlex
from typing import TYPE_CHECKING

from launcher.cli.options import EVALUATE_KEYS, check_overrides, check_scored
from launcher.errors import RunError
from launcher.formatting import find_secret

if TYPE_CHECKING:
    from launcher.submit.package import Package

_COMMANDS = ("train", "tune", "evaluate", "predict")
# Their options, and what to write instead of what is wrong.
_OPTIONS = {"train": ("--fork", "--chaos"), "evaluate": ("--split", "--data", "--name", "KEY=VALUE")}
_WRITE = {
    "train": "write 'train --fork s3://runs/RUN', with changes as KEY=VALUE behind the job file",
    "evaluate": "write 'evaluate --split test', or 'evaluate --data s3://in --name NAME'",
}


def words_of(command: str, package: "Package | None" = None) -> tuple[str, ...]:
    """The words of a command.

    Args:
        command: as it was given.
        package: what travels; a relative path of the command must be in it.

    Raises:
        UserError: the command does not exist, or would be refused on the cluster.
    """
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise RunError(f"--command: {command!r} cannot be taken apart ({error}); close its quotation marks") from error
    if not words or words[0] not in _COMMANDS:
        raise RunError(f"--command: {command!r} is none of {', '.join(_COMMANDS)}; give one of them")
    for word in words:
        if (what := find_secret(word)) is not None:
            raise RunError(
                f"--command: {word} holds {what}, which is shown to all who can see the cluster; take it out, and give "
                "the cluster's nodes a role, or the keys as variables of their own"
            )
    if words[0] == "tune" and len(words) > 1:
        raise RunError("--command tune: takes no more words; give changes as KEY=VALUE behind the job file")
    if words[0] == "train":
        _check_train(words[1:])
    if words[0] == "evaluate":
        _check_evaluate(words[1:], package)
    if words[0] == "predict" and "--output" not in words:
        raise RunError("--command predict: needs its data and --output; write 'predict s3://in --output s3://out'")
    return words


def _check_train(words: tuple[str, ...]) -> None:
    """Refuse what `launcher train` would refuse there."""
    from launcher.spec.fault_injection import parse_faults

    given, overrides = _options("train", words)
    if overrides:
        raise RunError(f"--command train: takes no {overrides[0]}; {_WRITE['train']}")
    if "--chaos" in given:
        parse_faults(given["--chaos"])
    run = given.get("--fork")
    if run is not None and "://" not in run and not run.startswith("/"):
        raise RunError(f"--fork: {run} is a relative path, which means nothing there; give the run's URI or whole path")


def _check_evaluate(words: tuple[str, ...], package: "Package | None") -> None:
    """Refuse what `launcher evaluate` would refuse there."""
    from launcher.spec.messages import not_one_of
    from launcher.spec.scored import SPLITS, check_scores_name

    given, overrides = _options("evaluate", words)
    check_scored(given.get("--split"), given.get("--data"), given.get("--name"))
    check_overrides(overrides, EVALUATE_KEYS)
    split, data = given.get("--split"), given.get("--data")
    if split is not None and split not in SPLITS:
        raise RunError(not_one_of("--split", split, SPLITS))
    if "--name" in given:
        check_scores_name(given["--name"])
    if data is not None and package is not None and not package.finds(data):
        raise RunError(
            f"--data: {data} is a relative path that does not travel with the job; give a URI or an absolute path on "
            "storage that all nodes share, or name it in cluster.code if it is small"
        )


def _options(command: str, words: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The options of a command by name, and its KEY=VALUE words."""
    given: dict[str, str] = {}
    overrides: list[str] = []
    rest, names, write = list(words), _OPTIONS[command], _WRITE[command]
    while rest:
        name, mark, value = rest.pop(0).partition("=")
        if name in names:
            if not mark and (not rest or rest[0].startswith("--")):
                raise RunError(f"--command {command}: {name} has no value; {write}")
            if name in given:
                raise RunError(f"--command {command}: {name} is given twice; {write}")
            given[name] = value if mark else rest.pop(0)
        elif mark and not name.startswith("-"):
            overrides.append(f"{name}={value}")
        else:
            raise RunError(f"--command {command}: takes {', '.join(names[:-1])} and {names[-1]}, not {name}; {write}")
    return given, overrides
