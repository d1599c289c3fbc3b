"""Hugging Face dataset locations: every text has exactly one meaning."""

import pytest

from launcher.spec.hub import parse_hub


@pytest.mark.parametrize(
    ("location", "source", "config", "split"),
    [
        ("hub:imdb", "imdb", None, None),
        ("hub:imdb#test", "imdb", None, "test"),
        ("hub:org/name#train", "org/name", None, "train"),
        ("hub:org/name", "org/name", None, None),
        ("hub:nyu-mll/glue/sst2#validation", "nyu-mll/glue", "sst2", "validation"),
        ("hub:org/name/20231101.en", "org/name", "20231101.en", None),
        ("hub:org/name#train[:10%]", "org/name", None, "train[:10%]"),
        ("hub:/data/corpus/deep/er#train", "/data/corpus/deep/er", None, "train"),
        ("hub:./a/b/c/d", "./a/b/c/d", None, None),
        ("hub:~/corpus#test", "~/corpus", None, "test"),
    ],
)
def test_a_location_is_split_into_its_parts(location: str, source: str, config: str | None, split: str | None) -> None:
    assert parse_hub(location) == (source, config, split)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("hub:", "has an empty part"),
        ("hub:#train", "has an empty part"),
        ("hub:org//config#train", "has an empty part"),
        ("hub:org/name/", "has an empty part"),
        ("hub:a/b/c/d", "has 4 parts"),
        ("hub:imdb#", "names no split after the #"),
    ],
)
def test_an_ambiguous_location_is_refused(location: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_hub(location)
    assert str(caught.value).startswith(location)
    assert str(caught.value).endswith("; write hub:NAME#SPLIT, hub:ORG/NAME#SPLIT or hub:ORG/NAME/CONFIG#SPLIT")
