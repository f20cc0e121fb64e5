"""Work on a matrix in blocks of rows gives what work on all of it gives."""

import pytest
import torch

from crepe_llm.functional import rows
from crepe_llm.functional.admm import admm
from crepe_llm.functional.compensation import conjugate_gradients
from crepe_llm.functional.masks import keep_mask


@pytest.mark.parametrize(("shape", "elements", "sizes"), [
    ((5, 4), 8, [2, 2, 1]),
    ((5, 4), 3, [1, 1, 1, 1, 1]),
    ((5, 4), 100, [5]),
    ((0, 4), 8, []),
    ((3, 0), 8, [3]),
])  # fmt: skip
def test_blocks_cover_the_rows_in_order(shape, elements, sizes):
    matrix = torch.rand(shape)
    found = [matrix[block] for block in rows.row_blocks(matrix, elements)]
    assert [len(block) for block in found] == sizes
    assert torch.equal(torch.cat([matrix[:0], *found]), matrix)


@pytest.mark.parametrize("elements", [64, 200])
def test_solvers_by_blocks_give_what_they_give_at_once(elements, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    dense, inputs = torch.randn(13, 64, generator=generator), torch.randn(300, 64, generator=generator)
    gram = inputs.T @ (inputs @ torch.diag(torch.linspace(0.1, 3, 64)))
    gram = (gram + gram.T) / 2
    keep = keep_mask(dense.abs(), 0.5, "2:4")
    mask = lambda scores: keep_mask(scores, 0.5, "2:4")  # noqa: E731
    once = conjugate_gradients(dense, keep, gram), admm(dense, gram, torch.abs, mask)
    monkeypatch.setattr(rows, "_ELEMENTS", elements)
    blocks = conjugate_gradients(dense, keep, gram), admm(dense, gram, torch.abs, mask)
    torch.testing.assert_close(blocks[0], once[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(blocks[1].keep, once[1].keep)
    torch.testing.assert_close(blocks[1].weight, once[1].weight, rtol=1e-4, atol=1e-5)
