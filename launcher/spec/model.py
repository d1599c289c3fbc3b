"""`model:` in the job file: the model to start from, and which of its weights to train. Runs anywhere."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from launcher.spec.base import Section


class LoraSpec(Section):
    """`model.lora:` Low-rank adapters (LoRA, Hu et al. 2022, arXiv:2106.09685), implemented by peft."""

    rank: int = Field(default=16, ge=1)
    """Rank of each adapter."""

    alpha: float = Field(default=32.0, gt=0.0)
    """Scale of the adapters: their output is multiplied by alpha / rank, or alpha / sqrt(rank) if rank-stabilized."""

    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank), which keeps large ranks learning (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""

    dora: bool = False
    """Learn the length of each row of a weight apart from its direction (DoRA, Liu et al. 2024, arXiv:2402.09353):
    closer to full fine-tuning at small ranks, for more compute."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout probability of each adapter's input."""

    target_modules: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Layers that get an adapter, by the end of their names, with * and ?: `q_proj`, `layers.1?.*_proj`; null means
    every linear layer except a language model's output layer (arXiv:2305.14314). Layers that are new, such as a head,
    get none: they are trained in full."""


class FreezeSpec(Section):
    """`model.freeze:` Weights that are not trained: no gradients, no optimizer states. The keys add up."""

    backbone: bool = False
    """Freeze everything except the task's head (linear probing)."""

    embeddings: bool = False
    """Freeze everything before the first layer."""

    layers: int = Field(default=0, ge=0)
    """Number of layers to freeze, counted from the embeddings: blocks of a transformer, stages of a ResNet."""

    names: tuple[str, ...] = ()
    """Names of parameters or modules to freeze, with * and ?: `*.LayerNorm.*`, `bert.pooler`."""


class ModelSpec(Section):
    """`model:` The model to start from, how to load it and which weights to train."""

    name: str = ""
    """Directory, or name on the Hugging Face Hub, for `from_pretrained`. With `from_config` it is the source of the
    tokenizer or image processor only."""

    from_config: dict[str, JsonValue] | None = None
    """Model config for training from random weights: `model_type` (gpt2, bert, vit, resnet) and keys of its config.
    Without `name`, a tokenizer of `vocab_size` tokens is trained on the training data."""

    lora: LoraSpec | None = None
    """Train low-rank adapters and the head instead of all weights; null trains all weights."""

    quantization: Literal["nf4"] | None = None
    """Keep the frozen weights of the linear layers in 4 bits under `lora` (QLoRA, Dettmers et al. 2023,
    arXiv:2305.14314): a quarter of the memory of bf16. Needs bitsandbytes; not for ZeRO-3."""

    add_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tokens to add to the tokenizer, in this order; those that it has are skipped. Their embeddings start near the
    mean of the others and are trained, also under `lora`."""

    freeze: FreezeSpec | None = None
    """Freeze a part of the weights; `launcher check` prints which. Frozen BatchNorm layers keep their statistics."""

    revision: str | None = None
    """Commit, branch or tag on the Hub; null means the default branch."""

    trust_remote_code: bool = False
    """Allow Python code from the model repository to run on every machine of the run."""

    allow_pickle: bool = False
    """Allow weights in pickle format (pytorch_model.bin), which can run code when they are loaded."""

    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Dropout probability, set in the whole model config; null keeps the model's own values."""

    batch_norm: Literal["frozen", "trained"] | None = None
    """BatchNorm statistics in training: `frozen` keeps the pretrained ones, `trained` computes them over each part of a
    global batch (`train.virtual_ranks`); null means `trained` with `from_config`, else `frozen`."""

    def exported(self, directory: str) -> "ModelSpec":
        """Return the spec that loads a finished run's exported model, with the same permissions."""
        # The export holds whole weights, with adapters merged into them and rows for the new tokens: nothing may be
        # added or frozen again.
        return self.model_copy(
            update={
                "name": directory, "revision": None, "from_config": None, "lora": None, "freeze": None,
                "quantization": None, "add_tokens": (),
            }
        )  # fmt: skip

    @property
    def trains_batch_norm(self) -> bool:
        """Return True if BatchNorm statistics are computed in training."""
        return self.batch_norm == "trained" or (self.batch_norm is None and self.from_config is not None)

    @model_validator(mode="after")
    def _check_sources(self) -> "ModelSpec":
        if not self.name and self.from_config is None:
            raise ValueError("name is missing; give a model directory or Hub name, or a from_config")
        if self.from_config is not None and not isinstance(self.from_config.get("model_type"), str):
            raise ValueError("from_config needs a model_type, such as gpt2, bert, vit or resnet")
        if self.freeze is not None and self.lora is not None:
            raise ValueError("freeze has no effect with lora, which trains only its adapters and the head; drop freeze")
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                f"quantization is {self.quantization}, and weights of 4 bits cannot be trained; add lora, or drop "
                "quantization"
            )
        if self.quantization is not None and self.from_config is not None:
            raise ValueError(
                f"quantization is {self.quantization}, and from_config starts from random weights, which must be "
                "trained; drop one of them"
            )
        return self
