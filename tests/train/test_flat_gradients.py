"""Gradients are added in one binary tree over the parts, wherever these are."""

import pytest
import torch

from launcher.train.flat_gradients import FlatGradients

_PARTS = 8


class _Model(torch.nn.Module):
    """An embedding, whose gradients may be sparse, a layer, and a weight that only some parts use."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Embedding(20, 8, sparse=sparse)
        self.layer = torch.nn.Linear(8, 3)
        self.rare = torch.nn.Parameter(torch.zeros(3))
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, part: int, micro_batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(10 * part + micro_batch)
        ids = torch.randint(0, 20, (3, 5), generator=generator)
        outputs = self.layer(self.embedding(ids)).exp()
        return ((outputs * self.rare) if part in (1, 2, 6) else outputs).sum()


def _sums(parts: range, micro_batches: int, dtype: torch.dtype) -> list[torch.Tensor]:
    model = _Model(sparse=dtype == torch.float32).to(dtype)  # as the engine has it
    gradients = FlatGradients(list(model.parameters()), len(parts), 1)
    for _ in range(2):  # the second step finds what the first one has left
        for part in parts:
            for number in range(micro_batches):
                gradients.begin(number == micro_batches - 1)
                model(part, number).backward()
            gradients.end_part()
        gradients.finish()
    assert all(parameter.grad is None for parameter in model.parameters())
    return [view.clone() for view in gradients.views]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_sum_has_the_same_bits_for_any_number_of_workers(micro_batches: int, dtype: torch.dtype) -> None:
    whole = _sums(range(_PARTS), micro_batches, dtype)
    assert all(view.dtype == torch.float32 for view in whole)
    for workers in (2, 4, 8):
        size = _PARTS // workers
        sums = [_sums(range(i * size, (i + 1) * size), micro_batches, dtype) for i in range(workers)]
        while len(sums) > 1:
            sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(sums[::2], sums[1::2], strict=True)]
        for one, other in zip(whole, sums[0], strict=True):
            assert torch.equal(one, other)


def test_the_sum_is_that_of_autograd_also_for_parts_that_fill_no_tree() -> None:
    for parts in (1, 2, 3, 5, 7):
        model = _Model().double()
        sum(model(part, 0) for part in range(parts)).backward()  # type: ignore[union-attr]
        expected = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in model.parameters()]
        for one, other in zip(_sums(range(parts), 1, torch.float32), expected, strict=True):
            assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-4)


def test_an_aborted_step_leaves_nothing() -> None:
    model = _Model()
    gradients = FlatGradients(list(model.parameters()), 4, 1)
    gradients.begin(True)
    model(0, 0).backward()
    gradients.end_part()
    gradients.begin(False)
    model(1, 0).backward()
    gradients.clear()
    for part in range(4):
        gradients.begin(True)
        model(part, 0).backward()
        gradients.end_part()
    gradients.finish()
    for one, other in zip(gradients.views, _sums(range(4), 1, torch.float32), strict=True):
        assert torch.equal(one, other)
