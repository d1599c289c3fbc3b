"""Writes texts of other domains, rated like the quickstart's film reviews, to `data/quickstart-domains/`.

Runs on the client; needs what `prepare.py` needs, and takes the same package of the index: product reviews
(amazon.parquet), newspaper editorials (nyt.parquet) and tweets (tweets.parquet), labelled by the same rule, for

    launcher evaluate runs/quickstart --data data/quickstart-domains/amazon.parquet
"""

import html
import io
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from prepare import TEXTS, TEXTS_ARCHIVE, PrepareError, download, read_member

FOLDER = Path(__file__).resolve().parents[2] / "data" / "quickstart-domains"
DOMAINS = {
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}


def main() -> int:
    """Write one Parquet file per domain; the exit code is 2 for anything the user can mend."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            inner = io.BytesIO(read_member(download(TEXTS, Path(scratch)).read_bytes(), TEXTS_ARCHIVE))
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, member in DOMAINS.items():
        content = read_member(inner.getvalue(), f"{TEXTS_ARCHIVE.rsplit('/', 1)[1].removesuffix('.tar.gz')}/{member}")
        lines = [line.split("\t") for line in content.decode("utf-8").split("\n") if line.strip()]
        labels = ["positive" if float(line[1]) > 0 else "negative" for line in lines]
        texts = [html.unescape(line[2]).strip() for line in lines]
        pq.write_table(pa.table({"text": texts, "label": labels}), FOLDER / f"{name}.parquet")
        share = labels.count("positive") / len(labels)
        print(f"{name:<10} {len(labels):>6,} rows, {share:.1%} positive  {FOLDER / name}.parquet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
