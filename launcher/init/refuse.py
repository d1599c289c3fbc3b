"""Data that the launcher has no task for, told from typed facts. Pure; better a sentence than a job of nonsense."""

from launcher.init.columns import Column
from launcher.init.look import DataProfile

_LANGUAGES = frozenset((
    "ar", "bg", "bn", "ca", "cs", "cy", "da", "de", "el", "en", "es", "et", "eu", "fa", "fi", "fr", "ga", "gl",
    "gu", "he", "hi", "hr", "hu", "hy", "is", "it", "ja", "ka", "kk", "kn", "ko", "lt", "lv", "mk", "ml", "mn",
    "mr", "ms", "mt", "nb", "nl", "nn", "no", "pa", "pl", "ps", "pt", "ro", "ru", "si", "sk", "sl", "sq", "sr",
    "sv", "sw", "ta", "te", "th", "tl", "tr", "uk", "ur", "uz", "vi", "zh",
))  # fmt: skip
_PREFERRED = {"chosen", "rejected"}


def unsupported_reason(look: DataProfile) -> str | None:
    """What the data is for, where that is no task of the launcher: the beginning of a sentence; else None."""
    for found in (_sound, _preference, _boxes, _pictures, _answers, _languages, _conversations, _one_hot):
        said = found(look)
        if said is not None:
            return said
    return None


def _shaped(look: DataProfile, *shapes: str) -> list[Column]:
    return [column for column in look.columns if column.shape in shapes]


def _sound(look: DataProfile) -> str | None:
    found = _shaped(look, "sound")
    return f"column {found[0].name} holds audio, for which the launcher has no task" if found else None


def _preference(look: DataProfile) -> str | None:
    names = {column.name for column in look.columns}
    if names >= _PREFERRED:
        return "columns chosen and rejected are preferences (DPO), for which the launcher has no task"
    talks = {column.name for column in _shaped(look, "messages")}
    if talks >= {"prompt", "completion"}:
        judged = "label" in names
        what = "judged answers (KTO), for which the launcher has no task" if judged else "two halves of a conversation"
        remedy = "" if judged else "; join them into one column of messages, which causal-lm reads"
        return f"columns prompt and completion are {what}{remedy}"
    return None


def _boxes(look: DataProfile) -> str | None:
    for column in look.columns:
        if {"bbox", "bboxes", "boxes"} & {column.name.lower(), *map(str.lower, column.keys)}:
            return f"column {column.name} holds boxes (object detection), for which the launcher has no task"
    return None


def _pictures(look: DataProfile) -> str | None:
    found = _shaped(look, "picture")
    if len(found) < 2:
        return None
    one, two = found[0].name, found[1].name
    if any(word in column.name.lower() for column in found for word in ("mask", "segment", "annotation")):
        return f"columns {one} and {two} are pictures and masks (segmentation), for which the launcher has no task"
    return f"columns {one} and {two} both hold pictures, and the launcher's image-classification reads one per row"


def _answers(look: DataProfile) -> str | None:
    for column in look.columns:
        if "answer_start" in column.keys or column.name == "answer_start":
            return (
                f"column {column.name} marks answers in a context (extractive question answering), for which the "
                "launcher has no task"
            )
    return None


def _languages(look: DataProfile) -> str | None:
    for column in look.columns:
        if column.feature.startswith("Translation") or (len(column.keys) > 1 and set(column.keys) <= _LANGUAGES):
            return f"column {column.name} holds translations, for which the launcher has no task"
    found = [
        column.name
        for column in _shaped(look, "text")
        if column.mean_tokens >= 3 and column.name.lower()[:2] in _LANGUAGES
    ]
    pairs = [name for name in found if len(name) == 2 or name[2:3] in ("_", "-")]
    if len(pairs) >= 2:
        return f"columns {pairs[0]} and {pairs[1]} are translations, for which the launcher has no task"
    return None


def _conversations(look: DataProfile) -> str | None:
    found = [column for column in _shaped(look, "structs") if column.problem]
    if not found or _shaped(look, "messages"):
        return None
    return f"column {found[0].name} holds conversations that causal-lm does not read ({found[0].problem})"


def _one_hot(look: DataProfile) -> str | None:
    for column in _shaped(look, "integers", "numbers"):
        binary = (column.low, column.high) == (0.0, 1.0) and column.distinct == 2
        if binary and len(set(column.lengths)) == 1 and column.lengths[0] > 2 and not _shaped(look, "words"):
            return (
                f"column {column.name} holds a 0 or 1 for each class, and the launcher reads the list of the classes "
                "that apply; write [2, 5] for [0, 0, 1, 0, 0, 1]"
            )
    return None
