"""`launcher init`: the files that it writes pass `launcher check`; wrong input is one sentence."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import launcher.cli.main as cli
from launcher.cli import init
from launcher.spec.loader import load_job
from launcher.tasks import params_class
from tests.support import toy_data
from tests.support.command_line import CommandLine
from tests.support.toy_data import ROWS, chats, cycle, words


@pytest.fixture
def run(launcher: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Run commands in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return launcher


def _write(table: pa.Table, **splits: pa.Table) -> None:
    Path("d").mkdir()
    for name, part in {"train": table, **splits}.items():
        pq.write_table(part, f"d/{name}.parquet")


_NAMED = toy_data.named_classes(pa.table({"text": words(), "label": cycle(0, 1)}), "label", ["no", "yes"])


@pytest.mark.parametrize(
    ("table", "task", "written"),
    [
        (toy_data.SINGLE, "text-classification", {"text": "review", "label": "stars", "kind": "single-label"}),
        (_NAMED, "text-classification", {"text": "text", "label": "label"}),
        (toy_data.PAIR, "text-classification", {"text": "premise", "text_pair": "hypothesis", "label": "label"}),
        (toy_data.REGRESSION, "text-classification",
         {"text": "question", "text_pair": "passage", "label": "score", "kind": "regression"}),
        (toy_data.SCORED, "sentence-embedding",
         {"text_a": "sentence1", "text_b": "sentence2", "score": "score", "loss": "cosent"}),
        (toy_data.RANKED, "sentence-embedding",
         {"query": "anchor", "positive": "positive", "negatives": "negatives"}),
        (toy_data.MULTI, "text-classification", {"text": "text", "label": "labels", "kind": "multi-label"}),
        (toy_data.TAGS, "token-classification", {"text": "tokens", "label": "ner_tags"}),
        (toy_data.SPANS, "token-classification", {"text": "text", "label": "entities"}),
        (toy_data.ANSWERS, "question-answering",
         {"context": "context", "question": "question", "answers": "answers"}),
        (toy_data.TEXTS, "causal-lm", {"text": "text"}),
        (toy_data.MESSAGES, "causal-lm", {"messages": "messages"}),
        (toy_data.PROMPTS, "causal-lm", {"prompt": "instruction", "response": "output", "input": "input"}),
        (toy_data.IMAGES, "image-classification", {"image": "image", "label": "label"}),
    ],
)  # fmt: skip
def test_the_written_job_file_passes_check(
    table: pa.Table, task: str, written: dict[str, str], run: CommandLine, tiny_models: dict[str, Path]
) -> None:
    _write(table, validation=table.slice(0, 20), test=table.slice(20, 10))
    code, out, err = run("init", "d", "--model", str(tiny_models[task]))
    assert (code, err) == (0, "") and out.endswith("Next:\n  launcher check job.yaml\n  launcher train job.yaml\n")
    job = load_job("job.yaml", (), params_class)
    task_keys = {key: value for key, value in job.task.parameters().items() if key != "max_length"}
    assert (job.name, job.task.type, task_keys) == ("d", task, written)
    assert (job.data.train, job.data.validation) == (("d/train.parquet",), ("d/validation.parquet",))
    lines = Path("job.yaml").read_text().splitlines()
    keys = [(above, line) for above, line in zip(lines, lines[1:], strict=False) if line.startswith("  ")]
    assert all("  # " in line or above.startswith("  # ") for above, line in keys) and max(map(len, lines)) <= 120
    code, out, err = run("check", "job.yaml")
    assert code == 0, err
    assert "60 train, 20 validation, 10 test" in out and not Path("runs").exists()


def test_other_formats_are_converted_once(run: CommandLine, tiny_bert: Path) -> None:
    pa.csv.write_csv(toy_data.SINGLE, "reviews.csv")
    code, _, err = run("init", "reviews.csv", "--model", str(tiny_bert), "-o", "mine.yaml", "--split", "0.2")
    assert code == 0, err
    job = load_job("mine.yaml")
    assert job.name == "mine"
    assert job.data.train == ("mine-data/train.parquet",) and job.data.validation == ("mine-data/validation.parquet",)
    assert sum(pq.read_metadata(f"mine-data/{n}.parquet").num_rows for n in ("train", "validation")) == ROWS
    assert run("check", "mine.yaml")[0] == 0


def test_missing_validation_data_is_noted(run: CommandLine) -> None:
    _write(toy_data.TEXTS)
    _, out, _ = run("init", "d", "--yes")
    assert "note: validation data: none was found; without it the last weights are kept, not the best ones; " in out
    assert "--split 0.1 splits rows off, --validation names a file" in out
    assert "# validation: PATH" in Path("job.yaml").read_text() and not Path("job-data").exists()
    pq.write_table(toy_data.TEXTS, "d/dev.parquet")
    assert "none was named (d/dev.parquet may be it); without it" in run("init", "d/train.parquet", "--force")[1]


def test_splits_that_do_not_fit_are_left_out(run: CommandLine) -> None:
    _write(
        toy_data.PAIR,
        validation=toy_data.PAIR.drop_columns("label"),
        test=toy_data.PAIR.set_column(2, "label", [cycle(-1)]),
    )
    code, out, _ = run("init", "d")
    assert code == 0
    assert "note: d/validation.parquet is not used: it has no column label; `launcher predict` reads it" in out
    assert "note: d/test.parquet is not used: none of its labels is one of the training data (label)" in out
    job = load_job("job.yaml")
    assert job.data.validation is None and job.data.test is None
    error = run("init", "d/train.parquet", "--test", "d/test.parquet", "--force").err
    assert error.startswith("--test d/test.parquet: none of its labels is one of the training data (label); give one")


def test_rows_without_a_label_are_skipped(run: CommandLine, tiny_bert: Path) -> None:
    table = toy_data.named_classes(pa.table({"text": words(), "label": cycle(0, 1, -1)}), "label", ["no", "yes"])
    _write(table)
    assert run("init", "d", "--model", str(tiny_bert))[0] == 0
    assert load_job("job.yaml").data.on_bad_row == "skip"
    assert run("check", "job.yaml")[0] == 0


def test_data_is_not_overwritten_by_its_own_split(run: CommandLine) -> None:
    Path("job-data").mkdir()
    pq.write_table(toy_data.SINGLE, "job-data/train.parquet")
    before = Path("job-data/train.parquet").read_bytes()
    code, _, err = run("init", "job-data/train.parquet", "--split", "0.1", "--force")
    assert code == 2 and err.endswith("train.parquet: lies where its parts would be written; give another --output\n")
    assert Path("job-data/train.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere does not exist; give a file, a directory or a glob that does"),
        (["empty.parquet"], "empty.parquet has no rows; give a file that has"),
        (["broken.parquet"], "/broken.parquet: not a readable parquet file ("),
        (["d", "-o", "taken.yaml"], "--output taken.yaml: exists already; name another file, or --force"),
        (["d", "-o", "d"], "--output d: is a directory; name a file in it, d/job.yaml"),
        (["d", "--task", "text-clasification"], "did you mean text-classification?"),
        (["d", "--name", "a b"], "--name a b: is not made of at most 63 letters, digits, dots, dashes and underscores"),
        (["d", "--model", "./no"], "--model ./no: there is no such directory; give one that exists, or a hub name"),
        (["d", "--label", "star"], "--label star: d has no such column; did you mean stars?"),
        (["d", "--label", "one"], "--label one: holds only the label 'x'; at least two classes are needed"),
        (["d", "--label", "id"], "--label id: has 60 different values in 60 rows, too many for classes; name another"),
        (["d", "--validation", "no.parquet"], "no.parquet does not exist; give a file, a directory or a glob"),
        (["d", "--validation", "d", "--split", "0.1"], "--split 0.1: there is validation data already (d); drop"),
        (["d", "--split", "0.1", "-o", "cut.yaml"], "cut-data/train.parquet: exists already; give another --output"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(arguments: list[str], sentence: str, run: CommandLine) -> None:
    _write(toy_data.SINGLE.append_column("one", pa.array(["x"] * ROWS)))
    pq.write_table(toy_data.SINGLE.slice(0, 0), "empty.parquet")
    Path("broken.parquet").write_text("no")
    Path("taken.yaml").write_text("mine")
    Path("cut-data").mkdir()
    Path("cut-data/train.parquet").write_text("mine")
    code, out, err = run("init", *arguments)
    assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1
    assert not Path("job.yaml").exists() and Path("taken.yaml").read_text() == "mine"


def _answer(monkeypatch: pytest.MonkeyPatch, *answers: str, flags: tuple[str, ...] = ()) -> str:
    """Answer the questions on a terminal and return everything shown."""
    monkeypatch.setattr(init, "_is_terminal", lambda: True)
    result = CliRunner().invoke(cli.app, ["init", "d", *flags], input="".join(f"{answer}\n" for answer in answers))
    assert result.exception is None, result.exception
    return result.output


def test_questions_on_a_terminal(run: CommandLine, monkeypatch: pytest.MonkeyPatch, tiny_bert: Path) -> None:
    _write(toy_data.SINGLE)
    seen = _answer(monkeypatch, "", "", "", "./nowhere", str(tiny_bert), "y")
    assert "d: 60 rows" in seen and "label: 3 different" in seen  # the table
    assert "It looks like text-classification: texts are in column review, their labels in stars." in seen
    assert "--model ./nowhere: there is no such directory" in seen
    job = load_job("job.yaml")
    assert job.model.name == str(tiny_bert) and job.data.validation == ("job-data/validation.parquet",)


def test_answers_change_the_guess(run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(pa.table({"a": words(), "b": words(seed=1), "c": cycle("x", "y")}))
    seen = _answer(monkeypatch, "translation", "causal-lm", "a", "bb", "a", "b", "gpt2", "n")
    assert "translation is none of them" in seen and "--label bb: d has no such column" in seen
    job = load_job("job.yaml")
    assert job.task.parameters()["prompt"] == "a" and job.task.parameters()["response"] == "b"
    assert job.data.validation is None and job.task.parameters()["chat_template"] == "chatml"


def test_answers_can_choose_a_task_for_unsupported_data(run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(pa.table({"story": words(), "labels": cycle([0, 1, 0], [1, 1, 0])}))
    seen = _answer(monkeypatch, "causal-lm", "story", "", "", "n", flags=("--force",))
    assert "holds a 0 or 1 for each class" in seen
    assert load_job("job.yaml").task.parameters()["text"] == "story"


def test_files_of_other_splits_are_offered(run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(toy_data.TEXTS, validation=toy_data.TEXTS, test=toy_data.TEXTS)
    Path("d").rename("e")
    monkeypatch.setattr(init, "_is_terminal", lambda: True)
    result = CliRunner().invoke(cli.app, ["init", "e/train.parquet"], input="\n\n\n\ny\nn\n")
    assert "Use e/validation.parquet for validation? [Y/n]" in result.output
    job = load_job("job.yaml")
    assert job.data.validation == ("e/validation.parquet",) and job.data.test is None


def test_options_answer_in_advance(run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(pa.table({"prompt": words(), "messages": chats()}))
    assert "model (" in _answer(monkeypatch, "messages", "", "", "n", flags=("--task", "causal-lm"))
    assert load_job("job.yaml").task.parameters()["messages"] == "messages"
    seen = _answer(monkeypatch, flags=("--yes", "--force", "-o", "job.yaml"))
    assert "?" not in seen
