"""Broken models, and models that do not fit the task: `launcher check` and `launcher train` refuse each."""

from pathlib import Path

from tests.support.desk import Case, Desk, check_and

_AGAIN = "copy or download it again"


def _elsewhere(desk: Desk, name: str, content: str = "") -> list[str]:
    desk.file(name, content)
    return [f"model.name={name}"]


def _folder(desk: Desk, *names: str) -> list[str]:
    Path("other").mkdir()
    for name in names:
        desk.file(f"other/{name}")
    return ["model.name=other"]


def _replaced(desk: Desk, name: str, content: str | bytes) -> None:
    desk.model()
    desk.file(f"model/{name}", content)


MODELS = [
    Case("a directory that is not there", lambda desk: ["model.name=./nowhere"],
         "model.name: there is no directory ./nowhere; give one that exists, or a hub name"),
    Case("a path with too many parts for the hub", lambda desk: ["model.name=models/bert/base"],
         "model.name: there is no directory models/bert/base; give one that exists, or a hub name"),
    Case("a hub name without a network", lambda desk: ["model.name=bert-base-nowhere"],
         "model.name: bert-base-nowhere is not a directory of this machine, and neither the hub nor its cache has it; "
         "give a directory, fix the name, or check the network"),
    Case("the weights instead of their directory", lambda desk: _elsewhere(desk, "m.safetensors"),
         "model.name: m.safetensors is a file (give the directory that holds config.json)"),
    Case("GGUF", lambda desk: _elsewhere(desk, "m.gguf", "GGUF"),
         "model.name: m.gguf is a file (GGUF files cannot be trained; give the directory that holds config.json)"),
    Case("an empty directory", lambda desk: _folder(desk),
         "model.name: DESK/other has no config.json (it is empty); give the directory that `save_pretrained` wrote"),
    Case("a checkpoint of DeepSpeed", lambda desk: _folder(desk, "mp_rank_00_model_states.pt", "latest"),
         "model.name: DESK/other has no config.json (it holds latest, mp_rank_00_model_states.pt); give the directory "
         "that `save_pretrained` wrote"),
    Case("adapters without their model", lambda desk: _folder(desk, "adapter_config.json", "adapter_model.safetensors"),
         "model.name: DESK/other has no config.json (it holds adapter_config.json, adapter_model.safetensors); give "
         "the directory that `save_pretrained` wrote"),
    Case("a revision of a directory", lambda desk: ["model.revision=main"],
         "model.revision: main is the hub's, but DESK/model is a directory; drop it, or give a hub name"),
    Case("a configuration that is no JSON", lambda desk: _replaced(desk, "config.json", "{"),
         "model.name: DESK/model/config.json is not JSON (Expecting property name enclosed in double quotes: line 1 "
         f"column 2 (char 1)); {_AGAIN}"),
    Case("a configuration that is a list", lambda desk: _replaced(desk, "config.json", "[]"),
         f"model.name: DESK/model/config.json is not a JSON object; {_AGAIN}"),
    Case("a configuration of no model", lambda desk: _replaced(desk, "config.json", "{}"),
         "model.name: DESK/model cannot be loaded (Unrecognized model in DESK/model); give a model directory or a hub "
         "name"),
    Case("an architecture that nobody knows", lambda desk: desk.config(model_type="berd"),
         "model.name: DESK/model cannot be loaded (The checkpoint you are trying to load has model type `berd` but "
         "Transformers does not recognize this architecture); give a model directory or a hub name"),
    Case("code of its own",
         lambda desk: desk.config(model_type="berd", auto_map={"AutoConfig": "configuration_berd.Berd"}),
         "model.name: DESK/model wants to run its own code; read that code, then set model.trust_remote_code: true"),
    Case("the architecture of another task", lambda desk: desk.config(model_type="vit"),
         "model.name: DESK/model is a vit model, of which transformers has no AutoModelForSequenceClassification; give "
         "a model that can do the task"),
    Case("an encoder for pictures that reads texts", lambda desk: ["task={type: image-classification, image: text}"],
         "model.name: DESK/model is a bert model, of which transformers has no AutoModelForImageClassification; give a "
         "model that can do the task"),
    Case("sizes that do not divide", lambda desk: desk.config(hidden_size=33),
         "model.name: the configuration of DESK/model makes no valid bert model (The hidden size (33) is not a "
         "multiple of the number of attention heads (2)); fix its keys"),
    Case("a size that is a word", lambda desk: desk.config(hidden_size="wide"),
         "model.name: DESK/model cannot be loaded (Validation error for field 'hidden_size': TypeError: Field "
         "'hidden_size' expected int, got str (value: 'wide')); give a model directory or a hub name"),
    Case("an activation that is none", lambda desk: desk.config(hidden_act="glue"),
         "model.name: the configuration of DESK/model makes no valid bert model (KeyError: 'glue'); fix its keys"),
    Case("longer texts than the model has positions", lambda desk: ["task.max_length=65"],
         "task.max_length: 65 is more than the model's 64 positions; lower it"),
]  # fmt: skip

CHANGED = [
    Case("a configuration of an architecture that nobody knows",
         lambda desk: ["model={from_config: {model_type: gpt-17}}"],
         "model.from_config: gpt-17 refuses its settings (Unrecognized model identifier: gpt-17. ...); fix its keys"),
    Case("a configuration whose sizes do not divide",
         lambda desk: ["model={from_config: {model_type: bert, hidden_size: 33, num_attention_heads: 2}}"],
         "model.from_config: it makes no valid bert model (The hidden size (33) is not a multiple of the number of "
         "attention heads (2)); fix its keys"),
    Case("a vocabulary that is a word", lambda desk: ["model={from_config: {model_type: bert, vocab_size: large}}"],
         "model.from_config: vocab_size is large, which is not a whole number of at least 1; fix it"),
    Case("a configuration for another task", lambda desk: ["model={from_config: {model_type: vit}}"],
         "model.from_config: it is a vit model, of which transformers has no AutoModelForSequenceClassification; give "
         "a model that can do the task"),
    Case("adapters for layers that are not there", lambda desk: ["model.lora={target_modules: [quary]}"],
         "model.lora.target_modules: quary is not a layer of this bert model; did you mean query?"),
    Case("adapters for layers of another model", lambda desk: ["model.lora={target_modules: [c_attn]}"],
         "model.lora.target_modules: c_attn is not a layer of this bert model; its linear layers are classifier, "
         "dense, key, query, value"),
    Case("adapters for layers that take none", lambda desk: ["model.lora={target_modules: [LayerNorm]}"],
         "model.lora.target_modules: LayerNorm is a LayerNorm, which takes no adapter; its linear layers are "
         "classifier, dense, key, query, value"),
    Case("adapters for a pattern of layers that are not there",
         lambda desk: ["model.lora={target_modules: ['layer.9.*']}"],
         "model.lora.target_modules: layer.9.* is not a layer of this bert model; its linear layers are classifier, "
         "dense, key, query, value"),
    Case("adapters for embeddings", lambda desk: ["model.lora={target_modules: [word_embeddings]}"],
         "model.lora.target_modules: word_embeddings is an Embedding, which takes no adapter; its linear layers are "
         "classifier, dense, key, query, value"),
    Case("4-bit weights that are trained", lambda desk: ["model.quantization=nf4"],
         "override model.quantization=nf4: model.quantization is nf4, and weights of 4 bits cannot be trained; add "
         "lora, or drop quantization"),
    Case("new tokens whose embeddings are frozen",
         lambda desk: ["model.add_tokens=[<a>]", "model.freeze={embeddings: true}"],
         "model.freeze: freezes the embeddings, and those of model.add_tokens must be trained; freeze less, or use "
         "model.lora, which trains the new rows alone"),
    Case("adapters for no layers", lambda desk: ["model.lora={target_modules: []}"],
         "override model.lora={target_modules: []}: model.lora.target_modules is [], which has fewer than 1 item; give "
         "..."),
]  # fmt: skip


@check_and("train", [*MODELS, *CHANGED])
def test_a_broken_model_is_refused(command: str, case: Case, desk: Desk) -> None:
    desk.refuses_case(command, case)
