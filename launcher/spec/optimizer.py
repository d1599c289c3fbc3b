"""`train.optimizer:` in the job file, a union tagged by `type`. Runs anywhere."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from launcher.spec.base import Section


class AdamW(Section):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101). Biases and norms are not decayed."""

    type: Literal["adamw"] = "adamw"
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay rate of the first moment."""
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay rate of the second moment."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Term added to the denominator for numerical stability."""
    # The BERT recipe (Devlin et al. 2019, A.2).
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay per unit of learning rate, on weight matrices only."""


class SGD(Section):
    """Stochastic gradient descent with momentum, from torch: half of AdamW's optimizer states, or none."""

    type: Literal["sgd"]
    # BiT fine-tunes so (Kolesnikov et al. 2020, arXiv:1912.11370).
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Fraction of the previous update to keep; 0 needs no optimizer states."""
    nesterov: bool = False
    """Use Nesterov momentum (Sutskever et al. 2013)."""
    # BiT fine-tunes without weight decay (the same paper).
    weight_decay: float = Field(default=0.0, ge=0.0)
    """L2 penalty added to the gradient, on weight matrices only."""

    @model_validator(mode="after")
    def _check_momentum(self) -> "SGD":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; set one or drop nesterov")
        return self


class Adafactor(Section):
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235), from torch: one row and one column of states per matrix.

    The step size of a matrix is `train.learning_rate` times the matrix's root mean square, so learning rates of 1e-3 to
    1e-2 are usual. It needs whole matrices, which ZeRO shards, so it runs with `parallel.zero: 0` (`auto` chooses it).
    """

    type: Literal["adafactor"]
    beta2_decay: float = Field(default=-0.8, lt=0.0)
    """Exponent of the second moment's decay rate: at step t it is 1 - t ** beta2_decay (section 7.2)."""
    clip_threshold: float = Field(default=1.0, ge=1.0)
    """Root mean square to which the update of each matrix is clipped (section 6)."""
    min_scale: float = Field(default=1e-3, gt=0.0)
    """Lower bound of the root mean square that scales a step, so that zero weights can grow (section 8)."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay per unit of learning rate, on weight matrices only."""


class AdamW8bit(Section):
    """AdamW with 8-bit moments, quantised block by block (Dettmers et al. 2022, arXiv:2110.02861).

    Needs bitsandbytes. Under ZeRO the block boundaries depend on the shards, so the loss curve depends slightly on the
    number of workers, and a run can only resume with the same number. `parallel.zero: 0` has neither limit.
    """

    type: Literal["adamw_8bit"]
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay rate of the first moment."""
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay rate of the second moment."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Term added to the denominator for numerical stability."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay per unit of learning rate, on weight matrices only."""


def _default_to_adamw(value: object) -> object:
    # pydantic has no default for the tag of a union (union_tag_not_found).
    return {"type": "adamw", **value} if isinstance(value, dict) else value


Optimizer = Annotated[
    AdamW | SGD | Adafactor | AdamW8bit, Field(discriminator="type"), BeforeValidator(_default_to_adamw)
]
