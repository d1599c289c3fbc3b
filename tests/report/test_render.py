"""The report page is complete, works offline and escapes what users put into it (`launcher/report/render.py`)."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from launcher.report.collect import collect
from launcher.report.render import render_report, write_report
from launcher.rundir.certificate import Certificate, RunHashes
from launcher.rundir.directory import RunDir
from launcher.rundir.events import record_event
from launcher.rundir.records import ConfusionMatrix, DocumentRow, GenerationRecord, ScoresRecord
from tests.support.records import shape_proof


class Page(HTMLParser):
    """The elements, attributes and texts of a page as a browser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_write_report_publishes_and_returns_the_path(make_run: Callable[..., RunDir]) -> None:
    run = make_run("done", ("negative", "positive"))
    path = write_report(run)
    assert path == run.path("report.html")
    assert run.read_bytes("report.html").decode() == render_report(collect(run))


def test_the_page_of_a_finished_run(make_run: Callable[..., RunDir]) -> None:
    text = render_report(collect(make_run("sst2", ("negative", "positive"))))
    page = Page(text)
    assert "sst2 text-classification: accuracy 0.771 on test (chance 0.584), 400 steps, 1 min 24 s" in page.text
    order = ["Curves", "Scores on test", "Scores on validation", "Memory per worker", "Environment", "Job"]
    assert re.findall(r"<h2>(.*?)</h2>", text) == order
    parts = ("Confusion matrix", "Classes", "Worst errors", "data/test.parquet:17", "1.3 GiB", "transformers 5.23.0")
    for part in parts:
        assert part in page.text
    assert "seed: 7" in page.text and "zero.stage 2" in page.text
    assert ("a", {"href": "model/README.md"}) in page.tags
    assert "Not available yet" not in page.text
    assert "Skipped rows 5 training 3, test 2" in page.text


def test_a_proof_is_shown_shape_by_shape(make_run: Callable[..., RunDir]) -> None:
    run = make_run("sst2", ("negative", "positive"), steps=30)
    reason = "ZeRO-2 adds gradients in an order of its own"
    close = shape_proof(2, 2, inexact=(reason,), is_bit_equal=False, largest_difference=1.5e-8)
    data = collect(run)
    certificate = Certificate(
        steps=30, virtual_ranks=8, hashes=RunHashes(losses="1", evaluations="2", scores={}, weights={}),
        data_fingerprint="d", spec_hash="s", versions={}, hardware="a CPU, AVX2", threads=1, tolerance=1e-5,
        shapes=(shape_proof(1, 0), close),
    )  # fmt: skip
    page = Page(render_report(replace(data, certificate=certificate.seal())))
    sentence = "the same bits on 1 worker, ZeRO 0; the same curve within 1e-05 on 2 workers, ZeRO 2 (certificate.json)"
    assert f"Proven: {sentence}" in page.text and ("a", {"href": "#proof"}) in page.tags
    assert "30 steps in 8 parts each, 1 thread per worker, a CPU, AVX2." in page.text
    assert "1 0 2 losses, evaluations, scores, weights the same bits" in page.text
    assert f"within 1e-05, largest difference 1.5e-08 ({reason})" in page.text
    failed = shape_proof(2, 1, failure="loss at step 3: 0.5 and <b>")
    page = Page(render_report(replace(data, certificate=certificate.model_copy(update={"shapes": (failed,)}).seal())))
    assert "Not proven: another curve on 2 workers, ZeRO 1" in page.text
    assert "differs: loss at step 3: 0.5 and <b>" in page.text
    page = Page(render_report(replace(data, certificate=certificate)))
    assert "Not proven: certificate.json was changed after it was written" in page.text
    assert "Proof" not in Page(render_report(data)).text


def test_every_figure_has_one_place_on_the_page(make_run: Callable[..., RunDir]) -> None:
    page = Page(render_report(collect(make_run("done", ("a", "b", "c"), steps=30))))
    places = [attrs["data-figure"] for _, attrs in page.tags if "data-figure" in attrs]
    assert places == list(json.loads(page.scripts[0]))
    assert len(places) == 8, "five curves, the times, two confusion matrices"


def test_the_page_loads_nothing(make_run: Callable[..., RunDir]) -> None:
    text = render_report(collect(make_run("done", ("a", "b"), steps=30)))
    page = Page(text)
    assert not [attrs for _, attrs in page.tags if "src" in attrs or "srcset" in attrs]
    assert page.count("link") == page.count("img") == page.count("iframe") == 0
    assert all(not re.match(r"\w+:|//", attrs["href"] or "") for _, attrs in page.tags if "href" in attrs)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    policy = next(attrs["content"] or "" for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_the_policy_allows_exactly_the_two_scripts(make_run: Callable[..., RunDir]) -> None:
    page = Page(render_report(collect(make_run("done", ("a", "b"), steps=30))))
    policy = next(attrs["content"] or "" for tag, attrs in page.tags if attrs.get("http-equiv"))
    data, *scripts = page.scripts
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall(r"'sha256-(.*?)'", policy) == digests
    assert "unsafe" not in policy.split("script-src")[1]
    json.loads(data)


def test_hostile_text_is_escaped(make_run: Callable[..., RunDir], hostile: str) -> None:
    run = make_run("hostile", (hostile, hostile + "2", hostile + "3"), steps=30, comment=hostile)
    scores = run.read_record("scores-test.json", ScoresRecord)
    run.write_record(
        "scores-x.json",
        scores.model_copy(update={"split": hostile, "metrics": {hostile: 0.5}, "baseline": {hostile: 0.1}}),
    )
    text = render_report(collect(run))
    page = Page(text)
    assert page.count("script") == 3 and page.count("img") == 0
    assert "<script>alert" not in text and "<img" not in text.split("<script>")[0]
    assert page.texts.count(hostile) >= 10, "shown unchanged"
    figures = json.loads(page.scripts[0])
    assert not set("<>&") & set(page.scripts[0])
    assert all("<" not in name for name in figures["confusion-0"]["layout"]["xaxis"]["ticktext"])


def test_hostile_metric_names_are_escaped(make_run: Callable[..., RunDir], hostile: str) -> None:
    run = make_run("hostile", ("a", "b"), steps=30)
    lines = [
        line.model_copy(update={"metrics": {hostile: 0.5, "b": 0.1}}) if line.kind == "evaluation" else line
        for line in run.read_metrics()
    ]
    run.delete("metrics.jsonl")
    run.append_metrics(lines)
    page = Page(render_report(collect(run)))
    assert page.count("script") == 3 and page.count("img") == 0
    names = [trace["name"] for trace in json.loads(page.scripts[0])["curve-1"]["data"]]
    assert all("<" not in name for name in names)


def test_ranked_documents_are_listed_and_the_true_one_is_marked(make_run: Callable[..., RunDir], hostile: str) -> None:
    run = make_run("search", steps=30)
    scores = run.read_record("scores-test.json", ScoresRecord)
    documents = (
        DocumentRow(rank=1, score=0.83, is_true=False, text=hostile),
        DocumentRow(rank=1234, score=0.21, is_true=True, text="what was asked for"),
    )
    worst = (scores.worst[0].model_copy(update={"documents": documents}),)
    run.write_record("scores-test.json", scores.model_copy(update={"worst": worst}))
    page = Page(render_report(collect(run)))
    assert "1. 0.8300" in page.text
    assert "1,234. 0.2100 what was asked for" in page.text
    assert [tag for tag, attrs in page.tags if attrs.get("class") == "true"] == ["span", "dd"]
    assert page.texts.count(hostile) == 1
    assert page.count("script") == 3


def test_a_regression_has_no_classes(make_run: Callable[..., RunDir]) -> None:
    page = Page(render_report(collect(make_run("sts", steps=30))))
    for part in ("Confusion", "confusions", "Classes", "chance"):
        assert part not in page.text
    assert "pearson 0.7870 0.0000" in page.text and "baseline" in page.text


def test_generated_texts_stand_beside_the_true_ones(make_run: Callable[..., RunDir]) -> None:
    run = make_run("translated", steps=30)
    line = GenerationRecord(step=30, row=4, inputs={"en": "a dog"}, prediction="eine Katze", target="ein Hund")
    run.append_metrics([line, line.model_copy(update={"row": 5, "target": None})])
    scores = run.read_record("scores-test.json", ScoresRecord)
    run.write_record("scores-test.json", scores.model_copy(update={"notes": ("bleu: nrefs:1|tok:13a",)}))
    page = Page(render_report(collect(run)))
    assert "en a dog target ein Hund step 30 eine Katze" in page.text
    assert page.text.count("target ein Hund") == 1
    assert "bleu: nrefs:1|tok:13a" in page.text


def test_a_run_with_only_a_job_file(begun: RunDir) -> None:
    text = render_report(collect(begun))
    page = Page(text)
    assert "No training step is logged yet (metrics.jsonl)." in page.text
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Job"]
    assert len(page.scripts) == 1 and len(text) < 20_000, "no plotly.js without charts"


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "scores-test.json", "environment.json", "plan.json", "result.json", "model"]
)
def test_any_part_may_be_missing(make_run: Callable[..., RunDir], name: str) -> None:
    run = make_run("partial", ("a", "b"), steps=30)
    run.delete(name)
    assert "partial" in Page(render_report(collect(run))).text


def test_long_texts_are_folded(make_run: Callable[..., RunDir], long_text: str) -> None:
    page = Page(render_report(collect(make_run("done", ("a", "b"), steps=30))))
    assert sum(attrs.get("class") == "clipped" for _, attrs in page.tags) == 2, "one long row in each split"
    assert long_text.strip() in page.text, "the whole text is in the fold"
    assert "Show 4 more" in page.text


def test_a_very_long_text_is_cut_with_a_note(make_run: Callable[..., RunDir]) -> None:
    run = make_run("done", ("a", "b"), steps=30)
    scores = run.read_record("scores-test.json", ScoresRecord)
    long_row = scores.worst[0].model_copy(update={"inputs": {"text": "x" * 50_000}})
    run.write_record("scores-test.json", scores.model_copy(update={"worst": (long_row,)}))
    text = render_report(collect(run))
    assert "30,000 more characters are not shown" in text and "x" * 20_001 not in text


def test_too_many_classes_for_a_matrix(make_run: Callable[..., RunDir]) -> None:
    run = make_run("many", ("a", "b"), steps=30)
    scores = run.read_record("scores-test.json", ScoresRecord)
    labels = tuple(f"c{i}" for i in range(150))
    counts = tuple(tuple(int(i == j) + 5 * (j == i + 1) for j in range(150)) for i in range(150))
    matrix = ConfusionMatrix(labels=labels, counts=counts)
    run.write_record("scores-test.json", scores.model_copy(update={"confusion": matrix}))
    page = Page(render_report(collect(run)))
    assert "The confusion matrix of 150 classes is too large to show; see scores-test.json." in page.text
    assert "c0 c1 5 83.3 %" in page.text, "the largest confusions are still listed"


def test_events_are_listed(begun: RunDir, hostile: str) -> None:
    assert 'id="events"' not in render_report(collect(begun))
    record_event(begun, "worker-lost", 37, f"the worker of rank 1 was lost {hostile}")
    page = render_report(collect(begun))
    assert "<h2>Events</h2>" in page and "worker-lost" in page and hostile not in page
