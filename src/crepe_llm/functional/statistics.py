"""Streaming statistics of a linear layer's inputs over calibration tokens."""

import torch

__all__ = ["InputStatistics", "counted_tokens", "relative_weights", "token_products"]

# Of the Gram matrix, computed in one product.
_COLUMNS = 512


def counted_tokens(inputs: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The inputs [..., d_in] as rows [tokens, d_in], padding left out.

    Args:
        inputs: [..., d_in].
        token_mask: [...] (the leading shape of `inputs`) or the same number of entries flat; zero entries are padding.
            None counts every token.

    Raises:
        ValueError: if the mask has another number of entries.
    """
    tokens = inputs.detach().reshape(-1, inputs.shape[-1])
    if token_mask is None:
        return tokens
    if token_mask.numel() != len(tokens):
        raise ValueError(f"token_mask has {token_mask.numel()} entries for {len(tokens)} tokens")
    return tokens[token_mask.reshape(-1).to(tokens.device, torch.bool)]


def token_products(
    first: torch.Tensor,
    second: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum over tokens of x y^T, for inputs x and y of the same tokens.

    Args:
        first: [..., d_in], x.
        second: [..., d_in], y.
        token_mask: of :func:`counted_tokens`.
        token_weights: [...], at least 0, how much each token counts; None for 1.

    Returns:
        fp32 [d_in, d_in].

    Raises:
        ValueError: if a shape does not fit.
    """
    x, y = (counted_tokens(inputs, token_mask).float() for inputs in (first, second))
    if token_weights is not None:
        x = x * counted_tokens(token_weights[..., None], token_mask)
    return x.T @ y


def relative_weights(outputs: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Weights of tokens by which each one's squared error counts relative to its squared outputs, 1 / ‖y_t‖².

    Args:
        outputs: [..., d_out], what a layer gives for each token.
        token_mask: of :func:`counted_tokens`.

    Returns:
        fp32 [...]; 0 for a token whose outputs are all zero. The squares of smaller outputs than a hundredth of the
        median token's, padding left out, count as that.

    Source: weights of tokens in the Gram matrix are RSQ's (arXiv 2503.01820), there by attention. These are ours, for
    models that normalise what a layer gives: a few tokens with huge outputs would decide its fit, though the norm
    after it makes all tokens alike again.
    """
    energy = outputs.detach().float().square().sum(dim=-1)
    active = energy > 0
    counted = counted_tokens(energy[..., None], token_mask).flatten()
    counted = counted[counted > 0]
    floor = counted.median() * 1e-4 if len(counted) else 1
    return torch.where(active, 1 / energy.clamp_min(floor), 0)


class InputStatistics:
    """Per-channel sums of a layer's inputs, gathered batch by batch.

    Sums within a batch are fp32 or better, sums across batches fp64, whatever the model's dtype.

    Args:
        channels: d_in, the number of input channels.
        gram: also accumulate the Gram matrix X^T X (fp32 [d_in, d_in]).
        device: where the sums live; inputs are expected there.

    Attributes:
        tokens: number of tokens seen.
        weight: what they count together: as many, where no weights were given. All sums are weighted.
        sum: fp64 [d_in], sum over tokens of x.
        square_sum: fp64 [d_in], sum over tokens of x^2.
        gram: fp32 [d_in, d_in], sum over tokens of x x^T, or None.
    """

    def __init__(self, channels: int, *, gram: bool = False, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.weight = 0.0
        self.sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.square_sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.gram = torch.zeros(channels, channels, device=device) if gram else None

    @property
    def channels(self) -> int:
        """d_in."""
        return self.sum.numel()

    @property
    def norm(self) -> torch.Tensor:
        """fp32 [d_in]: L2 norm of each channel over all tokens, ‖X_j‖."""
        return self.square_sum.sqrt().float()

    @property
    def mean(self) -> torch.Tensor:
        """fp64 [d_in]: mean of each channel over tokens.

        Raises:
            ValueError: if no token was seen.
        """
        self._require_tokens()
        return self.sum / self.weight if self.weight else self.sum

    @property
    def variance(self) -> torch.Tensor:
        """fp64 [d_in]: biased variance of each channel over tokens.

        Raises:
            ValueError: if no token was seen.
        """
        self._require_tokens()
        return (self.square_sum / self.weight - self.mean.square()).clamp_min_(0) if self.weight else self.square_sum

    def update(
        self,
        inputs: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            inputs: [..., d_in], any floating dtype.
            token_mask: of :func:`counted_tokens`.
            token_weights: [...] (the leading shape of `inputs`), at least 0: how much each token counts; None for 1.

        Raises:
            ValueError: if a shape does not fit.
        """
        if inputs.shape[-1] != self.channels:
            raise ValueError(f"inputs have {inputs.shape[-1]} channels, the statistics {self.channels}")
        tokens = counted_tokens(inputs, token_mask)
        if not len(tokens):
            return
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        self.tokens += len(tokens)
        if token_weights is None:
            self.weight += len(tokens)
            self.sum += tokens.sum(dim=0, dtype=dtype).to(self.sum)
        else:
            weights = counted_tokens(token_weights[..., None], token_mask).to(dtype)
            self.weight += weights.sum(dtype=torch.float64).item()
            self.sum += (tokens * weights).sum(dim=0, dtype=dtype).to(self.sum)
            tokens = tokens * weights.sqrt()
        self.square_sum += torch.linalg.vector_norm(tokens, dim=0, dtype=dtype).to(self.square_sum).square_()
        if self.gram is not None:
            _add_products(self.gram, tokens.to(dtype))

    def reordered(self, order: torch.Tensor) -> "InputStatistics":
        """The statistics of a layer whose input channel p is channel ``order[p]`` of this one (int64 [d_in]).

        Without the Gram matrix, which no score reads: it would take as much memory again.
        """
        result = InputStatistics(self.channels, device=self.sum.device)
        result.tokens, result.weight = self.tokens, self.weight
        order = order.to(self.sum.device)
        result.sum, result.square_sum = self.sum[order], self.square_sum[order]
        return result

    def _require_tokens(self) -> None:
        if not self.tokens:
            raise ValueError("no calibration token was seen, so there is no mean or variance")


def _add_products(gram: torch.Tensor, tokens: torch.Tensor) -> None:
    """Add X^T X of tokens [n, d_in] to the Gram matrix [d_in, d_in]; what it says of two channels is computed once."""
    for start in range(0, len(gram), _COLUMNS):
        stop = min(start + _COLUMNS, len(gram))
        product = (tokens[:, start:].T @ tokens[:, start:stop]).to(gram)
        gram[start:, start:stop] += product
        gram[start:stop, stop:] += product[stop - start :].T
