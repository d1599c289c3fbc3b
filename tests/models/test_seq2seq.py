"""Encoder-decoder models (`launcher/models/seq2seq.py`): tokens around a target, and what a model generates."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MBart50Tokenizer, MBartTokenizer, PreTrainedTokenizerFast

from launcher.errors import ModelError
from launcher.models.seq2seq import PairTokenizer
from launcher.spec.model import ModelSpec
from launcher.tasks import build_task
from launcher.tasks.seq2seq import Seq2Seq
from launcher.tasks.text_pairs import PairParams
from tests.support.jobs import prepared_job, write_splits
from tests.support.tiny_models import make_tiny_bart, make_tiny_bert_pair


def _task(model: Path, **params: Any) -> Seq2Seq:
    return Seq2Seq(PairParams.model_validate(params), ModelSpec(name=str(model)), 0)


@pytest.fixture(scope="module")
def tiny_bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bart(tmp_path_factory.mktemp("bart") / "tiny-bart")


@pytest.fixture(scope="module")
def bert_pair(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    return make_tiny_bert_pair(tmp_path_factory.mktemp("pair") / "bert-pair", tiny_bert)


def test_decoder_reads_the_start_token_and_all_labels_but_the_last(tiny_models: dict[str, Path]) -> None:
    task = _task(tiny_models["seq2seq"], prefix="w9 ")
    rows = pa.table({"source": ["w0 w1", "w2"], "target": ["w3", "w4 w5"]})
    batch = task.collate(task.encode(rows, True).samples)
    assert batch.inputs["input_ids"].tolist() == [[12, 3, 4, 1], [12, 5, 1, 0]]
    assert batch.labels.tolist() == [[6, 1, -100], [7, 8, 1]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[0, 6, 1], [0, 7, 8]]


@pytest.mark.parametrize("kind", ["seq2seq", "bart", "pair"])
def test_losses_are_those_of_transformers(
    kind: str, tiny_models: dict[str, Path], tiny_bart: Path, bert_pair: Path
) -> None:
    task = _task({"seq2seq": tiny_models["seq2seq"], "bart": tiny_bart, "pair": bert_pair}[kind])
    encoded = task.encode(task.example_rows(5, 0), True)
    batch, model = task.collate(encoded.samples), task.build_model().eval()
    with torch.no_grad():
        losses = task.sample_losses(task.forward(model, batch), batch)
        inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        mean = float(model(**inputs, labels=batch.labels)["loss"])
    assert float(losses.sum()) / encoded.weights.sum() == pytest.approx(mean, abs=1e-5)


def test_each_row_generates_alike_alone_and_exported(tiny_bart: Path, tmp_path: Path) -> None:
    """No setting of the pretrained model's generation decides how long texts are, and the export has the job's."""
    for beams in (1, 3):
        task = _task(tiny_bart, num_beams=beams, max_new_tokens=9)
        model = task.build_model().eval()
        samples = task.encode(task.example_rows(6, 0).select(["source"]), False).samples
        texts = task.predict(model, samples).column("prediction").to_pylist()
        assert [task.predict(model, samples.slice(i, 1)).column("prediction")[0].as_py() for i in range(6)] == texts
        folder = tmp_path / str(beams)
        model.save_pretrained(folder)
        task.processor().save_pretrained(folder)
        loaded, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer(task.example_rows(6, 0).column("source").to_pylist(), padding=True, return_tensors="pt")
        generated = loaded.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        assert generated.shape[1] <= 10
        assert tokenizer.batch_decode(generated, skip_special_tokens=True) == texts


def test_only_the_first_rows_are_generated(tiny_models: dict[str, Path]) -> None:
    task = _task(tiny_models["seq2seq"], generated_rows=3, max_new_tokens=4)
    samples = task.encode(task.example_rows(4, 0), True).samples
    batch = replace(task.collate(samples), rows=(7, 2, -1, 0))
    with torch.no_grad():
        outputs = task.evaluation_forward(task.build_model().eval(), batch)
    assert (outputs["generated"][:, 0] == -100).tolist() == [True, False, True, False]
    results = task.row_results(outputs, batch, samples, [0, 1])
    assert results[0].prediction == "(only the first 3 rows are generated)" != results[1].prediction


def test_two_encoders_start_from_the_class_token(bert_pair: Path) -> None:
    task = _task(bert_pair, max_source_length=64, max_target_length=64)
    assert task.head() == {"decoder_start_token_id": 2, "pad_token_id": 0}
    assert task.build_model().generation_config.eos_token_id == 3
    # It is read, and not written once more.
    batch = task.collate(task.encode(pa.table({"source": ["w0"], "target": ["w1 w2"]}), True).samples)
    assert batch.inputs["decoder_input_ids"].tolist() == [[2, 5, 6]]
    assert batch.labels.tolist() == [[5, 6, 3]]
    facts = task.check_model()
    assert facts["model_type"] == "encoder-decoder"
    assert "classes" not in facts


def test_dropout_reaches_both_halves(bert_pair: Path, tiny_models: dict[str, Path]) -> None:
    spec = ModelSpec(name=str(bert_pair), dropout=0.0)
    model = Seq2Seq(PairParams(), spec, 0).build_model()
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    spec = ModelSpec(name=str(tiny_models["seq2seq"]), dropout=0.0)
    model = Seq2Seq(PairParams(), spec, 0).build_model()
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_lengths_beyond_the_positions_are_refused(tiny_bart: Path) -> None:
    for key in ("max_source_length", "max_target_length", "max_new_tokens"):
        lengths = {"max_source_length": 64, "max_target_length": 64, "max_new_tokens": 64, key: 65}
        with pytest.raises(ModelError) as caught:
            _task(tiny_bart, **lengths).check_model()
        assert caught.value.message == f"task.{key}: 65 is more than the model's 64 positions; lower it"


def _changed(model: Path, target: Path, name: str, **entries: Any) -> Path:
    shutil.copytree(model, target)
    content = json.loads((target / name).read_text())
    kept = {key: value for key, value in {**content, **entries}.items() if value is not None}
    (target / name).write_text(json.dumps(kept))
    return target


def test_a_decoder_without_a_start_token_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = _changed(tiny_models["seq2seq"], tmp_path / "model", "config.json", decoder_start_token_id=None)
    with pytest.raises(ModelError) as caught:
        _task(model).head()
    assert caught.value.message == (
        f"model.name: {model} has neither a decoder_start_token_id nor a bos_token_id, so its decoder has no token to "
        "start from; set decoder_start_token_id in its config.json"
    )


def test_a_tokenizer_without_an_end_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = _changed(tiny_models["seq2seq"], tmp_path / "model", "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match="has no token to end a text with"):
        _task(model).head()


def test_an_end_is_added_where_the_tokenizer_has_none(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(tiny_models["seq2seq"], tmp_path / "model")
    core = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "w0": 3, "w1": 4}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(model)
    task = _task(model, max_target_length=4)
    encoded = task.encode(pa.table({"source": ["w0", "w1"], "target": ["w1", "w0 w0 w0 w0 w0"]}), True)
    assert encoded.samples.column("labels").to_pylist() == [[4, 1], [3, 3, 3, 1]]


_MODELS_OF_LANGUAGES = {"mbart": MBartTokenizer, "mbart50": MBart50Tokenizer}


@pytest.mark.parametrize("kind", [*_MODELS_OF_LANGUAGES])
def test_languages_are_marked(kind: str, tiny_bart: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bart, tmp_path / kind)
    vocabulary = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>", "▁", "▁a", "▁b")]
    tokenizer = _MODELS_OF_LANGUAGES[kind](vocab=vocabulary)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(folder)
    spec = ModelSpec(name=str(folder))
    english, german = tokenizer.convert_tokens_to_ids(["en_XX", "de_DE"])
    pairs = PairTokenizer(spec, "en_XX", "de_DE")
    labels = pairs.target_ids(["b"], 8)[0]
    read = pairs.decoder_input_ids(torch.tensor([labels]))[0].tolist()
    assert english in pairs.source_ids(["a"], 8)[0] and german not in pairs.source_ids(["a"], 8)[0]
    if kind == "mbart":
        # Target and end, then the language: the decoder starts from the language.
        assert labels[-2:] == [2, german]
        assert read[0] == pairs.tokens.start == german
        assert pairs.tokens.language is None
    else:
        assert (labels[0], labels[-1]) == (german, 2)
        assert read[:2] == [2, german]
        assert pairs.tokens.language == german
    for source, target, wrong in (("en_XX", None, "target"), ("xx_XX", "de_DE", "source"), ("en_XX", "xx", "target")):
        with pytest.raises(ModelError, match=rf"^task\.{wrong}_lang: "):
            PairTokenizer(spec, source, target)


def test_a_language_without_a_tokenizer_for_it_is_refused(tiny_bart: Path) -> None:
    with pytest.raises(ModelError, match=r"marks no languages; drop it$"):
        PairTokenizer(ModelSpec(name=str(tiny_bart)), "en_XX", "de_DE")


def test_a_model_and_its_tokenizer_are_made_of_both_columns(tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=60, task="seq2seq")
    config = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = {"name": "", "from_config": {**config, "vocab_size": 300}}
    prepared = prepared_job(Path("none"), data, tmp_path, task={"type": "seq2seq"}, model=model)
    task = build_task(prepared.job)
    tokens = PairTokenizer(prepared.job.model, None, None).tokens
    tokenizer = AutoTokenizer.from_pretrained(prepared.job.model.name)
    names = tokenizer.convert_ids_to_tokens([tokens.start, tokens.end, tokens.pad])
    assert (names, tokens.adds_end) == (["[CLS]", "[SEP]", "[PAD]"], False)
    # Only the targets have words with three digits.
    assert any(token.isdigit() and len(token) == 3 for token in tokenizer.get_vocab())
    samples = task.encode(task.example_rows(2, 0).select(["source"]), False).samples
    assert len(task.predict(task.build_model().eval(), samples)) == 2
