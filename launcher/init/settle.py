"""The whole of a new job: numbers for its task, data and model, each with a reason. Pure; read `write.py` next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.formatting import format_percent
from launcher.init.fit import has_gaps, known_labels
from launcher.init.guess import Guess
from launcher.init.look import DataProfile, Labels
from launcher.init.pretrained import Model
from launcher.models.cells import CellSource
from launcher.spec.data import DataSpec

_LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
# What one sequence costs beyond this is for the user to decide.
_LONGEST = {"text-classification": 512, "token-classification": 512, "causal-lm": 1024}
_SPECIAL_TOKENS = 4
# What a template says of how to call tools.
_TOOL_TOKENS = 150
_FAR_FROM_ONE = 20.0
_WINDOW_BYTES = 512 << 20
_DEFAULT_WINDOW = 32
_BESIDE = {
    "input": "what a prompt is about, set behind it",
    "system": "the system message",
    "tools": "tools that may be called",
}
_METRICS = {"single-label": "accuracy", "multi-label": "f1", "regression": "pearson", "words": "f1", "spans": "f1"}


@dataclass(frozen=True)
class Line:
    """One key of the job file.

    Args:
        key: its name.
        value: a scalar, a list or a mapping of them.
        why: the comment.
        off: whether it is written as a comment, for the user to fill in.
    """

    key: str
    value: object
    why: str
    off: bool = False


@dataclass(frozen=True)
class Draft:
    """A job file to be.

    Args:
        title: comment at its top.
        name: the run's.
        sections: lines by section, in order.
    """

    title: tuple[str, ...]
    name: str
    sections: Mapping[str, tuple[Line, ...]]


@dataclass(frozen=True)
class Sources:
    """The data of a job.

    Args:
        locations: by split, as the job file names them.
        rows: by split.
        bad_rows: rows that cannot be used, as far as they were seen.
        missing: why there is no validation data and what to do, by split; empty where there is.
    """

    locations: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, int]
    bad_rows: int = 0
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Steps:
    """How long and how fast to train.

    Args:
        epochs: passes over the data.
        batch_size: the global batch.
        learning_rate: the peak.
    """

    epochs: int
    batch_size: int
    learning_rate: float


def fill_defaults(
    name: str, look: DataProfile, guess: Guess, labels: Labels | None, model: Model, sources: Sources
) -> Draft:
    """Everything a job file says.

    Args:
        name: the run's.
        look: the training data.
        guess: its task and columns.
        labels: their counts, where the task has labels.
        model: what to start from.
        sources: the splits.
    """
    steps = steps_for(guess, sources.rows["train"])
    sections = {
        "task": _task(guess, labels, model),
        "model": (Line("name", model.name, f"{model.why}; a directory, or a name on the hub"),),
        "data": _data(guess, labels, sources, _window(look, steps), _has_long_prompts(guess, model)),
        "train": _train(guess, sources.rows["train"], steps),
        "evaluation": _evaluation(guess, labels, look) if "validation" in sources.locations else (),
        "cluster": (
            Line("workers", 1, "training processes; more of them give the same curve, sooner"),
            Line("gpus_per_worker", 1, "without it a worker trains on CPUs", off=True),
        ),
    }
    title = (
        f"Made by `launcher init` from {look.where}: {guess.why}.",
        "Everything here is a guess to begin with; `launcher schema` and `launcher tasks` describe all keys. "
        "Relative paths start where the launcher runs.",
    )
    return Draft(title, name, {section: lines for section, lines in sections.items() if lines})


def steps_for(guess: Guess, rows: int) -> Steps:
    """Epochs, batch size and learning rate for a task and a number of rows."""
    batch_size = 8 if rows < 1000 else 16 if rows < 5000 else 32
    epochs = 5 if rows < 1000 else 3 if rows < 100_000 else 2 if rows < 1_000_000 else 1
    rate = 2e-5 if guess.task == "text-classification" or guess.form in ("messages", "prompt") else 5e-5
    return Steps(epochs, batch_size, rate)


def max_length(guess: Guess, positions: int | None) -> tuple[int, str]:
    """Tokens to keep of each row, and why: what 99 of 100 rows have, as far as the model goes.

    Args:
        guess: the task and its columns.
        positions: the model's longest input; None where it is not known.
    """
    columns = [*guess.inputs, *([guess.label] if guess.form == "prompt" and guess.label else [])]
    sizes = sorted(map(sum, zip(*(column.tokens for column in columns), strict=False)))
    usual = (
        _usual(sizes)
        + _TOOL_TOKENS * ("tools" in guess.beside)
        + sum(_usual(sorted(column.tokens)) for column in guess.beside.values())
        + _SPECIAL_TOKENS
    )
    longest = min(_LONGEST[guess.task], positions or _LONGEST[guess.task])
    least = 128 if guess.task == "causal-lm" else 32
    chosen = next((n for n in _LENGTHS if n >= max(usual, least)), _LENGTHS[-1])
    said = f"99 of 100 have at most about {usual}"
    return min(chosen, longest), said if chosen <= longest else f"{said}; longer ones are cut"


def _usual(sizes: Sequence[int]) -> int:
    """Return what 99 of 100 sizes have at most, of sizes in order."""
    return sizes[min(len(sizes) - 1, int(0.99 * len(sizes)))] if sizes else 0


def rare_class(guess: Guess, labels: Labels) -> tuple[str, float] | None:
    """The rarest class and its share, where it is so rare that accuracy would hardly see it."""
    known = known_labels(labels, guess)
    counts = [(label, count) for label, count in labels.counts if label in known]
    total = sum(count for _, count in counts)
    if not counts or guess.form not in ("single-label", "multi-label"):
        return None
    label, count = counts[-1]
    return (label, count / total) if count / total < 1 / (3 * len(known)) else None


def _task(guess: Guess, labels: Labels | None, model: Model) -> tuple[Line, ...]:
    lines = [Line("type", guess.task, guess.why), *_columns(guess, labels)]
    if guess.form in ("multi-label", "regression"):
        what = "lists of labels: any number of classes per row" if guess.form == "multi-label" else "numbers"
        lines.append(Line("kind", guess.form, what))
    elif guess.task == "text-classification" and _are_bare_numbers(guess):
        lines.append(Line("kind", guess.form, "each number is a class; regression takes them as amounts"))
    if labels is not None and guess.label is not None and not guess.label.class_names and has_gaps(labels, guess):
        names = sorted(known_labels(labels, guess), key=int)
        lines.append(Line("labels", names, "-1 is taken for a row without a label"))
    if guess.has_unnamed_tags:
        lines.append(Line("labels", ["O", "B-", "I-"], "needed: the name of each number, in order", off=True))
    if guess.form in ("messages", "prompt") and not model.has_template:
        lines.append(
            Line("chat_template", "chatml", "how turns are written: the model brings no template; null takes its own")
        )
    if guess.task == "image-classification":
        augment = {"crop_scale_min": 0.8, "flip_fraction": 0.5}
        lines.append(Line("augment", augment, "changes training pictures at random; no flips where sides matter", True))
    else:
        size, why = max_length(guess, model.positions)
        packed = " and packed sequence" if guess.task == "causal-lm" else ""
        lines.append(Line("max_length", size, f"tokens kept of each row{packed}; {why}"))
    return tuple(lines)


def _are_bare_numbers(guess: Guess) -> bool:
    """Whether the classes are numbers without names, which could be amounts too."""
    return guess.label is not None and guess.label.shape in ("integer", "number") and not guess.label.class_names


def _columns(guess: Guess, labels: Labels | None) -> list[Line]:
    reasons = {name: f"column: {why}" for name, why in guess.reasons.items()}
    if labels is not None and guess.label is not None and guess.form != "prompt":
        reasons[guess.label.name] = f"column: {_label_reason(guess, labels)}"
    keys = {
        "text-classification": ("text", "text_pair"),
        "token-classification": ("text",),
        "image-classification": ("image",),
        "causal-lm": (guess.form,),
    }[guess.task]
    lines = [Line(key, c.name, reasons[c.name]) for key, c in zip(keys, guess.inputs, strict=False)]
    if guess.label is not None:
        lines.append(
            Line("response" if guess.form == "prompt" else "label", guess.label.name, reasons[guess.label.name])
        )
    return [*lines, *(Line(key, column.name, f"column: {_BESIDE[key]}") for key, column in guess.beside.items())]


def _label_reason(guess: Guess, labels: Labels) -> str:
    assert guess.label is not None
    known = known_labels(labels, guess)
    if guess.form == "spans":
        return guess.reasons[guess.label.name]
    if guess.form == "regression":
        low, high = guess.label.low, guess.label.high
        far = max(abs(low), abs(high)) > _FAR_FROM_ONE
        return f"numbers from {low:g} to {high:g}" + ("; scaled to about 0 to 1 they are learned sooner" * far)
    total = sum(count for _, count in labels.counts)
    shares = [f"{label} ({format_percent(count / total)})" for label, count in labels.counts if label in known]
    more = f" and {len(shares) - 4} more" if len(shares) > 4 else ""
    what = "tags" if guess.form == "words" else "classes"
    return f"{len(known)} {what}: {', '.join(shares[:4])}{more}"


def _data(guess: Guess, labels: Labels | None, sources: Sources, window: int, long_prompts: bool) -> tuple[Line, ...]:
    lines = []
    for name in ("train", "validation", "test"):
        use = {"validation": "; decides which checkpoint is kept", "test": "; scored once, at the end"}.get(name, "")
        if name in sources.locations:
            found = sources.locations[name]
            value = found[0] if len(found) == 1 else list(found)
            lines.append(Line(name, value, f"{sources.rows[name]:,} rows{use}"))
        elif name in sources.missing:
            lines.append(Line(name, "PATH", sources.missing[name], off=True))
    bad = sources.bad_rows + _bad_rows(guess) + (labels.nulls if labels else 0)
    if long_prompts:
        lines.append(Line("on_bad_row", "skip", "some answers may begin behind max_length; error stops at such rows"))
    elif bad or (labels is not None and has_gaps(labels, guess)):
        lines.append(Line("on_bad_row", "skip", "some rows have no text or no known label; error stops at them"))
    folder = guess.inputs[0].folder
    if folder and not _is_beside(folder, sources):
        lines.append(Line("files_below", folder, "the rows name files there; they may name no others"))
    if window < _DEFAULT_WINDOW:
        lines.append(Line("window_steps", window, "batches read and encoded together; rows are large here"))
    return tuple(lines)


def _is_beside(folder: str, sources: Sources) -> bool:
    """Return whether a directory lies with the data of every split, so that cells may name its files."""
    file = f"{folder}/x"
    places = [CellSource.of(DataSpec(train=locations)) for locations in sources.locations.values()]
    return all(place.holds_uri(file) if "://" in file else place.holds_path(file) for place in places)


def _window(look: DataProfile, steps: Steps) -> int:
    """Batches of a window: fewer where rows are so large that the usual number would not fit."""
    held = look.row_bytes * steps.batch_size * _DEFAULT_WINDOW
    return max(1, min(_DEFAULT_WINDOW, int(_DEFAULT_WINDOW * _WINDOW_BYTES / held))) if held else _DEFAULT_WINDOW


def _has_long_prompts(guess: Guess, model: Model) -> bool:
    """Whether rows may be cut before their first answer, which leaves nothing to learn."""
    if guess.form not in ("messages", "prompt"):
        return False
    column = guess.inputs[0]
    longest = max(column.openings if guess.form == "messages" else column.tokens, default=0)
    longest += sum(max(beside.tokens, default=0) for beside in guess.beside.values())
    # Tokens are estimates, and a template adds its own.
    return 1.5 * longest + 10 * _SPECIAL_TOKENS > max_length(guess, model.positions)[0]


def _bad_rows(guess: Guess) -> int:
    """Rows of the sample that cannot be used: nulls, and lists of tags that do not fit their words."""
    bad = sum(column.nulls for column in guess.inputs)
    if guess.form == "words" and guess.label:
        bad += sum(a != b for a, b in zip(guess.inputs[0].lengths, guess.label.lengths, strict=False))
    return bad + (guess.label.nulls if guess.form == "prompt" and guess.label else 0)


def _train(guess: Guess, rows: int, steps: Steps) -> tuple[Line, ...]:
    per_epoch = -(-rows // steps.batch_size)
    size = (
        "few rows need more passes" if steps.epochs > 3 else "many rows need fewer passes" if steps.epochs < 3 else ""
    )
    usual = {2e-5: "usual for a first fine-tuning", 5e-5: "usual for this task"}[steps.learning_rate]
    return (
        Line("epochs", steps.epochs, f"passes over the {rows:,} rows{f'; {size}' if size else ''}"),
        Line("batch_size", steps.batch_size, f"rows per step over all workers: {per_epoch:,} steps per epoch"),
        Line("learning_rate", steps.learning_rate, f"{usual}; the first thing to vary"),
    )


def _evaluation(guess: Guess, labels: Labels | None, look: DataProfile) -> tuple[Line, ...]:
    rare = rare_class(guess, labels) if labels is not None else None
    if rare is not None:
        share = format_percent(rare[1])
        why = f"only {share} of the labels are {rare[0]}: this mean over classes counts it like the others"
        return (Line("metric", "macro_f1", why),)
    metric = _METRICS.get(guess.form, "perplexity")
    return (Line("metric", metric, "decides which checkpoint is kept; others are reported beside it"),)


def summary(draft: Draft) -> Sequence[tuple[str, Line]]:
    """The lines of a draft that a person should see before it is used, with their sections."""
    return [(s, line) for s in ("task", "model", "data", "train") for line in draft.sections[s] if not line.off]
