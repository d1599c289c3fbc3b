"""What a comparison of the splits found: the typed record leakage.json, and it in words. Runs anywhere.

`data/leakage/duplicates.py` compares, `driver/preflight.py` decides when and what follows.
"""

from launcher.rundir.records import Record


class LeakExample(Record):
    """One row that two splits have in common."""

    file: str
    file_row: int
    """Row number inside the file, from 0."""
    other_file: str
    other_file_row: int


class LeakPair(Record):
    """How many rows of one split are in another too."""

    split: str
    """Whose rows were looked for: validation, test."""
    other: str
    """Where: train, validation."""
    rows: int
    """Rows of the split that were looked for; those whose inputs are all null are not among them."""
    share: float = 1.0
    """Part of its contents that was looked for; below 1 where the evaluation splits are huge."""
    searched_rows: int
    """Rows of the other split that were looked at; less than `other_rows` where it is huge."""
    other_rows: int
    duplicates: int
    """Rows of the split whose inputs are in the other one."""
    other_label: int | None
    """Those that have another label there, at least once; null where the task learns from its inputs alone."""
    examples: tuple[LeakExample, ...]
    """The first of them."""

    @property
    def whole(self) -> bool:
        """Whether all rows were compared, and not a part that stands for them."""
        return self.searched_rows == self.other_rows and self.share == 1


class LeakageRecord(Record):
    """leakage.json: the rows that the splits of a run have in common."""

    fingerprints: dict[str, str]
    """Of the data of each split: other data are compared anew."""
    columns: tuple[str, ...]
    """Whose values must be equal."""
    pairs: tuple[LeakPair, ...]
    seconds: float

    @property
    def leaks(self) -> tuple[LeakPair, ...]:
        """The pairs of splits that have rows in common."""
        return tuple(pair for pair in self.pairs if pair.duplicates)


def leak_sentences(record: LeakageRecord) -> tuple[str, ...]:
    """One sentence per pair of splits that have rows in common or were not compared whole; without a remedy."""
    return tuple(_sentence(pair) for pair in record.pairs if pair.duplicates or not pair.whole)


def clean_sentence(record: LeakageRecord) -> str:
    """What can be said where no splits have rows in common; "" where some have."""
    if record.leaks or not record.pairs:
        return ""
    return "no row of " + ", none of ".join(f"{pair.split} is in {pair.other}" for pair in record.pairs)


def _sentence(pair: LeakPair) -> str:
    share = 100 * pair.duplicates / pair.rows if pair.rows else 0.0
    least = "at least " if pair.duplicates and pair.searched_rows < pair.other_rows else ""
    are = "is" if pair.duplicates == 1 else "are"
    text = f"{least}{pair.duplicates} of {pair.rows} {pair.split} rows {are} also in {pair.other} ({share:.1f} %)"
    if pair.other_label:
        text += f", {pair.other_label} of them with another label"
    if pair.examples:
        first = pair.examples[0]
        text += f", first: {first.file}:{first.file_row} and {first.other_file}:{first.other_file_row}"
    if pair.searched_rows < pair.other_rows:
        text += f"; compared with {pair.searched_rows:,} of {pair.other_rows:,} {pair.other} rows, drawn at random"
    if pair.share < 1:
        text += f"; {pair.share:.1%} of the {pair.split} rows, drawn by their content, stand for all"
    return text
