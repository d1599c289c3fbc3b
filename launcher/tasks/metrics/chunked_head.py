"""Cross entropy at the output layer of a language model, a few hundred tokens at a time.

The logits of a micro-batch, tokens x vocabulary in fp32 with their gradient, are the largest tensors of a step. Here
the output layer itself returns the loss of each token: it computes the logits of a chunk, keeps their log-sum-exp, and
computes them once more in the backward pass (as Liger Kernel does, Hsu et al. 2024, arXiv:2410.10989). Tokens without a
label cost nothing. Runs in train workers, and on the head where memory is measured.
"""

import logging
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional

from launcher.models.chat import IGNORED
from launcher.models.small_copy import small_copy
from launcher.tasks.metrics.losses import labelled_losses

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LOG = logging.getLogger(__name__)
_CHUNK_ELEMENTS = 1 << 24
"""Logits that are in memory at a time: 64 MiB in fp32."""
_MIN_CHUNK = 64
"""Tokens of a chunk, at least: smaller products use a fraction of the device."""


class ChunkedHead:
    """Output layer of a language model that returns token losses while `labels` are set.

    Args:
        head: Linear output layer; its `forward` is replaced.
    """

    def __init__(self, head: torch.nn.Linear) -> None:
        self.head = head
        self._plain_forward = head.forward
        self.labels: torch.Tensor | None = None
        """Label of each token, int64 (B, T), -100 for none; None makes the layer return logits as before."""
        self.smoothing = 0.0
        """Share of each target that is spread over the vocabulary."""
        # On the instance, not by a wrapper module: names, tied weights and the hooks of ZeRO-3 stay as they are.
        head.forward = self._forward  # type: ignore[method-assign]  # on purpose

    # torch.compile does not know the functions of its own; a graph break here costs nothing beside the layer.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own
    def _forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return loss, most likely token and its probability for each position, float32 (B, T, 3), or the logits."""
        if self.labels is None:
            return self._plain_forward(hidden_BTD)
        is_labelled = self.labels != IGNORED
        # The boolean indices sync with the device to learn their size.
        hidden, labels = hidden_BTD[is_labelled], self.labels[is_labelled]
        found = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's own
            hidden, self.head.weight, self.head.bias, labels, self
        )
        zeros = hidden_BTD.new_zeros(self.labels.shape, dtype=torch.float32)
        # Token ids are exact in float32 up to 2**24.
        return torch.stack([zeros.masked_scatter(is_labelled, values.float()) for values in found], -1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy of labelled tokens from the last hidden states, without the whole logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        chunked: ChunkedHead,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        smoothing = chunked.smoothing
        losses, log_sums, highest = (hidden_ND.new_empty(len(labels_N), dtype=torch.float32) for _ in range(3))
        predicted = torch.empty_like(labels_N)
        for chunk in _chunks(len(labels_N), len(weight_VD)):
            logits = functional.linear(hidden_ND[chunk], weight_VD, bias_V).float()
            log_sums[chunk] = logits.logsumexp(-1)
            own = logits.gather(1, labels_N[chunk, None]).squeeze(1)
            target = own if not smoothing else (1 - smoothing) * own + smoothing * logits.mean(-1)
            losses[chunk] = log_sums[chunk] - target
            highest[chunk], predicted[chunk] = logits.max(-1)
        ctx.save_for_backward(hidden_ND, labels_N, log_sums)
        # The layer, not its weight: ZeRO-3 replaces the data of the weight after this pass and gathers it again before
        # the backward pass of the layer.
        ctx.head, ctx.smoothing = chunked.head, smoothing
        confidence = (highest - log_sums).exp()
        ctx.mark_non_differentiable(predicted, confidence)
        return losses, predicted, confidence

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, labels, log_sums = ctx.saved_tensors
        weight, bias = ctx.head.weight, ctx.head.bias
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # In fp32: in half precision each further chunk would round the sum. Not zeros first: it is as large as the
        # vocabulary.
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for chunk in _chunks(len(labels), len(weight)):
            logits = functional.linear(hidden[chunk], weight, bias).float()
            grad = logits.sub_(log_sums[chunk, None]).exp_()
            if ctx.smoothing:
                grad -= ctx.smoothing / len(weight)
            rows = torch.arange(len(grad), device=grad.device)
            grad[rows, labels[chunk]] -= 1 - ctx.smoothing
            grad = (grad * gradients[0][chunk, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[chunk], is_empty=chunk.start == 0)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        if grad_weight is not None and not len(labels):
            grad_weight.zero_()
        grads = (grad_weight, weight), (grad_bias, bias)
        return grad_hidden, *(None if grad is None else grad.to(own.dtype) for grad, own in grads), None, None


def _add_product(total_VD: torch.Tensor, left_VN: torch.Tensor, right_ND: torch.Tensor, is_empty: bool) -> None:
    """Add the product of two matrices to an fp32 sum, or set the sum to it."""
    if left_VN.dtype == total_VD.dtype:
        # Without a product in memory beside the sum; beta 0 reads nothing of what is in it.
        torch.addmm(total_VD, left_VN, right_ND, beta=0.0 if is_empty else 1.0, out=total_VD)
    elif is_empty:
        total_VD.copy_(left_VN @ right_ND)
    else:
        total_VD += left_VN @ right_ND


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(_MIN_CHUNK, _CHUNK_ELEMENTS // vocabulary)
    return [slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)]


_HEADS: "WeakKeyDictionary[torch.nn.Module, ChunkedHead | None]" = WeakKeyDictionary()
"""Heads of the models that were seen."""


def token_outputs(
    auto_model: str, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor | bool], labels_BT: torch.Tensor,
    smoothing: float = 0.0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Run a language model, causal or masked, and score the tokens that have a label.

    The logits are never in memory as a whole, unless the model scales or caps the output of its last layer, or that
    layer is trained by adapters.

    Args:
        auto_model: Name of the transformers Auto class.
        model: Model, possibly inside adapters and DeepSpeed's engine.
        inputs: Arguments of the model's forward pass.
        labels_BT: Label of each token, int64, -100 for none.
        smoothing: Share of each target that is spread over the vocabulary.

    Returns:
        `losses`, float32; `predicted`, the most likely token, int64; `confidence`, its probability, float32. (B, T)
        each, and 0 where there is no label.
    """
    if model not in _HEADS:
        # Looked up at the first pass, when adapters are in place: the layer inside one of them must stay as it is.
        _HEADS[model] = _chunk_head(auto_model, model)
    chunked = _HEADS[model]
    if chunked is None:
        logits = model(**inputs).logits
        is_labelled = labels_BT != IGNORED
        with torch.no_grad():
            highest, predicted = logits[is_labelled].float().softmax(-1).max(-1)
        return {
            "losses": labelled_losses(logits, labels_BT, smoothing=smoothing),
            "predicted": torch.zeros_like(labels_BT).masked_scatter(is_labelled, predicted),
            "confidence": torch.zeros_like(labels_BT, dtype=torch.float32).masked_scatter(is_labelled, highest),
        }
    chunked.labels, chunked.smoothing = labels_BT, smoothing
    try:
        found = model(**inputs).logits
    finally:
        # Generation with the same model needs logits again.
        chunked.labels = None
    losses, predicted, confidence = found.unbind(-1)
    return {"losses": losses, "predicted": predicted.long(), "confidence": confidence}


def _chunk_head(auto_model: str, model: Any) -> ChunkedHead | None:
    """Make the output layer return token losses; return None where it is not linear or not the last operation."""
    # DeepSpeed's engine passes attributes on, but has a `config` of its own.
    model = getattr(model, "module", model)
    head = model.get_output_embeddings()
    # Not a subclass: quantised layers and adapters are some.
    if type(head) is not torch.nn.Linear or not _returns_output_of_head(auto_model, model.config):
        return None
    return ChunkedHead(head)


def _returns_output_of_head(auto_model: str, config: "PretrainedConfig") -> bool:
    """Return whether the logits of a small model of this configuration are those of its output layer."""
    text = config.get_text_config(decoder=True)
    outputs: list[torch.Tensor] = []
    try:
        with small_copy(auto_model, text) as model, torch.no_grad():
            # A bias after the layer is zero in a new model, and would go unnoticed.
            for tensor in chain(model.parameters(), model.buffers()):
                if tensor.is_floating_point() and not tensor.any():
                    tensor.normal_()
            model.get_output_embeddings().register_forward_hook(lambda _module, _args, output: outputs.append(output))
            logits = model(input_ids=torch.arange(5, 13)[None]).logits
    except Exception as error:  # noqa: BLE001  # the model's code, possibly remote, may raise anything
        _LOG.info("%s cannot be tested (%s: %s)", text.model_type, type(error).__name__, error)
        return False
    return len(outputs) == 1 and torch.equal(outputs[0], logits)
