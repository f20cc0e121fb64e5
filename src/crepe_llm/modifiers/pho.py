"""The search for CRePE's coefficients as a modifier."""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers.utils.hooks import HooksMixin
from loguru import logger
from pydantic import (
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from crepe_llm.functional.masks import ComparisonGroup, parse_mask_structure
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.models.losses import summed_loss
from crepe_llm.modifiers import order
from crepe_llm.modifiers.crepe import CRePEModifier
from crepe_llm.modifiers.fields import MaskStructure
from crepe_llm.modifiers.layers import LayerModifier
from crepe_llm.modifiers.observe import Observer, Uncalibrated
from crepe_llm.pruning.block_pass import Wanted
from crepe_llm.pruning.layer import weight_matrix
from crepe_llm.search.fitness import DEFAULT_PROXY, PROXIES, LayerSample, evaluate, fingerprint, sample_layers
from crepe_llm.search.search import search
from crepe_llm.search.space import RIA, Coefficients, Mask, SearchSpace
from crepe_llm.search.study import Study
from crepe_llm.search.verification import pruned, verify

__all__ = ["PHOSearchModifier"]

_CANDIDATES = 200
_VERIFICATION_SEQUENCES = 8
_NAMES = [field.name for field in dataclasses.fields(Coefficients)]


class PHOSearchModifier(LayerModifier):
    """
    Modifier that searches for the coefficients of the CRePEModifier after it, by a proxy for perplexity on a sample of
    layers and rows, in the manner of the PHO of https://arxiv.org/abs/2606.01544, whose internals are not public to us.
    It changes no weight. See `crepe_llm.search.fitness` and `crepe_llm.search.search`.

    The CRePEModifier prunes with what was found, and the recipe that is saved with the model has it: as `found` here,
    and as the CRePEModifier's coefficients. So that recipe prunes the same again without searching.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        PHOSearchModifier:
          candidates: 200
        CRePEModifier:
          mask_structure: "2:4"
    ```

    Lifecycle:

    - on_initialize
        - find the CRePEModifier, draw the sample of its layers
        - with `found` or `study`: hand the coefficients over, and be done
    - on_calibration_start
        - watch the layers' inputs
    - on_sequential_epoch_end
        - reduce each sampled layer of the block to its sample
    - on_calibration_end
        - remove_hooks()
        - search, compare with RIA or measure finalists, hand the coefficients over
    - on_finalize
        - nothing is left to do

    :param proxy: what stands for perplexity, a name from `crepe_llm.search.fitness.PROXIES`
    :param optimiser: `cma` (CMA-ES) or `random`
    :param candidates: stop after so many candidates; 200 where neither this nor `minutes` is given
    :param minutes: stop when evaluations have taken so long
    :param space: bounds that differ from `crepe_llm.search.space.SearchSpace`'s, such as `{activation_exponent: [0.2,
        1.0]}`
    :param seed: of the sample and of the optimiser
    :param layers_per_kind: how many layers of each kind (q_proj, down_proj and so on) are in the sample
    :param rows: how many rows of each sampled layer are
    :param record: file in which the search is recorded and from which it is resumed. Where it is left out, a file in
        `crepe_llm/pho_studies` in the user's cache folder, named after model, structure and settings
    :param study: file of an earlier study, on this or another model, to use instead of searching
    :param verify: after searching, measure the perplexity of the pruned model on eight sequences of the calibration
        data for a few finalists: the CRePEModifier's own coefficients, RIA's, the search's best, and the best of the
        candidates that it looked around with. One that is better than the CRePEModifier's own (without a
        CRePEModifier: RIA's) by more than twice the standard error of the difference is used. Holds a second copy of
        the pruned layers' weights meanwhile
    :param finalists: how many `verify` measures
    :param found: the coefficients, in a saved recipe; nothing is searched
    :param mask_structure: as the CRePEModifier's, from which it is taken where there is one
    :param sparsity: likewise
    :param comparison_group: likewise
    :param uncalibrated: `dense` leaves a layer that no calibration token reached out of the sample; `error` refuses it

    `targets` and `ignore` are the CRePEModifier's where there is one.
    """

    proxy: str = DEFAULT_PROXY
    optimiser: Literal["cma", "random"] = "cma"
    candidates: int | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0)
    space: dict[str, Any] | None = None
    seed: int = 0
    layers_per_kind: int = Field(default=4, gt=0)
    rows: int = Field(default=96, gt=0)
    record: str | None = None
    study: str | None = None
    verify: bool = False
    finalists: int = Field(default=8, gt=0)
    found: dict[str, float] | None = None
    mask_structure: MaskStructure | None = None
    sparsity: float | None = None
    comparison_group: ComparisonGroup | None = None
    uncalibrated: Uncalibrated = "dense"

    _crepe: CRePEModifier | None = PrivateAttr(default=None)
    _mask: Mask = PrivateAttr()
    _model_name: str = PrivateAttr(default="")
    _sampled: set[str] = PrivateAttr(default_factory=set)
    _samples: list[LayerSample] = PrivateAttr(default_factory=list)
    _tokens: int = PrivateAttr(default=0)
    _norms: dict[torch.nn.Module, torch.Tensor] = PrivateAttr(default_factory=dict)
    _result: Study | None = PrivateAttr(default=None)
    _chosen: Coefficients | None = PrivateAttr(default=None)

    @property
    def chosen(self) -> dict[str, Any]:
        """The coefficients of the recipe or of the study; empty before they are known."""
        return {} if self._chosen is None else dataclasses.asdict(self._chosen)

    @property
    def result(self) -> Study | None:
        """The study that was made or read, once there is one."""
        return self._result

    @field_validator("proxy")
    @classmethod
    def _check_proxy(cls, value: str) -> str:
        if value not in PROXIES:
            raise ValueError(f"proxy={value} must be one of {', '.join(PROXIES)}")
        return value

    @model_validator(mode="after")
    def _check_search(self) -> "PHOSearchModifier":
        self._space()
        if self.study is not None and self.record is not None:
            raise ValueError(
                f"study={self.study} is to be used instead of searching, and record={self.record} is where a search is "
                "recorded: give one of the two"
            )
        if self.found is not None:
            _coefficients(self.found)
        # A search that has been done needs no calibration epoch of its own.
        self.requires_calibration_data = self.found is None and self.study is None
        return self

    @model_serializer(mode="wrap")
    def _with_what_was_found(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A saved recipe has what was found."""
        return serialize(self) | ({"found": self.chosen} if self._chosen else {})

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        order.check(self)
        self._crepe = self._searched_for()
        if self.found is not None:
            self._hand_over(_coefficients(self.found))
            logger.info(f"PHO: coefficients of the recipe, no search: {_coefficients(self.found)}")
            return True
        self._mask = self._wanted_mask()
        if self.study is not None:
            self._result = Study.load(self.study)
            self._result.require_mask(self._mask)
            self._conclude(self._result)
            return True
        super().on_initialize(state, **kwargs)
        self._model_name = Path(state.model.config._name_or_path or type(state.model).__name__).name
        self._sampled = set(sample_layers(self._layers.values(), self.layers_per_kind, self.seed))
        if not self.verify:
            self._layers = {module: name for module, name in self._layers.items() if name in self._sampled}
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self.requires_calibration_data:
            return
        if self._crepe is not None and self._crepe in active_session().lifecycle.recipe.modifiers:
            raise ValueError(
                "PHOSearchModifier must have searched before CRePEModifier prunes, so each needs a calibration epoch "
                'of its own: leave out pipeline=, or give oneshot pipeline="independent"'
            )
        gram = PROXIES[self.proxy].needs_gram
        wanted = {module: Wanted(name, gram and name in self._sampled) for module, name in self._layers.items()}
        self._observer = Observer(self, state.model, self._dataloader, wanted)

    def find_layers(self, model: torch.nn.Module) -> dict[torch.nn.Module, str]:
        return super().find_layers(model) if self._crepe is None else self._crepe.find_layers(model)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Reduce the layers to what the search needs of them; they stay as they are."""
        if self._observer is not None:
            for module, name, statistics in self._observer.ended(modules, self.uncalibrated):
                self._reduce(module, name, statistics)

    def _reduce(self, module: torch.nn.Module, name: str, statistics: InputStatistics) -> None:
        if self.verify:
            self._norms[module] = statistics.norm
        if name in self._sampled:
            self._tokens = max(self._tokens, statistics.tokens)
            self._samples.append(
                LayerSample(
                    name,
                    weight_matrix(module),
                    statistics.norm,
                    statistics.gram,
                    rows=self.rows,
                    kernel_sizes=self._space().kernel_sizes,
                    seed=self.seed,
                )
            )

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self._observer is None:
            return
        self.stop_watching()
        path = self._search()
        assert self._result is not None
        if self.verify:
            self._verify(state.model, self._result, path)
        self._conclude(self._result)
        self._samples.clear()
        self._norms.clear()

    def _search(self) -> Path:
        if not self._samples:
            raise ValueError("no sampled layer saw a calibration token: calibrate with more or other text")
        proxy = PROXIES[self.proxy]
        study = Study(
            model=self._model_name,
            mask=self._mask,
            proxy=proxy.name,
            higher_is_better=proxy.higher_is_better,
            optimiser=self.optimiser,
            space=self._space(),
            seed=self.seed,
            sample={
                "layers": [sample.name for sample in self._samples],
                "rows": self.rows,
                "tokens": self._tokens,
                "fingerprint": fingerprint(self._samples),
            },
        )
        path = Path(self.record) if self.record is not None else study.default_path()
        self._result = study
        logger.info(f"PHO: searching on {len(self._samples)} layers; recorded in {path}")
        try:
            self._result = search(
                lambda coefficients: evaluate(self._samples, coefficients, self._mask, proxy),
                study,
                candidates=_CANDIDATES if self.candidates is None and self.minutes is None else self.candidates,
                minutes=self.minutes,
                path=path,
                progress=lambda done: logger.info(
                    f"PHO: {len(done.candidates) - 1} candidates, {done.seconds:.0f} s, "
                    f"{done.proxy} {done.best.value:.6g} (RIA {done.reference.value:.6g}): {done.best.coefficients}"
                ),
            )
        except KeyboardInterrupt:
            logger.warning(f"PHO: interrupted; the study is kept in {path}, and the same run resumes it")
            raise
        return path

    def _conclude(self, study: Study) -> None:
        """Hand over what the study found, or RIA's coefficients where it found nothing better."""
        logger.info(f"PHO: {study}")
        chosen = study.recommended
        if study.finalists:
            if chosen == study.finalists[0].coefficients:
                logger.warning(f"PHO: no finalist is clearly better than {chosen}, so these are used")
        elif chosen == RIA:
            logger.warning(
                f"PHO: no candidate has a better {study.proxy} than RIA's coefficients "
                f"({study.reference.value:.6g}), so RIA's are used"
            )
        self._hand_over(chosen)

    def _verify(self, model: torch.nn.Module, study: Study, path: Path) -> None:
        own = [] if self._crepe is None else [Coefficients(**{name: self._crepe.value(name) for name in _NAMES})]
        shortlist = study.shortlist(self.finalists, own)
        for finalist in verify(study, shortlist, lambda coefficients: self._losses(model, coefficients), path):
            logger.info(f"PHO: perplexity {finalist.perplexity:.3f}: {finalist.coefficients}")

    def _losses(self, model: torch.nn.Module, coefficients: Coefficients) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Of the model pruned with these coefficients, the summed loss on sequences of the calibration data, and how
        many tokens of each it predicted."""
        sequences = list(self._sequences())
        if not sequences:
            raise ValueError("verify: true needs a calibration sequence of at least two tokens, and there is none")
        with (
            pruned(self._norms, coefficients, self._mask),
            _working_head(model),
            HooksMixin.disable_hooks(),
            summed_loss(model, sequences[0][None]) as loss,
        ):
            losses = tuple(loss(sequence[None]) for sequence in sequences)
        return losses, tuple(len(sequence) - 1 for sequence in sequences)

    def _sequences(self) -> Iterator[torch.Tensor]:
        """The first sequences of the calibration data without their padding, int64 [length] each."""
        left = _VERIFICATION_SEQUENCES
        for batch in self._dataloader:
            masks = batch.get("attention_mask")
            masks = torch.ones_like(batch["input_ids"]) if masks is None else masks
            for ids, mask in zip(batch["input_ids"], masks, strict=True):
                real = ids[mask.bool()]
                if len(real) > 1 and left > 0:
                    left -= 1
                    yield real
            if left == 0:
                return

    def _hand_over(self, coefficients: Coefficients) -> None:
        self._chosen = coefficients
        if self._crepe is not None:
            self._crepe.use(**dataclasses.asdict(coefficients))

    def _searched_for(self) -> CRePEModifier | None:
        """The CRePEModifier after this modifier in the recipe."""
        found = [modifier for modifier in order.modifiers_after(self) if isinstance(modifier, CRePEModifier)]
        if len(found) > 1:
            raise ValueError(
                f"PHOSearchModifier has {len(found)} CRePEModifiers after it and cannot tell which it searches for: "
                "keep one"
            )
        if found and found[0].score != "crepe":
            raise ValueError(
                f"PHOSearchModifier searches for the coefficients of score: crepe, and the CRePEModifier after it has "
                f"score: {found[0].score}, which has none: leave PHOSearchModifier out"
            )
        return found[0] if found else None

    def _wanted_mask(self) -> Mask:
        """The masks to search for: the CRePEModifier's, or those of this modifier's own fields."""
        crepe = self._crepe
        if crepe is None and self.mask_structure is None:
            raise ValueError(
                "PHOSearchModifier does not know what to search for: put a CRePEModifier after it, or give it "
                "mask_structure"
            )
        fields = {}
        for name in ("mask_structure", "sparsity", "comparison_group"):
            own = getattr(self, name)
            theirs = None if crepe is None else crepe.value(name)
            if isinstance(theirs, dict):
                if own is None:
                    raise ValueError(
                        f"the CRePEModifier's {name} differs between layers, and the search is for one: give "
                        f"PHOSearchModifier a {name}, such as their mean"
                    )
            elif own is not None and theirs is not None and own != theirs:
                raise ValueError(f"{name}={own} contradicts the CRePEModifier's {name}={theirs}: leave it out")
            elif own is None:
                own = theirs
            fields[name] = own
        structure = parse_mask_structure(fields["mask_structure"])
        if structure is not None:
            return Mask(fields["mask_structure"], structure[0] / structure[1])
        if fields["sparsity"] is None:
            raise ValueError('mask_structure="0:0" is unstructured and needs `sparsity`, such as 0.5')
        return Mask("0:0", fields["sparsity"], fields["comparison_group"] or "row")

    def _space(self) -> SearchSpace:
        bounds = self.space or {}
        known = {field.name for field in dataclasses.fields(SearchSpace)}
        for name in bounds:
            if name not in known:
                raise ValueError(f"space has no bounds called {name}; it has {', '.join(sorted(known))}")
        return SearchSpace(**bounds)


def _coefficients(found: dict[str, float]) -> Coefficients:
    try:
        return Coefficients(**{**found, "kernel_size": int(found["kernel_size"])})  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise ValueError(f"found={found} must hold exactly {', '.join(_NAMES)}") from error


@contextmanager
def _working_head(model: Any) -> Iterator[None]:
    """Undo, meanwhile, that the toolkit replaces the head's forward during calibration."""
    head = model.get_output_embeddings()
    with patch_attr(head, "forward", functools.partial(type(head).forward, head)):
        yield
