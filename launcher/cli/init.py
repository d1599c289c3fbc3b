"""The command `launcher init`: a commented job file made from data. Runs on the client."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from launcher.cli.options import OUT
from launcher.errors import DataError, SpecError, UserError

if TYPE_CHECKING:
    from launcher.init.defaults import Draft, Model
    from launcher.init.guess import Guess, UserChoices
    from launcher.init.profile import DataProfile
    from launcher.init.user_data import Data, Fitted

commands = typer.Typer()

_DATA_HELP = "Parquet, Arrow, CSV, JSON or text: a file, a directory or a glob; local, a URI, or hub:ORG/NAME#SPLIT."
_TEXT_HELP = "Column the model reads (texts, words, pictures, conversations or prompts); two with a comma for a pair."
_SPLIT_HELP = "Set this share of the training rows aside for validation, in files beside the job file."
_OFFERED = 0.1
_WIDE = 40


@commands.command()
def init(  # noqa: PLR0913 -- the options of a command
    data: Annotated[str, typer.Argument(help=_DATA_HELP, metavar="DATA")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The job file to write.")] = Path("job.yaml"),
    task: Annotated[
        str | None, typer.Option(help="What to learn; `launcher tasks` lists them.", metavar="TASK")
    ] = None,
    text: Annotated[str | None, typer.Option(help=_TEXT_HELP, metavar="COLUMN")] = None,
    label: Annotated[
        str | None, typer.Option(help="Column to learn: labels, tags, or answers to prompts.", metavar="COLUMN")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Directory, or name on the Hugging Face hub.", metavar="MODEL")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    validation: Annotated[str | None, typer.Option(help="Validation data, if not in DATA.")] = None,
    test: Annotated[str | None, typer.Option(help="Test data, if not in DATA.")] = None,
    split: Annotated[float | None, typer.Option(help=_SPLIT_HELP, min=0.001, max=0.5)] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Take the guesses; ask nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Look at data, guess task, columns and labels, and write a commented job file.

    On a terminal it shows what it found and asks; flags answer in advance. What it guesses it says, with the reason.
    """
    from launcher.init.defaults import fill_defaults, find_model
    from launcher.init.guess import UserChoices
    from launcher.init.job_file import check_target, job_name, publish
    from launcher.init.splits import check_room
    from launcher.init.user_data import as_read, fit_splits, open_training, set_aside

    folder = output.with_name(f"{output.stem}-data")
    check_target(output, force)
    _check_flags(task, name)
    if split is not None:
        check_room(folder, force)
    asked = find_model(model) if model else None
    given = {kind: place for kind, place in (("validation", validation), ("test", test)) if place}
    ask = not yes and _is_terminal()
    found = open_training(data, given)
    wishes = UserChoices(task, found.profile.named(text) if text else (), label)
    guess = _asked_guess(found, wishes) if ask else _guess(found, wishes)
    chosen = asked or _model(guess, ask)
    found = as_read(_with_beside(found) if ask else found, guess)
    fitted = fit_splits(found, guess, given)
    share = _share(fitted, split, folder, ask)
    if share is not None:
        fitted = set_aside(found, fitted, share, folder, force)
    title = name or job_name(data, output.stem)
    made = fill_defaults(title, found.profile, guess, fitted.labels, chosen, fitted.sources)
    publish(made, output, force)
    _tell(made, output, (*guess.notes, *fitted.notes), fitted)


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _check_flags(task: str | None, name: str | None) -> None:
    """Refuse flags that no data would make right."""
    from launcher.init.guess import TASKS
    from launcher.spec.job import NO_NAME, is_name
    from launcher.spec.messages import not_one_of

    if task is not None and task not in TASKS:
        raise SpecError((not_one_of("--task", task, list(TASKS)),))
    if name is not None and not is_name(name):
        raise SpecError((f"--name {name}: is {NO_NAME}; give another",))


def _guess(data: "Data", wishes: "UserChoices") -> "Guess":
    from launcher.init.guess import guess

    return guess(data.profile, wishes)


def _asked_guess(data: "Data", wishes: "UserChoices") -> "Guess":
    """Show the data and what is guessed, and ask until the answers fit."""
    from launcher.init.guess import TASKS

    found = _try(data, wishes)
    _show(data.profile, found)
    if wishes.task is None:
        task = _asked_task(found, TASKS)
        wishes = replace(wishes, task=task)
        found = found if found is not None and found.task == task else _try(data, wishes)
    while wishes.task is not None:
        inputs = ",".join(column.name for column in found.inputs) if found else ""
        text = typer.prompt("column the model reads (two with a comma for a pair)", default=inputs or None)
        wanted = found.label.name if found and found.label else ""
        optional = wishes.task == "causal-lm"
        answer = typer.prompt(
            "column with answers, empty for none" if optional else "column to learn",
            default=wanted if wanted or optional else None,
            show_default=bool(wanted),
        )
        answered = _try(data, replace(wishes, inputs=data.profile.named(text), label=answer.strip()))
        if answered is not None:
            return answered
    raise AssertionError("a task was asked for")


def _asked_task(found: "Guess | None", tasks: tuple[str, ...]) -> str:
    if found is not None:
        _say(f"It looks like {found.task}: {found.why}.")
    while True:
        task: str = typer.prompt(f"task ({', '.join(tasks)})", default=found.task if found else None)
        if task in tasks:
            return task
        _say(f"{task} is none of them")


def _try(data: "Data", wishes: "UserChoices") -> "Guess | None":
    """A guess, or a sentence for the user to answer to."""
    try:
        return _guess(data, wishes)
    except DataError as problem:
        _say(problem.message)
        return None


def _model(guess: "Guess", ask: bool) -> "Model":
    from launcher.init.defaults import default_model, find_model

    usual = default_model(guess)
    while ask:
        name = typer.prompt("model (directory, or name on the hub)", default=usual.name)
        try:
            return usual if name == usual.name else find_model(name)
        except UserError as problem:
            _say(problem.message)
    return usual


def _with_beside(data: "Data") -> "Data":
    """Offer the files beside a single training file whose names tell another split."""
    from launcher.init.user_data import with_splits

    beside = {name: place for name, place in data.found.beside.items() if name not in data.found.locations}
    taken = {name: place for name, place in beside.items() if typer.confirm(f"Take {place} for {name}?", default=True)}
    return with_splits(data, taken)


def _share(fitted: "Fitted", split: float | None, folder: Path, ask: bool) -> float | None:
    """How much of the training data to set aside, where there is no validation data."""
    if not fitted.sources.missing:
        if split is not None:
            where = fitted.sources.locations["validation"][0]
            raise DataError(f"--split {split:g}: there is validation data already ({where}); leave --split out")
        return None
    if split is None and ask:
        _say(f"Validation data: {fitted.sources.missing['validation']}.")
        if typer.confirm(f"Set aside {_OFFERED:.0%} of the rows, in {folder}/?", default=True):
            return _OFFERED
    return split


def _show(look: "DataProfile", found: "Guess | None") -> None:
    table = Table(
        "column", "type", "example", "taken for", title=f"{look.where}: {look.rows:,} rows", title_justify="left"
    )
    for column in look.columns:
        role = ""
        if found is not None and column in found.inputs:
            role = "input"
        elif found is not None and column == found.label:
            role = "answer" if found.form == "prompt" else "label"
        why = found.reasons.get(column.name, "") if found is not None and role else ""
        table.add_row(*map(Text, (column.name, column.type, column.example, f"{role}: {why}" if why else role)))
    OUT.print(table)


def _tell(made: "Draft", output: Path, notes: tuple[str, ...], fitted: "Fitted") -> None:
    """What was guessed, what is missing, and what to do next."""
    from launcher.init.defaults import summary
    from launcher.init.job_file import scalar

    rows = [(f"{section}.{line.key}", scalar(line.value), line.why) for section, line in summary(made)]
    width = max(len(value) for _, value, _ in rows if len(value) <= _WIDE)
    for key, value, why in rows:
        _say(f"{key:20} {value:{width}}  {why}")
    for note in notes:
        _say(f"note: {note}")
    for name, why in fitted.sources.missing.items():
        _say(f"note: {name} data: {why}; --split {_OFFERED:g} sets rows aside, --{name} names a file")
    path = shlex.quote(str(output))
    _say(f"{output} is written. Next:\n  launcher check {path}\n  launcher train {path}")


def _say(text: str) -> None:
    OUT.print(text, markup=False, highlight=False, soft_wrap=True)
