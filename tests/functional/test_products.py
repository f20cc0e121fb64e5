"""Products with a symmetric matrix against those in fp64, whichever library makes them."""

import pytest
import torch

from crepe_llm.functional import products
from crepe_llm.functional.products import Symmetric


@pytest.mark.parametrize("by_onednn", [False, True])
@pytest.mark.parametrize("size", [8, 600])
@pytest.mark.parametrize("count", [1, 5])
def test_products(by_onednn, size, count, monkeypatch):
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: by_onednn)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator)
    matrix = matrix + matrix.T
    rows, add = (torch.randn(2 * count, size, generator=generator)[::2] for _ in range(2))
    before, out = matrix.clone(), torch.empty(count, size)
    expected = rows.double() @ matrix.double()
    assert Symmetric(matrix).times(rows, out=out) is out
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-3)
    Symmetric(matrix).times(rows, add=add, out=out)
    torch.testing.assert_close(out.double(), expected + add, rtol=1e-4, atol=1e-3)
    assert torch.equal(matrix, before)
    assert Symmetric(matrix)._matrix.is_mkldnn == (by_onednn and size == 600)
