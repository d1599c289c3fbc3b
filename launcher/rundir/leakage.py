"""Rows that splits have in common: the record leakage.json and its sentences. Runs anywhere.

`data/leakage/duplicates.py` compares the splits; `driver/preflight.py` decides when, and what happens then.
"""

from launcher.rundir.records import Record


class LeakExample(Record):
    """One row that occurs in two splits."""

    file: str
    file_row: int
    """Row number inside the file, from 0."""
    other_file: str
    other_file_row: int


class LeakPair(Record):
    """Rows of one split that another split contains too."""

    split: str
    """Split whose rows were searched for: validation or test."""
    other: str
    """Split that was searched: train or validation."""
    rows: int
    """Rows searched for. Rows whose inputs are all null do not count."""
    share: float = 1.0
    """Fraction of the split's distinct rows that was searched for; below 1 for huge evaluation splits."""
    searched_rows: int
    """Rows of the other split that were compared; fewer than `other_rows` if it is huge."""
    other_rows: int
    duplicates: int
    """Rows of the split whose inputs occur in the other one."""
    other_label: int | None
    """Duplicates with a different label there, at least once; null if the task has no labels."""
    examples: tuple[LeakExample, ...]
    """First duplicates."""

    @property
    def whole(self) -> bool:
        """Return True if all rows were compared, not a sample."""
        return self.searched_rows == self.other_rows and self.share == 1


class LeakageRecord(Record):
    """Content of leakage.json: the rows that the splits of a run have in common."""

    damage_remedy = "remove it, and `launcher train` compares the splits again if the run is not finished"

    fingerprints: dict[str, str]
    """Fingerprint of each split's data. Changed data are compared again."""
    columns: tuple[str, ...]
    """Columns whose values must be equal."""
    pairs: tuple[LeakPair, ...]
    seconds: float

    @property
    def leaks(self) -> tuple[LeakPair, ...]:
        """Pairs of splits that have rows in common."""
        return tuple(pair for pair in self.pairs if pair.duplicates)


def leak_sentences(record: LeakageRecord) -> tuple[str, ...]:
    """Return one sentence per pair of splits with common rows or a partial comparison; without a remedy."""
    return tuple(_sentence(pair) for pair in record.pairs if pair.duplicates or not pair.whole)


def no_leak_sentence(record: LeakageRecord) -> str:
    """Return the sentence for splits without common rows; "" if some have any."""
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
