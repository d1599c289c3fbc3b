"""The command `init`: writes a commented job file for given data. Runs on the client; read `init/guess.py` next."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from launcher.cli.options import OUT, print_line
from launcher.errors import DataError, SpecError, UserError

if TYPE_CHECKING:
    from launcher.init.defaults import Draft
    from launcher.init.guess import Guess, UserChoices
    from launcher.init.model_choice import Model
    from launcher.init.profile import DataProfile
    from launcher.init.user_data import MatchedSplits, UserData

commands = typer.Typer()

_DATA_HELP = "Parquet, Arrow, CSV, JSON or text data: a file, directory, glob, URI or hub:ORG/NAME#SPLIT."
_TEXT_HELP = "Input column (text, words, image, conversation or prompt); two with a comma for a pair of texts."
_LABEL_HELP = "Target column: labels, tags, or answers to prompts."
_MODEL_HELP = "Model: a directory, or a name on the Hugging Face Hub."
_SPLIT_HELP = "Fraction of the training rows to split off for validation, into files next to the job file."
_DEFAULT_SPLIT = 0.1
_MAX_VALUE_WIDTH = 40


@commands.command()
def init(  # noqa: PLR0913 -- the options of a command
    data: Annotated[str, typer.Argument(help=_DATA_HELP, metavar="DATA")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Job file to write.")] = Path("job.yaml"),
    task: Annotated[str | None, typer.Option(help="Task; 'launcher tasks' lists all.", metavar="TASK")] = None,
    text: Annotated[str | None, typer.Option(help=_TEXT_HELP, metavar="COLUMN")] = None,
    label: Annotated[str | None, typer.Option(help=_LABEL_HELP, metavar="COLUMN")] = None,
    model: Annotated[str | None, typer.Option(help=_MODEL_HELP, metavar="MODEL")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    validation: Annotated[str | None, typer.Option(help="Validation data, if it is not in DATA.")] = None,
    test: Annotated[str | None, typer.Option(help="Test data, if it is not in DATA.")] = None,
    split: Annotated[float | None, typer.Option(help=_SPLIT_HELP, min=0.001, max=0.5)] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Accept all guesses without asking.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Inspect data and write a commented job file for it.

    It guesses the task, the columns and the model, and prints every guess with its reason. On a terminal it asks you to
    confirm; options answer in advance.
    """
    from launcher.init.defaults import fill_defaults
    from launcher.init.guess import UserChoices
    from launcher.init.job_file import check_target, job_name, publish
    from launcher.init.model_choice import find_model, fit_task
    from launcher.init.splits import check_not_existing
    from launcher.init.user_data import hold_out_validation, match_splits, open_training, reopen_for_task

    # Refuse wrong options before the data is read, which may take minutes.
    folder = output.with_name(f"{output.stem}-data")
    check_target(output, force)
    _check_flags(task, name)
    if split is not None:
        check_not_existing(folder, force)
    chosen_model = find_model(model) if model else None
    splits = {kind: place for kind, place in (("validation", validation), ("test", test)) if place}
    ask = not yes and _is_terminal()
    opened = open_training(data, splits)
    choices = UserChoices(task, opened.profile.parse_names(text) if text else (), label)
    guess = _ask_guess(opened, choices) if ask else _guess(opened, choices)
    chosen_model = chosen_model or _choose_model(guess, ask)
    if task is None:
        guess = fit_task(guess, chosen_model)
    opened = reopen_for_task(_offer_other_splits(opened) if ask else opened, guess)
    fitted = match_splits(opened, guess, splits)
    fraction = _validation_fraction(fitted, split, folder, ask)
    if fraction is not None:
        # Before `publish`: the files must exist when the job file names them.
        fitted = hold_out_validation(opened, fitted, fraction, folder, force)
    title = name or job_name(data, output.stem)
    job_draft = fill_defaults(title, opened.profile, guess, fitted.labels, chosen_model, fitted.sources)
    publish(job_draft, output, force)
    _print_result(job_draft, output, (*guess.notes, *fitted.notes), fitted)


def _is_terminal() -> bool:
    # The answers come from stdin: in a pipe, a question would take data for them.
    return sys.stdin.isatty()


def _check_flags(task: str | None, name: str | None) -> None:
    """Refuse options that are wrong for any data."""
    from launcher.init.guess import TASKS
    from launcher.spec.job import INVALID_NAME, is_name
    from launcher.spec.messages import not_one_of

    if task is not None and task not in TASKS:
        raise SpecError((not_one_of("--task", task, list(TASKS)),))
    if name is not None and not is_name(name):
        raise SpecError((f"--name {name}: is {INVALID_NAME}; give another",))


def _guess(data: "UserData", choices: "UserChoices") -> "Guess":
    from launcher.init.rules import guess_task

    return guess_task(data.profile, choices)


def _ask_guess(data: "UserData", choices: "UserChoices") -> "Guess":
    """Show the data and the guess, and ask until the answers fit the data."""
    from launcher.init.guess import TASKS

    guess = _try_guess(data, choices)
    _print_profile(data.profile, guess)
    if choices.task is None:
        task = _ask_task(guess, TASKS)
        choices = replace(choices, task=task)
        guess = guess if guess is not None and guess.task == task else _try_guess(data, choices)
    while choices.task is not None:
        inputs = ",".join(column.name for column in guess.inputs) if guess else ""
        text = typer.prompt("input column (two with a comma for a pair)", default=inputs or None)
        label = guess.label.name if guess and guess.label else ""
        optional = {
            "causal-lm": "answers", "masked-lm": "answers", "seq2seq": "targets",
            "sentence-embedding": "scores", "reranking": "scores",
        }.get(choices.task)  # fmt: skip
        is_optional = optional is not None
        answer = typer.prompt(
            f"column with {optional}, empty for none" if is_optional else "target column",
            default=label if label or is_optional else None,
            show_default=bool(label),
        )
        answered = _try_guess(data, replace(choices, inputs=data.profile.parse_names(text), label=answer.strip()))
        if answered is not None:
            return answered
    raise AssertionError("a task was asked for")


def _ask_task(guess: "Guess | None", tasks: tuple[str, ...]) -> str:
    if guess is not None:
        print_line(f"It looks like {guess.task}: {guess.why}.")
    while True:
        task: str = typer.prompt(f"task ({', '.join(tasks)})", default=guess.task if guess else None)
        if task in tasks:
            return task
        print_line(f"{task} is none of them")


def _try_guess(data: "UserData", choices: "UserChoices") -> "Guess | None":
    """Return a guess; None after printing why there is none."""
    try:
        return _guess(data, choices)
    except DataError as problem:
        print_line(problem.message)
        return None


def _choose_model(guess: "Guess", ask: bool) -> "Model":
    from launcher.init.model_choice import default_model, find_model

    default = default_model(guess)
    while ask:
        name = typer.prompt("model (directory, or name on the Hub)", default=default.name)
        try:
            return default if name == default.name else find_model(name)
        except UserError as problem:
            print_line(problem.message)
    return default


def _offer_other_splits(data: "UserData") -> "UserData":
    """Offer the files next to a single training file whose names suggest another split."""
    from launcher.init.user_data import add_splits

    others = {name: place for name, place in data.splits.neighbours.items() if name not in data.splits.locations}
    accepted = {
        name: place for name, place in others.items() if typer.confirm(f"Use {place} for {name}?", default=True)
    }
    return add_splits(data, accepted)


def _validation_fraction(fitted: "MatchedSplits", split: float | None, folder: Path, ask: bool) -> float | None:
    """Return the fraction of the training rows to split off, if there is no validation data."""
    if not fitted.sources.missing:
        if split is not None:
            where = fitted.sources.locations["validation"][0]
            raise DataError(f"--split {split:g}: there is validation data already ({where}); drop --split")
        return None
    if split is None and ask:
        print_line(f"Validation data: {fitted.sources.missing['validation']}.")
        if typer.confirm(f"Split off {_DEFAULT_SPLIT:.0%} of the rows, into {folder}/?", default=True):
            return _DEFAULT_SPLIT
    return split


def _print_profile(profile: "DataProfile", guess: "Guess | None") -> None:
    title = f"{profile.where}: {profile.rows:,} rows"
    table = Table("column", "type", "example", "guessed role", title=title, title_justify="left")
    for column in profile.columns:
        role = ""
        if guess is not None and column in guess.inputs:
            role = "input"
        elif guess is not None and column == guess.label:
            role = "answer" if guess.writes_label else "label"
        why = guess.reasons.get(column.name, "") if guess is not None and role else ""
        table.add_row(*map(Text, (column.name, column.type, column.example, f"{role}: {why}" if why else role)))
    OUT.print(table)


def _print_result(job_draft: "Draft", output: Path, notes: tuple[str, ...], fitted: "MatchedSplits") -> None:
    """Print what was guessed, what is missing, and what to do next."""
    from launcher.init.defaults import key_lines
    from launcher.init.job_file import scalar

    rows = [(f"{section}.{line.key}", scalar(line.value), line.why) for section, line in key_lines(job_draft)]
    # A long path must not push all reasons out of sight.
    width = max(len(value) for _, value, _ in rows if len(value) <= _MAX_VALUE_WIDTH)
    for key, value, why in rows:
        print_line(f"{key:20} {value:{width}}  {why}")
    for note in notes:
        print_line(f"note: {note}")
    for name, why in fitted.sources.missing.items():
        print_line(f"note: {name} data: {why}; --split {_DEFAULT_SPLIT:g} splits rows off, --{name} names a file")
    path = shlex.quote(str(output))
    print_line(f"{output} is written. Next:\n  launcher check {path}\n  launcher train {path}")
