"""Defaults of a new job: model and values of all other keys, each with a reason. Pure but for reading a model's JSON.

Runs on the client; does not import transformers. Read `job_file.py` next, which writes the draft.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from launcher.formatting import format_percent
from launcher.init.guess import Guess
from launcher.init.labels import Labels
from launcher.init.model_choice import T5_LANGUAGES, Model, pair_languages
from launcher.init.profile import DataProfile
from launcher.models.cells import CellSource
from launcher.spec.data import DataSpec
from launcher.tasks import params_class

_LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
# Upper limits of `max_length`: longer sequences cost much memory, so the user decides.
_LONGEST = {
    "text-classification": 512,
    "token-classification": 512,
    "question-answering": 384,
    "causal-lm": 1024,
    "masked-lm": 512,
    "seq2seq": 512,
    "sentence-embedding": 512,
    "reranking": 512,
    "preference": 1024,
    "reward": 1024,
}
# Marks that a tokenizer adds to a row: four for RoBERTa's pairs, <s> a </s></s> b </s>.
_SPECIAL_TOKENS = 4
# Instructions on tool calls that a chat template adds.
_TOOL_TOKENS = 150
_FAR_FROM_ONE = 20.0
_GENTLE_RATE = 5e-6
_WINDOW_BYTES = 512 << 20
_DEFAULT_WINDOW = 32
_BESIDE = {
    "input": "what a prompt is about, appended to it",
    "system": "the system message",
    "tools": "tools that may be called",
    "answers": "right answers, and where they begin",
    "negatives": "documents that do not answer it",
    "chosen": "the better completion",
    "rejected": "the worse completion",
    "completion": "one completion of each prompt",
    "label": "true for a desirable completion, false for an undesirable one",
}
_METRICS = {
    "single-label": "accuracy",
    "multi-label": "f1",
    "regression": "pearson",
    "words": "f1",
    "spans": "f1",
    "answers": "f1",
    "pair": "bleu",
    "translation": "bleu",
    "summary": "rouge1",
}


@dataclass(frozen=True)
class Line:
    """One line of the job file: a key, its value and a comment."""

    key: str
    """Name of the key."""
    value: object
    """Scalar, list or mapping."""
    why: str
    """Comment with the reason."""
    is_commented: bool = False
    """True if the line is commented out, for the user to fill in."""


@dataclass(frozen=True)
class Draft:
    """Content of a new job file."""

    title: tuple[str, ...]
    """Comment lines at its top."""
    name: str
    """Name of the run."""
    sections: Mapping[str, tuple[Line, ...]]
    """Lines by section, in order."""


@dataclass(frozen=True)
class Sources:
    """Data of a new job."""

    locations: Mapping[str, tuple[str, ...]]
    """Locations by split, as the job file names them."""
    rows: Mapping[str, int]
    """Number of rows by split."""
    bad_rows: int = 0
    """Number of unusable rows, as far as they were read."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Reason and advice for missing validation data, by split; empty if there is some."""


@dataclass(frozen=True)
class Steps:
    """Length and learning rate of the training."""

    epochs: int
    """Passes over the data."""
    batch_size: int
    """Global batch size in rows."""
    learning_rate: float
    """Peak learning rate."""


def fill_defaults(
    name: str, profile: DataProfile, guess: Guess, labels: Labels | None, model: Model, sources: Sources
) -> Draft:
    """Return a draft of the job file, with a value and a reason for every key. `labels` is None for tasks without."""
    steps = steps_for(guess, sources.rows["train"])
    sections = {
        "task": _task(guess, labels, model),
        "model": (Line("name", model.name, f"{model.why}; a directory, or a name on the hub"),),
        "data": _data(guess, labels, sources, _window(profile, steps), _has_long_prompts(guess, model)),
        "train": _train(guess, sources.rows["train"], steps),
        "evaluation": _evaluation(guess, labels, profile) if "validation" in sources.locations else (),
        # One worker without a GPU runs everywhere; the loss curve is the same with more.
        "cluster": (
            Line("workers", 1, "training processes; more of them give the same loss curve, faster"),
            Line("gpus_per_worker", 1, "without it, workers train on CPUs", is_commented=True),
        ),
    }
    title = (
        f"Made by `launcher init` from {profile.where}: {guess.why}.",
        "All values are a first guess; `launcher schema` and `launcher tasks` describe all keys. "
        "Relative paths start in the directory where the launcher runs.",
    )
    return Draft(title, name, {section: lines for section, lines in sections.items() if lines})


def steps_for(guess: Guess, rows: int) -> Steps:
    """Choose epochs, batch size and learning rate for a task and a number of rows."""
    batch_size = 8 if rows < 1000 else 16 if rows < 5000 else 32
    epochs = 5 if rows < 1000 else 3 if rows < 100_000 else 2 if rows < 1_000_000 else 1
    if guess.task == "sentence-embedding":
        # Every row is compared with the others of its batch: more of them are a harder question.
        batch_size *= 4
    is_slow = guess.task in ("text-classification", "sentence-embedding", "reranking")
    rate = 2e-5 if is_slow or guess.form in ("messages", "prompt") else 5e-5
    if guess.task in ("preference", "reward"):
        # A preference says little, and is soon learned by heart.
        epochs, rate = min(epochs, 2), _GENTLE_RATE if guess.task == "preference" else 2e-5
    return Steps(epochs, batch_size, rate)


def max_length(guess: Guess, positions: int | None) -> tuple[int, str]:
    """Choose `max_length` so that 99 % of the rows fit, limited by model and task; return it with a reason."""
    columns = [*guess.inputs, *([guess.label] if guess.form == "prompt" and guess.label else [])]
    # Columns leave out their null rows, so the rows of two columns may be shifted against each other. Only a percentile
    # is taken of their sums.
    # An embedding reads each text alone, all others read them together.
    combine = max if guess.task == "sentence-embedding" else sum
    sizes = sorted(map(combine, zip(*(column.tokens for column in columns), strict=False)))
    usual = (
        _usual(sizes)
        + _TOOL_TOKENS * ("tools" in guess.beside)
        # Negatives are about as long as the positives. A rejected completion is in another sequence than a chosen one.
        + sum(
            _usual(sorted(column.tokens))
            for key, column in guess.beside.items()
            if key not in ("negatives", "rejected")
        )
        + _SPECIAL_TOKENS
    )
    longest = min(_LONGEST[guess.task], positions or _LONGEST[guess.task])
    least = 128 if guess.form in ("text", "messages", "prompt", "preferred", "judged") else 32
    chosen = next((n for n in _LENGTHS if n >= max(usual, least)), _LENGTHS[-1])
    why = f"99 of 100 have at most about {usual}"
    cut = "are read in windows that overlap" if guess.form == "answers" else "are cut"
    return min(chosen, longest), why if chosen <= longest else f"{why}; longer ones {cut}"


def _usual(sizes: Sequence[int]) -> int:
    """Return the 99th percentile of sorted sizes."""
    return sizes[min(len(sizes) - 1, int(0.99 * len(sizes)))] if sizes else 0


def rare_class(guess: Guess, labels: Labels) -> tuple[str, float] | None:
    """Return the rarest class and its share, if it is so rare that accuracy hardly depends on it; else None."""
    known = guess.known_labels(labels)
    counts = [(label, count) for label, count in labels.counts if label in known]
    total = sum(count for _, count in counts)
    if not counts or guess.form not in ("single-label", "multi-label"):
        return None
    # Counts are sorted, so the last is the rarest. A class that never occurs is not among them.
    label, count = counts[-1]
    return (label, count / total) if count / total < 1 / (3 * len(known)) else None


def _task(guess: Guess, labels: Labels | None, model: Model) -> tuple[Line, ...]:
    lines = [Line("type", guess.task, guess.why), *_columns(guess, labels)]
    if guess.task == "sentence-embedding" and guess.form == "regression":
        lines.append(Line("loss", "cosent", "learns the order of the scores, whatever their range"))
    elif guess.form in ("multi-label", "regression"):
        what = "lists of labels: any number of classes per row" if guess.form == "multi-label" else "numbers"
        lines.append(Line("kind", guess.form, what))
    elif guess.task == "text-classification" and _are_bare_numbers(guess):
        lines.append(Line("kind", guess.form, "each number is a class; use regression if they are amounts"))
    if labels is not None and guess.label is not None and not guess.label.class_names and guess.has_unlabelled(labels):
        # As numbers: as texts, "10" would come before "2", and the order gives the class indices.
        names = sorted(guess.known_labels(labels), key=int)
        lines.append(Line("labels", names, "-1 marks rows without a label"))
    if guess.has_unnamed_tags:
        lines.append(Line("labels", ["O", "B-", "I-"], "needed: the name of each number, in order", is_commented=True))
    lines += _preference_loss(guess)
    if guess.form in ("messages", "prompt", "preferred", "judged") and not model.has_template:
        lines.append(
            Line("chat_template", "chatml", "format of messages, as the model has no template; null uses its own")
        )
    if guess.task == "image-classification":
        augment = {"crop_scale_min": 0.8, "flip_fraction": 0.5}
        lines.append(
            Line("augment", augment, "random changes to training pictures; no flips if left and right matter", True)
        )
    elif guess.task == "seq2seq":
        lines += _pair_lines(guess, model)
    else:
        size, why = max_length(guess, model.positions)
        packed = " and packed sequence" if "packing" in params_class(guess.task).model_fields else ""
        lines.append(Line("max_length", size, f"tokens kept of each row{packed}; {why}"))
    return tuple(lines)


def _preference_loss(guess: Guess) -> list[Line]:
    if guess.form == "judged":
        return [Line("loss", "kto", "for single completions; dpo, ipo, orpo and simpo learn from pairs")]
    if guess.task == "preference":
        return [Line("loss", "dpo", "or ipo, and without a reference model orpo and simpo")]
    return []


def _pair_lines(guess: Guess, model: Model) -> list[Line]:
    """Return the lines of a task that reads one text and writes another."""
    languages = pair_languages(guess)
    lines = []
    if "t5" in model.name.lower() and set(languages) <= set(T5_LANGUAGES):
        first, second = (T5_LANGUAGES[language] for language in languages)
        lines.append(Line("prefix", f"translate {first} to {second}: ", "T5 was pretrained with it"))
    if guess.form == "summary":
        lines.append(Line("scores", "rouge", "how generated targets are scored; bleu is for translations"))
    # The profile measures texts in columns of their own alone.
    if guess.label is not None:
        size, why = max_length(guess, model.positions)
        lines.append(Line("max_source_length", size, f"tokens kept of each source; {why}"))
        size, why = max_length(replace(guess, inputs=(guess.label,)), model.positions)
        lines.append(Line("max_target_length", size, f"tokens kept of each target, and generated; {why}"))
    lines.append(Line("generated_rows", 500, "rows that an evaluation generates, which takes most of its time", True))
    return lines


def _are_bare_numbers(guess: Guess) -> bool:
    """Return True if the classes are numbers without names, which could also be amounts."""
    return guess.label is not None and guess.label.shape in ("integer", "number") and not guess.label.class_names


def _columns(guess: Guess, labels: Labels | None) -> list[Line]:
    reasons = {name: f"column: {why}" for name, why in guess.reasons.items()}
    if labels is not None and guess.label is not None and not guess.writes_label:
        reasons[guess.label.name] = f"column: {_label_reason(guess, labels)}"
    keys = {
        "text-classification": ("text", "text_pair"),
        "token-classification": ("text",),
        "image-classification": ("image",),
        "question-answering": ("context", "question"),
        "causal-lm": (guess.form,),
        "masked-lm": ("text",),
        "seq2seq": ("translation" if guess.form == "translation" else "source",),
        "sentence-embedding": ("query", "positive") if guess.form == "ranking" else ("text_a", "text_b"),
        "reranking": ("query", "positive"),
    }.get(guess.task, ("prompt",))
    lines = [Line(key, c.name, reasons[c.name]) for key, c in zip(keys, guess.inputs, strict=False)]
    if guess.form == "translation":
        first, second = guess.inputs[0].keys[:2]
        lines += [Line("source", first, "language to read"), Line("target", second, "language to write")]
    if guess.form == "preferred" and guess.inputs[0] is guess.beside["chosen"]:
        lines = [Line("prompt", None, "none: completions are whole conversations")]
    if guess.label is not None:
        key = {"prompt": "response", "pair": "target", "summary": "target"}.get(guess.form, "label")
        key = "score" if guess.task == "sentence-embedding" else key
        lines.append(Line(key, guess.label.name, reasons[guess.label.name]))
    return [*lines, *(Line(key, column.name, f"column: {_BESIDE[key]}") for key, column in guess.beside.items())]


def _label_reason(guess: Guess, labels: Labels) -> str:
    assert guess.label is not None
    known = guess.known_labels(labels)
    if guess.form == "spans":
        return guess.reasons[guess.label.name]
    if guess.form == "regression":
        low, high = guess.label.low, guess.label.high
        far = max(abs(low), abs(high)) > _FAR_FROM_ONE
        far = far and guess.task == "text-classification"
        return f"numbers from {low:g} to {high:g}" + ("; scaled to about 0 to 1 they are learned faster" * far)
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
            locations = sources.locations[name]
            value = locations[0] if len(locations) == 1 else list(locations)
            lines.append(Line(name, value, f"{sources.rows[name]:,} rows{use}"))
        elif name in sources.missing:
            lines.append(Line(name, "PATH", sources.missing[name], is_commented=True))
    bad = sources.bad_rows + _bad_rows(guess) + (labels.nulls if labels else 0)
    if long_prompts:
        lines.append(Line("on_bad_row", "skip", "some answers may start beyond max_length; error stops at such rows"))
    elif bad or (labels is not None and guess.has_unlabelled(labels)):
        lines.append(Line("on_bad_row", "skip", "some rows have no text or no known label; error stops at them"))
    folder = guess.inputs[0].folder
    # Security: cells may name files beside the data alone, unless the job names another directory.
    if folder and not _is_beside(folder, sources):
        lines.append(Line("files_below", folder, "rows may name files below this directory only"))
    if window < _DEFAULT_WINDOW:
        lines.append(Line("window_steps", window, "batches read and encoded together; rows are large here"))
    return tuple(lines)


def _is_beside(folder: str, sources: Sources) -> bool:
    """Return True if a directory lies next to the data of every split, so that cells may name its files."""
    file = f"{folder}/x"
    places = [CellSource.from_data(DataSpec(train=locations)) for locations in sources.locations.values()]
    return all(place.holds_uri(file) if "://" in file else place.holds_path(file) for place in places)


def _window(profile: DataProfile, steps: Steps) -> int:
    """Return the batches per window: the default, or fewer if that many rows would take more than 512 MiB."""
    # A window is decoded at once: with pictures, the default would take gigabytes.
    size = profile.row_bytes * steps.batch_size * _DEFAULT_WINDOW
    return max(1, min(_DEFAULT_WINDOW, int(_DEFAULT_WINDOW * _WINDOW_BYTES / size))) if size else _DEFAULT_WINDOW


def _has_long_prompts(guess: Guess, model: Model) -> bool:
    """Return True if some rows may be cut before their first answer, so that nothing remains to learn."""
    if guess.form not in ("messages", "prompt"):
        return False
    column = guess.inputs[0]
    # The longest one, not a percentile: a single row without an answer left would stop the run.
    longest = max(column.openings if guess.form == "messages" else column.tokens, default=0)
    longest += sum(max(beside.tokens, default=0) for beside in guess.beside.values())
    # Tokens are estimates, and a template adds its own.
    return 1.5 * longest + 10 * _SPECIAL_TOKENS > max_length(guess, model.positions)[0]


def _bad_rows(guess: Guess) -> int:
    """Count unusable rows of the sample: nulls, and lists of tags of another length than their words."""
    # Of the sample alone, as it only decides whether `on_bad_row` is written. Other bad rows stop the run.
    bad = sum(column.nulls for column in guess.inputs)
    needed = ("negatives", "chosen", "rejected", "completion", "label")
    bad += sum(guess.beside[key].nulls for key in needed if key in guess.beside)
    if guess.form == "words" and guess.label:
        # Null lists count as empty in both columns, so the rows correspond.
        bad += sum(a != b for a, b in zip(guess.inputs[0].lengths, guess.label.lengths, strict=False))
    return bad + (guess.label.nulls if guess.writes_label and guess.label else 0)


def _train(guess: Guess, rows: int, steps: Steps) -> tuple[Line, ...]:
    per_epoch = -(-rows // steps.batch_size)
    size = (
        "few rows need more passes" if steps.epochs > 3 else "many rows need fewer passes" if steps.epochs < 3 else ""
    )
    if guess.form in ("preferred", "judged"):
        size = "preferences are soon learned by heart"
    # Fails on a rate that `steps_for` does not return, so a new one needs its reason here.
    reasons = {2e-5: "a usual start for fine-tuning", 5e-5: "usual for this task", _GENTLE_RATE: "small, as usual here"}
    usual = reasons[steps.learning_rate]
    return (
        Line("epochs", steps.epochs, f"passes over the {rows:,} rows{f'; {size}' if size else ''}"),
        Line("batch_size", steps.batch_size, f"rows per step over all workers: {per_epoch:,} steps per epoch"),
        Line("learning_rate", steps.learning_rate, f"{usual}; tune this value first"),
    )


def _evaluation(guess: Guess, labels: Labels | None, profile: DataProfile) -> tuple[Line, ...]:
    rare = rare_class(guess, labels) if labels is not None else None
    if rare is not None:
        share = format_percent(rare[1])
        why = f"only {share} of the labels are {rare[0]}: this mean over classes weights it like the others"
        return (Line("metric", "macro_f1", why),)
    by_task = {
        "sentence-embedding": "ndcg_at_10" if guess.form == "ranking" else "spearman",
        "reranking": "mrr_at_10",
        "preference": "reward_accuracy",
        "reward": "reward_accuracy",
    }
    metric = by_task.get(guess.task) or _METRICS.get(guess.form, "perplexity")
    return (Line("metric", metric, "decides which checkpoint is kept; the other metrics are reported too"),)


def key_lines(draft: Draft) -> Sequence[tuple[str, Line]]:
    """Return section and line of the values that the user should check first."""
    return [
        (s, line) for s in ("task", "model", "data", "train") for line in draft.sections[s] if not line.is_commented
    ]
