"""Products with a symmetric matrix against those in fp64, whichever library makes them, and its factors in place."""

import pytest
import torch

from crepe_llm.functional import products
from crepe_llm.functional.products import Symmetric, cholesky_in_place, inverse_in_place


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


@pytest.mark.parametrize("size", [1, 7, 600])
def test_factors_in_place(size):
    inputs = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = inputs.T @ inputs
    for upper in (False, True):
        work = matrix.clone()
        factor = cholesky_in_place(work, upper=upper)
        assert factor.data_ptr() == work.data_ptr()
        assert torch.equal(factor, torch.linalg.cholesky(matrix, upper=upper))
    work = matrix.clone()
    inverse = inverse_in_place(work)
    assert inverse.data_ptr() == work.data_ptr() and inverse.is_contiguous()
    assert torch.equal(inverse, inverse.T)
    torch.testing.assert_close(inverse @ matrix, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("factorise", [cholesky_in_place, inverse_in_place])
def test_a_matrix_that_has_no_factor(factorise):
    with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        factorise(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
