"""Rules that recognise data of texts by shapes and names of columns: answers, preferences, conversations, pairs.

Runs on the client; `rules.py` has their order.
"""

from launcher.errors import DataError
from launcher.init.column_roles import (
    ANSWERED,
    CONTEXTS,
    CONVERSATIONS,
    DOCUMENTS,
    JUDGED_KEYS,
    NEGATIVES,
    PAIR_KEYS,
    PREFERENCE_PROMPTS,
    PROMPTS,
    QUESTIONS,
    SIMILAR,
    SUMMARIES,
    SURE_LABELS,
    beside_of,
    is_category,
    is_id,
    kind_of,
    label_columns,
    pair_of,
    plain,
    rank,
)
from launcher.init.guess import (
    Form,
    Guess,
    UserChoices,
    agrees,
    chosen_inputs,
    find_label,
    is_by_language,
    label_reason,
    language_columns,
    text_reason,
    unread_notes,
)
from launcher.init.profile import Column, DataProfile
from launcher.models.conversation import USUAL


def guess_answers(profile: DataProfile, choices: UserChoices) -> Guess | None:
    """Recognise questions whose answers are marked in a context."""
    columns = [profile.column(choices.label, "--label")] if choices.label else profile.columns
    answers = next((c for c in columns if c.shape == "answers"), None)
    # Not `text_columns`: questions may be few and short.
    texts = [c for c in chosen_inputs(profile, choices) if c.shape == "text" and not is_id(c)]
    if answers is None or len(texts) < 2:
        return None
    question = min(texts, key=lambda c: (rank(c.name, QUESTIONS), c.mean_tokens))
    context = min((c for c in texts if c is not question), key=lambda c: (rank(c.name, CONTEXTS), -c.mean_tokens))
    why = f"column {answers.name} marks answers to {question.name} in {context.name}"
    inputs = (context, question)
    reasons = {c.name: text_reason(c) for c in inputs}
    return Guess("question-answering", "answers", inputs, None, why, reasons, (), {"answers": answers})


def guess_preferences(profile: DataProfile, choices: UserChoices) -> Guess | None:
    """Recognise pairs of completions and judged completions, by the names of their columns."""
    task = choices.task or "preference"
    by_name = {plain(c.name): c for c in profile.columns}
    texts = {name: c for name, c in by_name.items() if c.shape in ("text", "messages")}
    prompt = next((texts[name] for name in PREFERENCE_PROMPTS if name in texts), None)
    if choices.inputs or choices.label:
        return None
    form: Form
    if texts.keys() >= {"chosen", "rejected"}:
        names, form, why = PAIR_KEYS, "preferred", "columns chosen and rejected are preferences"
        if prompt is None and texts["chosen"].shape != "messages":
            return None
    elif task == "preference" and prompt and "completion" in texts and "label" in by_name:
        names, form, why = JUDGED_KEYS, "judged", "columns completion and label are judged completions"
        if by_name["label"].distinct > 2:
            return None
    else:
        return None
    beside = {name: by_name[name] for name in names}
    beside |= beside_of(profile.columns, ("system",), (*beside.values(), *((prompt,) if prompt else ())))
    inputs = (prompt or beside["chosen"],)
    notes = unread_notes(profile, (*inputs, *beside.values()))
    return Guess(task, form, inputs, None, why, {inputs[0].name: text_reason(inputs[0])}, notes, beside)


def guess_conversations(profile: DataProfile, choices: UserChoices) -> Guess | None:
    """Recognise a column of conversations."""
    conversations = [c for c in chosen_inputs(profile, choices) if c.shape == "messages"]
    if not conversations or (choices.label and choices.inputs):
        return None
    prompts = pair_of(conversations if choices.inputs else profile.columns, PROMPTS)
    # A conversation up to an answer, which another column holds.
    if prompts is not None and prompts[0].shape == "messages":
        return None
    column = min(conversations, key=lambda c: rank(c.name, CONVERSATIONS))
    if "assistant" not in column.roles:
        raise DataError(
            f"{profile.where}: column {column.name} has the roles {', '.join(column.roles[:6]) or 'none'}, and none of "
            "them is the assistant, whose messages are learned; rename a role to assistant"
        )
    reasons = {column.name: f"conversations of {', '.join(column.roles[:4])}"}
    beside = beside_of(profile.columns, ("system", "tools"), (column,))
    pair = pair_of([c for c in profile.columns if c.shape == "text" and c not in beside.values()], PROMPTS)
    if pair is None:
        notes = unread_notes(profile, (column, *beside.values()))
    else:
        # Usually the same rows in another form, whose `input` is no loss then.
        named = [c for c in profile.columns if rank(c.name, USUAL["input"]) < len(USUAL["input"])]
        notes = (
            f"columns {pair[0].name} and {pair[1].name} are not read, as {column.name} has conversations; "
            f"--text {pair[0].name} --label {pair[1].name} reads them instead",
            *unread_notes(profile, (column, *beside.values(), *named)),
        )
    why = f"column {column.name} holds conversations {_conversation_form(column)}"
    return Guess("causal-lm", "messages", (column,), None, why, reasons, notes, beside)


def _conversation_form(column: Column) -> str:
    """Return the form of conversations, by the name under which users know it."""
    form = "in ShareGPT's form" if "from" in column.keys else "of OpenAI's messages" if column.keys else "as JSON text"
    return f"{form}, with tool calls" if column.has_calls else form


def guess_prompts(profile: DataProfile, choices: UserChoices) -> Guess | None:
    """Recognise prompts and answers, by the names of their columns or the user's choice."""
    if choices.inputs and choices.label:
        prompt = profile.column(choices.inputs[0])
        answer = profile.column(choices.label)
        fits = len(choices.inputs) == 1 and (
            (answer.shape == "text" and prompt.shape in ("text", "messages"))
            or (answer.shape == "messages" and prompt.shape == "messages")
        )
        # Unless the user names the task, a column with few distinct values is a class, not an answer.
        is_class = is_category(answer) or label_columns((answer,), ())
        if not fits or (choices.task is None and is_class):
            return None
    else:
        # With a label, a question and its answer are a pair of texts to classify.
        has_label = any(rank(c.name, SURE_LABELS) < len(SURE_LABELS) for c in profile.columns)
        pair = pair_of(profile.columns, PROMPTS)
        if pair is None or choices.label == "" or (has_label and choices.task is None) or not agrees(pair, choices):
            return None
        prompt, answer = pair
    is_alpaca = (plain(prompt.name), plain(answer.name)) == ("instruction", "output")
    kind = "Alpaca's instructions and outputs" if is_alpaca else "prompts and their answers"
    why = f"columns {prompt.name} and {answer.name} are {kind}"
    reasons = {prompt.name: text_reason(prompt), answer.name: f"{text_reason(answer)}; only these are learned"}
    keys = ("system", "tools") if prompt.shape == "messages" else ("input", "system", "tools")
    beside = beside_of(profile.columns, keys, (prompt, answer))
    notes = unread_notes(profile, (prompt, answer, *beside.values()))
    return Guess("causal-lm", "prompt", (prompt,), answer, why, reasons, notes, beside)


def guess_pairs(profile: DataProfile, choices: UserChoices) -> Guess | None:
    """Recognise translations, as a column of texts by language or as two columns, and summaries."""
    structs = [c for c in chosen_inputs(profile, choices) if is_by_language(c)]
    if structs and not choices.label:
        column = structs[0]
        why = f"column {column.name} holds texts by language ({', '.join(column.keys)})"
        note = f"{column.keys[0]} is translated to {column.keys[1]}; swap task.source and task.target for the reverse"
        return Guess("seq2seq", "translation", (column,), None, why, {column.name: "texts by language"}, (note,))
    texts = [c for c in profile.columns if c.shape == "text"]
    if choices.inputs and choices.label:
        pair = profile.column(choices.inputs[0]), profile.column(choices.label)
        if choices.task is None or len(choices.inputs) != 1 or not set(pair) <= set(texts):
            return None
    else:
        # With a label, two texts are a pair to classify.
        has_label = any(rank(c.name, SURE_LABELS) < len(SURE_LABELS) for c in profile.columns)
        named = language_columns(profile)[:2] or list(pair_of(texts, SUMMARIES) or ())
        if len(named) < 2 or choices.label == "" or (has_label and choices.task is None):
            return None
        pair = named[0], named[1]
        if not agrees(pair, choices):
            return None
    source, target = pair
    is_summary = 2 * target.mean_tokens < source.mean_tokens
    what = "summaries" if is_summary else "translations"
    why = f"columns {source.name} and {target.name} are texts and their {what}"
    reasons = {source.name: text_reason(source), target.name: f"{text_reason(target)}; only these are learned"}
    return Guess("seq2seq", "summary" if is_summary else "pair", (source,), target, why, reasons)


def guess_queries(profile: DataProfile, choices: UserChoices, task: str = "sentence-embedding") -> Guess | None:
    """Recognise queries with a document that answers them, and perhaps others that do not."""
    if choices.label or (choices.inputs and choices.task is None):
        return None
    # Beside a label, a query and a passage are two texts to classify.
    has_label = bool(label_columns(profile.columns, ()))
    pair = pair_of(profile.columns, ANSWERED) or (None if has_label else pair_of(profile.columns, DOCUMENTS))
    named = chosen_inputs(profile, choices) if choices.inputs else list(pair or ())
    if len(named) not in (2, 3) or any(column.shape != "text" for column in named[:2]):
        return None
    rest = named[2:] or [c for c in profile.columns if c not in named and rank(c.name, NEGATIVES) < len(NEGATIVES)]
    negatives = [c for c in rest if c.shape in ("text", "words")][:1]
    if task == "reranking" and not negatives:
        return None
    query, positive = named[:2]
    why = f"column {positive.name} has the document that answers each {query.name}"
    reasons = {column.name: text_reason(column) for column in named[:2]}
    notes = () if task == "reranking" or not negatives else (_RERANKING_NOTE,)
    beside = {"negatives": negatives[0]} if negatives else {}
    return Guess(task, "ranking", (query, positive), None, why, reasons, notes, beside)


_RERANKING_NOTE = "a model that reads query and document together is slower and more exact: --task reranking"


def guess_scored_pairs(profile: DataProfile, choices: UserChoices) -> Guess | None:
    """Recognise pairs of texts with a number that says how similar they are."""
    if choices.inputs and choices.task is None:
        return None
    texts = chosen_inputs(profile, choices) if choices.inputs else list(pair_of(profile.columns, SIMILAR) or ())
    if len(texts) != 2 or any(column.shape != "text" for column in texts):
        return None
    label = find_label(profile, choices, [c.name for c in texts])
    # Grades are classes for `text-classification`; here any number will do, as its order is learned.
    if (
        label is None
        or label.shape not in ("number", "integer")
        or (choices.task is None and kind_of(label) != "regression")
    ):
        return None
    why = f"column {label.name} says how similar {texts[0].name} and {texts[1].name} are"
    reasons = {**{c.name: text_reason(c) for c in texts}, **label_reason(label)}
    note = "a model that reads both texts together is slower and more exact: --task text-classification"
    return Guess("sentence-embedding", "regression", tuple(texts), label, why, reasons, (note,))
