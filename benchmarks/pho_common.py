"""What the two PHO benchmarks share: a sample model, its dense input statistics, and the model pruned in place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from crepe_llm import samples
from crepe_llm.evaluation.perplexity import perplexity
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.search.fitness import LayerSample, sample_layers
from crepe_llm.search.space import Coefficients, Mask, SearchSpace

MODELS = {"smollm2": samples.smollm2, "gemma3": samples.gemma3}
WINDOW = 512
LAYERS_PER_KIND, ROWS = 4, 96  # PHOSearchModifier's defaults


class Bench:
    """A model (bf16, so that CPUs with bf16 units are fast), statistics of its dense layers' inputs, and windows.

    Every candidate is pruned from the fp32 weights by the dense model's statistics. No layer is calibrated again on the
    outputs of pruned ones, so a candidate's perplexity costs one pruning and one evaluation.

    Args:
        name: of the model, a key of MODELS.
        seed: of the calibration windows and of the sampled layers and rows.
        windows: how many calibration windows of 512 tokens.
    """

    def __init__(self, name: str, seed: int, windows: int = 16) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = MODELS[name]()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.corpus = samples.wikipedia()
        self.layers = {
            layer: module
            for layer, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and layer != "lm_head"
        }
        self.dense = {layer: module.weight.detach().float() for layer, module in self.layers.items()}
        data = samples.calibration_windows(self.tokenizer, self.corpus.train, windows=windows, length=WINDOW, seed=seed)
        self.calibration = torch.tensor(data["input_ids"])
        chosen = set(sample_layers(self.layers, LAYERS_PER_KIND, seed))
        self.statistics = {
            layer: InputStatistics(module.in_features, gram=layer in chosen) for layer, module in self.layers.items()
        }
        self._calibrate()
        self.samples = [
            LayerSample(
                layer,
                self.dense[layer],
                self.statistics[layer].norm,
                self.statistics[layer].gram,
                rows=ROWS,
                kernel_sizes=SearchSpace().kernel_sizes,
                seed=seed,
            )
            for layer in self.layers
            if layer in chosen
        ]

    @torch.no_grad()
    def _calibrate(self) -> None:
        def hook(statistics: InputStatistics) -> Any:
            return lambda module, args: statistics.update(args[0])

        handles = [
            module.register_forward_pre_hook(hook(self.statistics[layer])) for layer, module in self.layers.items()
        ]
        for window in tqdm(self.calibration, desc="calibrating", unit=" windows"):
            self.model(input_ids=window[None], use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()

    @contextmanager
    def pruned(self, coefficients: Coefficients, mask: Mask) -> Iterator[None]:
        """The model pruned meanwhile."""
        try:
            for layer, module in self.layers.items():
                scores = crepe_scores(self.dense[layer], self.statistics[layer].norm, **coefficients.of_score)
                module.weight.data = (self.dense[layer] * mask.keep(scores, coefficients)).bfloat16()
            yield
        finally:
            for layer, module in self.layers.items():
                module.weight.data = self.dense[layer].bfloat16()

    def perplexity(self, texts: Sequence[str], tokens: int) -> float:
        """Perplexity of the model as it is, on windows of 512 tokens spread over the texts."""
        windows = samples.token_windows(self.tokenizer, texts, WINDOW, tokens=tokens)
        return perplexity(self.model, windows, corpus=self.corpus.name, progress=False).perplexity


def parse_mask(text: str) -> Mask:
    """ "2:4" or, for unstructured masks, a sparsity and a comparison group: "0.6:matrix"."""
    first, _, second = text.partition(":")
    if "." in first:
        return Mask("0:0", float(first), second or "matrix")  # type: ignore[arg-type]
    n, m = int(first), int(second)
    return Mask(text, n / m)
