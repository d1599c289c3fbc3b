"""`model:` in the job file: the pretrained model to start from. Runs anywhere."""

from typing import Literal

from pydantic import Field, JsonValue, model_validator

from launcher.spec.base import Section


class LoraSpec(Section):
    """Low-rank adapters instead of all weights (Hu et al. 2022, arXiv:2106.09685), by peft."""

    rank: int = Field(default=16, ge=1)
    """Rank of each adapter."""

    alpha: float = Field(default=32.0, gt=0.0)
    """Adapters are scaled by alpha / rank."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout in front of each adapter."""

    target_modules: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the layers that get an adapter; null takes every linear layer but the head (arXiv:2305.14314)."""


class FreezeSpec(Section):
    """What keeps its pretrained weights: no gradient, no optimizer state. The parts add up."""

    backbone: bool = False
    """Everything but the task's head (linear probing)."""

    embeddings: bool = False
    """All that stands before the layers."""

    layers: int = Field(default=0, ge=0)
    """So many layers, from the embeddings on: blocks of a transformer, stages of a ResNet."""

    names: tuple[str, ...] = ()
    """Parameters or modules by name, with * and ?: `*.LayerNorm.*`, `bert.pooler`."""


class ModelSpec(Section):
    """The model to start from and how it may be loaded."""

    name: str = ""
    """Directory, or name on the Hugging Face hub, that `from_pretrained` loads; with `from_config`, of the tokenizer
    or image processor alone."""

    from_config: dict[str, JsonValue] | None = None
    """Train from random weights: `model_type` (gpt2, bert, vit, resnet) and entries of its configuration. Without
    `name`, a tokenizer of `vocab_size` tokens is trained on the training data."""

    lora: LoraSpec | None = None
    """Train low-rank adapters and the head instead of all weights."""

    freeze: FreezeSpec | None = None
    """Train a part of the weights and keep the rest; `check` tells which. BatchNorm in it keeps its statistics."""

    revision: str | None = None
    """Commit, branch or tag on the hub; null takes the default branch."""

    trust_remote_code: bool = False
    """Allow the model repository to run its own Python code on every machine of the run."""

    allow_pickle: bool = False
    """Allow weights stored as a pickle (pytorch_model.bin), which can run code when loaded."""

    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Set every dropout probability of the model's config to this; null keeps the model's own."""

    batch_norm: Literal["frozen", "sync"] | None = None
    """BatchNorm's statistics while training: the pretrained ones, or those of each micro-batch over all workers; null
    freezes those of a pretrained model and takes `sync` for one from a configuration."""

    def exported(self, directory: str) -> "ModelSpec":
        """The model of a finished run: whole, pretrained, with the same permissions."""
        return self.model_copy(
            update={"name": directory, "revision": None, "from_config": None, "lora": None, "freeze": None}
        )

    @property
    def syncs_batch_norm(self) -> bool:
        """Whether BatchNorm's statistics are those of all workers' micro-batches."""
        return self.batch_norm == "sync" or (self.batch_norm is None and self.from_config is not None)

    @model_validator(mode="after")
    def _something_to_start_from(self) -> "ModelSpec":
        if not self.name and self.from_config is None:
            raise ValueError("name is missing; give a model directory or hub name, or a from_config to start from")
        if self.from_config is not None and not isinstance(self.from_config.get("model_type"), str):
            raise ValueError("from_config needs a model_type, such as gpt2, bert, vit or resnet")
        if self.freeze is not None and self.lora is not None:
            raise ValueError("freeze adds nothing to lora, which trains its adapters and the head alone; drop freeze")
        return self
