"""Models small enough for tests, saved as if they were pretrained: random weights, words w0..w199, dropout 0.1."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

_WORDS = [f"w{i}" for i in range(200)]


def byte_letters() -> list[str]:
    """Return the 256 letters that byte-level BPE writes bytes with, in the order of GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def byte_tokenizer(names: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """Return a byte-level BPE without a space before the first word, as GPT-2's.

    Args:
        names: Tokens in order, `byte_letters` among them.
        merges: Merges of BPE.
    """
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def make_tiny_bert(folder: Path, hidden_size: int = 32) -> Path:
    """Save a BERT without a head."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * hidden_size, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_masked_bert(folder: Path, bert: Path) -> Path:
    """Save a tiny BERT with its language model head and a mask token."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(bert, vocab_size=len(tokenizer))
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_gpt(folder: Path, hidden_size: int = 32) -> Path:
    """Save a GPT-2 with its language model head, and a chat template of its own words."""
    words = ["<pad>", "<end>", "<unk>", "user", "assistant", ":", *_WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words), n_positions=64, n_embd=hidden_size, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_opt(folder: Path, gpt: Path) -> Path:
    """Save an OPT, which takes masks but makes none from positions, with the tokenizer of a tiny GPT."""
    PreTrainedTokenizerFast.from_pretrained(gpt).save_pretrained(folder)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=206, max_position_embeddings=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=2, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


def make_tiny_bloom(folder: Path, gpt: Path) -> Path:
    """Save a Bloom, in which packed samples attend to each other, with the tokenizer of a tiny GPT."""
    PreTrainedTokenizerFast.from_pretrained(gpt).save_pretrained(folder)
    config = BloomConfig(vocab_size=206, hidden_size=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    BloomForCausalLM(config).save_pretrained(folder)
    return folder


def make_tiny_t5(folder: Path) -> Path:
    """Save a T5, whose tokenizer ends a text by itself and whose decoder starts from the padding token."""
    words = ["<pad>", "</s>", "<unk>", *_WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(words), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_bart(folder: Path) -> Path:
    """Save a BART, which has positions, and settings of generation for texts of 30 tokens and more."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *_WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        sep_token="</s>", cls_token="<s>",
    )  # fmt: skip
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(words), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.generation_config.update(num_beams=4, early_stopping=True, length_penalty=2.0, min_length=30, max_length=60)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_bert_pair(folder: Path, bert: Path) -> Path:
    """Save two BERTs as an encoder-decoder, as `from_encoder_decoder_pretrained` makes it: without a start token."""
    torch.manual_seed(0)
    EncoderDecoderModel.from_encoder_decoder_pretrained(str(bert), str(bert)).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(bert).save_pretrained(folder)
    return folder


def make_tiny_vit(folder: Path, size: int = 16) -> Path:
    """Save a ViT without a head, for pictures of `size` x `size` pixels."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=size, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def make_tiny_resnet(folder: Path) -> Path:
    """Save a ResNet without a head, with BatchNorm in it, for pictures of 16 x 16."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
