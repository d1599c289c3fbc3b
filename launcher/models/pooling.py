"""Embeddings of texts: pooling of a model's token vectors, and the files by which sentence-transformers loads it.

Runs in train and predict workers.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Pooling = Literal["mean", "cls", "last"]
# Key of each kind in 1_Pooling/config.json. All versions of sentence-transformers read these flags; `pooling_mode`,
# which replaces them in 6.x, would be ignored by older ones.
_FLAGS: Mapping[Pooling, str] = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}
_OTHER_FLAGS = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")


def embed(hidden_BTD: "torch.Tensor", mask_BT: "torch.Tensor", pooling: Pooling) -> "torch.Tensor":
    """Return the embedding of each text: its token vectors pooled, and scaled to length 1.

    Args:
        hidden_BTD: Last hidden state, any float type.
        mask_BT: Attention mask, 1 for a token and 0 for padding, which is at the end.
        pooling: Mean of the token vectors, that of the first token, or that of the last.

    Returns:
        float32 (B, D).
    """
    from torch.nn.functional import normalize

    if pooling == "cls":
        pooled = hidden_BTD[:, 0].float()
    elif pooling == "last":
        last = (mask_BT.sum(1) - 1).clamp(min=0)
        pooled = hidden_BTD.gather(1, last[:, None, None].expand(-1, 1, hidden_BTD.shape[-1]))[:, 0].float()
    else:
        # In fp32, whatever the precision of training: a sum over hundreds of tokens in bf16 keeps two digits.
        weights = mask_BT.float()
        pooled = (hidden_BTD.float() * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
    return normalize(pooled, dim=-1)


def sentence_transformer_files(
    size: int, pooling: Pooling, max_length: int, prompts: Mapping[str, str]
) -> dict[str, str]:
    """Return the files that make a transformers directory one of sentence-transformers, by relative path.

    Args:
        size: Length of an embedding.
        pooling: Kind of pooling.
        max_length: Tokens kept of each text.
        prompts: Text in front of each kind of text (query, document).
    """
    # The names of versions 2 to 5; 6.x reads them too, and writes other ones that older versions cannot import.
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    flags = {flag: flag == _FLAGS[pooling] for flag in (*_FLAGS.values(), *_OTHER_FLAGS)}
    contents: dict[str, object] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": dict(prompts), "default_prompt_name": None, "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {"word_embedding_dimension": size, **flags, "include_prompt": True},
        "2_Normalize/config.json": {},
    }  # fmt: skip
    return {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}
