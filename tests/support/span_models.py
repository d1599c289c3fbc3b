"""Random models whose tokenizers split words differently from BERT's: into bytes, or at spaces only."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

from tests.support.tiny_models import byte_letters, byte_tokenizer

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def byte_bert(folder: Path) -> Path:
    """Make a BERT of single bytes, whose tokens hold the space before a word (as ModernBERT's, Llama's and Qwen's)."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *byte_letters()]
    core = byte_tokenizer(words, [])
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=128, **_SMALL)).save_pretrained(folder)
    return folder


def spaced_xlmr(folder: Path, corpus: Iterable[str], pieces: int = 400) -> Path:
    """Make an XLM-R that splits words at spaces only.

    Args:
        folder: Directory to write to.
        corpus: Texts to train its tokenizer on.
        pieces: Number of tokens; few leave single characters.
    """
    torch.manual_seed(0)
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=pieces, special_tokens=special, unk_token="<unk>", max_piece_length=16, show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    config = XLMRobertaConfig(
        vocab_size=core.get_vocab_size(), max_position_embeddings=130, pad_token_id=1, **_SMALL
    )  # fmt: skip
    XLMRobertaModel(config).save_pretrained(folder)
    return folder
