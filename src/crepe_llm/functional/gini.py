"""The Gini index: how unequally a total is spread over its parts."""

import numpy as np
import torch

__all__ = ["gini_index"]


def gini_index(values: torch.Tensor, *, samples: int | None = None, seed: int = 0) -> float:
    """The Gini index of non-negative values, 0 where all are equal and 1 - 1/n where one of n holds everything.

    With the values in ascending order, c_1 <= ... <= c_n::

        GI = sum_k (2 k - n - 1) c_k / (n sum_k c_k)

    Scaling all values or repeating each the same number of times leaves it as it is. Setting a fraction s of the values
    to zero, all values there at most the kept ones', gives s + (1 - s) GI(kept).

    Args:
        values: any shape, any real dtype, finite and at least 0. Sorted in their own precision, summed in fp64.
        samples: take this many values, drawn with replacement, where there are more; None takes all. The error
            falls as 1 / sqrt(samples), and grows with the heaviness of the tail.
        seed: of the draw.

    Returns:
        The index, in [0, 1); 0 where every value is 0.

    Raises:
        ValueError: no values, a negative, infinite or NaN one, or `samples` below 1.

    Source: Hurley and Rickard, IEEE Transactions on Information Theory 55(10), 2009 (arXiv 0811.4706), definition of
    the Gini index in an equivalent form; 0 for all-zero values is ours.
    """
    flat = values.detach().reshape(-1)
    if flat.numel() == 0:
        raise ValueError("values are empty, so there is nothing whose inequality could be measured")
    if samples is not None:
        if samples < 1:
            raise ValueError(f"samples={samples} must be at least 1, or None for all values")
        if flat.numel() > samples:
            generator = torch.Generator().manual_seed(seed)
            flat = flat[torch.randint(flat.numel(), (samples,), generator=generator).to(flat.device)]
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.double() if not flat.is_floating_point() else flat.float()
    least, greatest = (bound.item() for bound in flat.aminmax())
    if not (least >= 0 and greatest < float("inf")):
        raise ValueError(f"values must be finite and at least 0, got values from {least} to {greatest}")
    if greatest == 0:
        return 0.0
    n = flat.numel()
    # numpy sorts floats with vector instructions, several times faster than torch does on CPUs.
    flat = torch.from_numpy(np.sort(flat.numpy())) if flat.device.type == "cpu" else flat.sort().values
    # Dividing by the largest keeps the sums of very small or very large values in range.
    ordered = flat.double() / greatest
    weights = torch.arange(1 - n, n, 2, dtype=torch.float64, device=flat.device)
    return max(0.0, (torch.dot(weights, ordered) / (n * ordered.sum())).item())
