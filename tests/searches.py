"""What the tests of searches share: layers to sample, a loss with a known minimum, a study."""

import torch
from hypothesis import strategies as st

from crepe_llm.search.fitness import LayerSample
from crepe_llm.search.space import Coefficients, Mask, SearchSpace
from crepe_llm.search.study import Study

TWO_OF_FOUR = Mask("2:4", 0.5)
KERNELS = (3, 5, 9)

COEFFICIENTS = st.builds(
    Coefficients,
    row=st.floats(0.01, 10),
    column=st.floats(0, 10),
    neighbourhood=st.floats(0, 10),
    kernel_size=st.sampled_from(KERNELS),
    activation_exponent=st.floats(0, 2),
)


def layer(d_out=24, d_in=32, tokens=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    inputs = torch.randn(tokens, d_in, generator=generator) * torch.rand(d_in, generator=generator).mul_(3)
    return weight, inputs


def sample(rows=24, gram=True, **kwargs):
    weight, inputs = layer(**kwargs)
    return LayerSample(
        "block.0.proj",
        weight,
        inputs.norm(dim=0),
        inputs.T @ inputs if gram else None,
        rows=rows,
        kernel_sizes=KERNELS,
        seed=1,
    )


def bowl(target=(0.7, 0.3, 0.6, 0.5), space=None):
    """A loss with its minimum of 0 at a known place of the unit cube."""
    space = space or SearchSpace()

    def loss(candidate):
        return sum((a - b) ** 2 for a, b in zip(space.point(candidate), target, strict=True))

    return loss


def study(optimiser="cma", **settings):
    return Study(
        **{"model": "m", "mask": TWO_OF_FOUR, "proxy": "bowl", "higher_is_better": False, **settings},
        optimiser=optimiser,
    )
