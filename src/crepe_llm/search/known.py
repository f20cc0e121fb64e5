"""Coefficients that were good on models at hand: where a search on another model may begin."""

from crepe_llm.search.space import Coefficients, Mask

__all__ = ["known_points"]

# Those of the shipped recipes, and of 30 random ones the best by perplexity, at 2:4 and at 60 %, on two models,
# SmolLM2-135M-Instruct and Gemma-3-270M: docs/notes/coefficients.md and docs/notes/proxies.md. Weights of unstructured
# masks competed in the matrix there; what is good where those of a row do was found by PHO on SmolLM2 at 60 %, seed 0.
_N_OF_M = (
    Coefficients(1.0, 7.0, 6.0, 31, 0.85),
    Coefficients(1.0, 3.28125, 0.84375, 31, 0.98),
    Coefficients(1.0, 1.88, 9.1, 31, 0.93),
    Coefficients(1.0, 0.187, 0.0283, 19, 0.734),
    Coefficients(1.0, 4.15, 0.254, 19, 0.815),
    Coefficients(1.0, 0.292, 4.99, 5, 1.15),
)
_UNSTRUCTURED = (
    Coefficients(1.0, 0.2, 0.06, 19, 1.0),
    Coefficients(1.0, 0.356, 0.0214, 31, 1.16),
    Coefficients(1.0, 0.892, 0.248, 19, 1.04),
    Coefficients(1.0, 0.187, 0.0283, 19, 0.734),
    Coefficients(1.0, 4.01, 0.342, 3, 1.02, "row"),
)


def known_points(mask: Mask) -> tuple[Coefficients, ...]:
    """What has been good for masks of this kind on other models, the shipped recipes' coefficients first."""
    return _UNSTRUCTURED if mask.mask_structure == "0:0" else _N_OF_M
