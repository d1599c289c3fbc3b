"""Elements get the same bits wherever they lie in a tensor."""

import pytest
import torch

from launcher.train.fused_tails import FusedTails

_ELEMENTS = 512


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_fused_adamw_has_the_same_bits_for_any_cut(weight_decay: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(_ELEMENTS) * 0.01
    gradients = [torch.randn(_ELEMENTS) * 0.1 for _ in range(20)]

    def train(size: int, with_hooks: bool = True) -> torch.Tensor:
        sizes = [size] * (_ELEMENTS // size) + [_ELEMENTS % size] * bool(_ELEMENTS % size)
        weights = [torch.nn.Parameter(piece.clone()) for piece in start.split(sizes)]
        optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True, weight_decay=weight_decay)
        if with_hooks:
            FusedTails(optimizer)
        for gradient in gradients:
            for weight, piece in zip(weights, gradient.split(sizes), strict=True):
                weight.grad = piece.clone()
            optimizer.step()
        return torch.cat([weight.detach() for weight in weights])

    whole = train(_ELEMENTS)
    assert torch.equal(whole, train(_ELEMENTS, with_hooks=False))
    for size in (1, 2, 3, 13, 24, 100):
        assert torch.equal(whole, train(size))
