"""Random models whose tokenizers take words apart otherwise than BERT's: at bytes, or at spaces alone."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def byte_bert(folder: Path) -> Path:
    """Make a BERT of single bytes, whose tokens hold the space before a word (as ModernBERT's, Llama's and Qwen's)."""
    torch.manual_seed(0)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=128, **_SMALL)).save_pretrained(folder)
    return folder


def spaced_xlmr(folder: Path, corpus: Iterable[str], pieces: int = 400) -> Path:
    """Make an XLM-R that tells words by spaces alone.

    Args:
        folder: Where to.
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
