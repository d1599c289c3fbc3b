"""`train.optimizer:` in the job file, a union tagged by `type`. Runs anywhere."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from launcher.spec.base import Section


class AdamW(Section):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); biases and norms are never decayed."""

    type: Literal["adamw"] = "adamw"
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay rate of the first moment."""
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay rate of the second moment."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.01, ge=0.0)  # the BERT recipe (Devlin et al. 2019, A.2)
    """Decoupled weight decay per unit of learning rate, on weight matrices only."""


class SGD(Section):
    """Stochastic gradient descent with momentum, torch's: half of AdamW's optimizer states, or none."""

    type: Literal["sgd"]
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)  # BiT fine-tunes so (Kolesnikov et al. 2020, arXiv:1912.11370)
    """Share of the last update that is kept; 0 keeps no state at all."""
    nesterov: bool = False
    """Look ahead along the momentum (Sutskever et al. 2013)."""
    weight_decay: float = Field(default=0.0, ge=0.0)  # BiT's
    """L2 penalty added to the gradient, on weight matrices only."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "SGD":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; set one or drop nesterov")
        return self


class Adafactor(Section):
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235), torch's: a row and a column of states for each matrix.

    The step of a matrix is `train.learning_rate` times the matrix's own root mean square, so that rates of 1e-3 to 1e-2
    are usual. It looks at whole matrices, which ZeRO cuts: it runs with `parallel.zero: 0`, which `auto` takes.
    """

    type: Literal["adafactor"]
    beta2_decay: float = Field(default=-0.8, lt=0.0)
    """The second moment's decay rate at step t is 1 - t ** beta2_decay (section 7.2)."""
    clip_threshold: float = Field(default=1.0, ge=1.0)
    """Root mean square to which each matrix's update is clipped (section 6)."""
    min_scale: float = Field(default=1e-3, gt=0.0)
    """Least root mean square that a step is relative to, so that zeros can grow (section 8)."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay per unit of learning rate, on weight matrices only."""


class AdamW8bit(Section):
    """AdamW with moments of 8 bits, quantised block by block (Dettmers et al. 2022, arXiv:2110.02861).

    By bitsandbytes, which has to be installed. ZeRO's shards move the blocks, so that the curve depends a little on the
    number of workers, and a run goes on with as many workers as it began with; `parallel.zero: 0` has neither limit.
    """

    type: Literal["adamw_8bit"]
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay rate of the first moment."""
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay rate of the second moment."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay per unit of learning rate, on weight matrices only."""


def _adamw_unless_said(value: object) -> object:
    return {"type": "adamw", **value} if isinstance(value, dict) else value


Optimizer = Annotated[
    AdamW | SGD | Adafactor | AdamW8bit, Field(discriminator="type"), BeforeValidator(_adamw_unless_said)
]
