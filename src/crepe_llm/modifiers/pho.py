"""The search for CRePE's coefficients as a modifier."""

import dataclasses
import functools
import hashlib
import json
import time
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from loguru import logger
from pydantic import (
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from crepe_llm import processes
from crepe_llm.calibration.shares import give_all, give_share
from crepe_llm.functional.masks import ComparisonGroup, parse_mask_structure
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.modifiers import order
from crepe_llm.modifiers.crepe import CRePEModifier
from crepe_llm.modifiers.fields import MaskStructure
from crepe_llm.modifiers.judging import as_it_predicts, if_usable, pruning_of, texts_in, watch_calls
from crepe_llm.modifiers.layers import LayerModifier, check_groups
from crepe_llm.modifiers.observe import Observer, Uncalibrated
from crepe_llm.modifiers.routing import Routing
from crepe_llm.pruning.block_pass import Calibration, Wanted
from crepe_llm.pruning.layer import weight_matrix
from crepe_llm.search.fitness import DEFAULT_PROXY, PROXIES, LayerSample, evaluate, fingerprint, sample_layers
from crepe_llm.search.known import known_points
from crepe_llm.search.rehearsal import Calls, Pruning, mask_step, own_weights
from crepe_llm.search.search import check_record, search, take_record
from crepe_llm.search.space import RIA, Coefficients, Mask, SearchSpace
from crepe_llm.search.stages import Cost, choose_rounds, judge, run_last_stage
from crepe_llm.search.study import Study, StudyError
from crepe_llm.search.trials import Plan, Stage
from crepe_llm.search.whole_model import WholeModel

__all__ = ["PHOSearchModifier"]

_CANDIDATES = 200
_NAMES = list(RIA.of_score)
# The share of `minutes` that the search by proxy may take.
_BY_PROXY = 0.25
# More processes than a generation has candidates have nothing to do in the search by proxy.
_GENERATION = 8


class PHOSearchModifier(LayerModifier):
    """
    Modifier that searches for the coefficients of the CRePEModifier after it, in the manner of the PHO of
    https://arxiv.org/abs/2606.01544, whose internals are not public to us. It changes no weight.

    A proxy on a sample of layers and rows is the first filter. Then the whole model is pruned with a few dozen
    candidates, and judged by the divergence of its predictions from the dense model's. Coefficients that were good on
    other models are among them; a surrogate of the losses proposes most of the others. In the last stage the model is
    pruned with the best few as the recipe prunes it, by the modifiers that share the CRePEModifier's pass. The
    calibration text itself judges them; its two halves check each other's choice. The CRePEModifier's own coefficients
    stay unless others are clearly better and that check, or a stricter test on all of the text, confirms it.
    docs/pho.md says how.

    Several processes, such as torchrun starts, share the candidates out, and find what one would find. Each gathers
    statistics over all of the calibration data.

    Of unstructured masks, which weights compete is searched for, too: those of a row or of the whole matrix.

    The CRePEModifier prunes with what was found, and the recipe that is saved with the model has it: as `found` here,
    and as the CRePEModifier's coefficients. So that recipe prunes the same again without searching.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        PHOSearchModifier:
          minutes: 10
        CRePEModifier:
          mask_structure: "2:4"
    ```

    Lifecycle:

    - on_initialize
        - find the CRePEModifier, draw the sample of its layers
        - with `found`: hand the coefficients over, and be done
    - on_calibration_start
        - watch the layers' inputs
    - on_sequential_epoch_end
        - reduce each sampled layer of the block to its sample
    - on_calibration_end
        - remove_hooks()
        - search, judge, hand the coefficients over
    - on_finalize
        - nothing is left to do

    :param proxy: the first filter, a name from `crepe_llm.search.fitness.PROXIES`
    :param optimiser: of the search by proxy, `cma` (CMA-ES) or `random`
    :param candidates: how many are judged by the proxy; 200 where it is left out
    :param tokens: the most tokens, candidates times windows, that the pruned model is judged on. Where neither this nor
        `minutes` is given, 32 candidates on 8192 tokens each and 4 on 16384, as far as there is text
    :param minutes: the most that searching and judging may take, calibration aside. Where the incumbent alone takes
        that long, its coefficients are used
    :param space: bounds that differ from `crepe_llm.search.space.SearchSpace`'s, such as `{activation_exponent: [0.2,
        1.0]}`; `{comparison_groups: []}` keeps the mask's own
    :param seed: of the sample and of the optimiser
    :param layers_per_kind: how many layers of each kind (q_proj, down_proj and so on) are in the sample
    :param rows: how many rows of each sampled layer are
    :param record: file in which the search is recorded and from which it is resumed. Where it is left out, a file in
        `crepe-llm/pho_studies` in the user's cache folder, named after model, structure and settings
    :param study: file of an earlier study, on this or another model. Nothing is searched then: the last stage alone
        judges the two best of the study on this model
    :param incumbent: the coefficients to beat where no CRePEModifier follows; RIA's where it is left out
    :param starts: coefficients that are tried on the whole model in any case, each with a `comparison_group` or the
        mask's own; by default those of the shipped recipes and others that were good on models at hand
        (`crepe_llm.search.known`). The first is tried in both groups
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
    tokens: int | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0)
    space: dict[str, Any] | None = None
    seed: int = 0
    layers_per_kind: int = Field(default=4, gt=0)
    rows: int = Field(default=96, gt=0)
    record: str | None = None
    study: str | None = None
    incumbent: dict[str, float | str] | None = None
    starts: list[dict[str, float | str]] | None = None
    found: dict[str, float | str] | None = None
    mask_structure: MaskStructure | None = None
    sparsity: float | None = Field(default=None, gt=0, lt=1, allow_inf_nan=False)
    comparison_group: ComparisonGroup | None = None
    uncalibrated: Uncalibrated = "dense"

    _crepe: CRePEModifier | None = PrivateAttr(default=None)
    _mask: Mask = PrivateAttr()
    _model_name: str = PrivateAttr(default="")
    _sampled: set[str] = PrivateAttr(default_factory=set)
    _samples: list[LayerSample] = PrivateAttr(default_factory=list)
    _calls: Calls | None = PrivateAttr(default=None)
    _tokens: int = PrivateAttr(default=0)
    _digest: Any = PrivateAttr(default_factory=hashlib.sha256)
    _source: Study | None = PrivateAttr(default=None)
    _result: Study | None = PrivateAttr(default=None)
    _chosen: Coefficients | None = PrivateAttr(default=None)

    @property
    def chosen(self) -> dict[str, Any]:
        """The coefficients of the recipe or of the study; empty before they are known."""
        return {} if self._chosen is None else self._chosen.fields

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
        self._bounds()
        if self.study is not None and self.study == self.record:
            raise ValueError(
                f"study={self.study} is read and record={self.record} is written: give record another file"
            )
        if self.tokens is not None and self.minutes is not None:
            raise ValueError(f"tokens={self.tokens} and minutes={self.minutes} are both budgets: give one of the two")
        for name in ("incumbent", "found"):
            value = getattr(self, name)
            if value is not None:
                _coefficients(name, value)
        for values in self.starts or []:
            _coefficients("starts", values)
        # A search that has been done needs no calibration epoch of its own.
        self.requires_calibration_data = self.found is None
        return self

    @model_serializer(mode="wrap")
    def _with_what_was_found(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A saved recipe has what was found."""
        return serialize(self) | ({"found": self.chosen} if self._chosen else {})

    @property
    def looks_at_layers(self) -> bool:
        return self.found is None

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        order.check(self)
        self._crepe = self._searched_for()
        if self.found is not None:
            self.take_data(state, **kwargs)
            self._hand_over(_coefficients("found", self.found))
            logger.info(f"PHO: coefficients of the recipe, no search: {_coefficients('found', self.found)}")
            return True
        self._mask = self._wanted_mask()
        if self._crepe is not None and self.incumbent is not None:
            raise ValueError(
                f"incumbent={self.incumbent} is for a search without a CRePEModifier, and there is one, whose own "
                "coefficients are to be beaten: leave incumbent out"
            )
        if self.study is not None:
            path = self.study
            self._source = processes.by_first(lambda: Study.load(path))
            self._source.require_mask(self._mask)
            try:
                assert self._source.challengers
            except StudyError as error:
                raise StudyError(f"study={path}: {error}; restore the file, or name another study") from error
        super().on_initialize(state, **kwargs)
        self._model_name = Path(state.model.config._name_or_path or type(state.model).__name__).name
        if self._source is None:
            self._sampled = set(sample_layers(self._layers.values(), self.layers_per_kind, self.seed))
        if self.record is not None:
            check_record(self._empty_study(), self.record)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self.requires_calibration_data:
            return
        if self._crepe is not None and self._crepe in active_session().lifecycle.recipe.modifiers:
            raise ValueError(
                "PHOSearchModifier must have searched before CRePEModifier prunes, so each needs a calibration epoch "
                'of its own: leave out pipeline=, or give oneshot pipeline="independent"'
            )
        texts_in(self._dataloader, "PHOSearchModifier")  # so that too few are found out before the calibration
        gram = PROXIES[self.proxy].needs_gram
        wanted = {module: Wanted(name, gram and name in self._sampled) for module, name in self._layers.items()}
        give_all(self._dataloader)
        self._observer = Observer(self, state.model, self._dataloader, wanted)
        self._calls = watch_calls(self._observer, state.model)

    def check_layer(self, name: str, module: torch.nn.Module) -> None:
        check_groups(name, module, self._mask.mask_structure)

    def find_layers(self, model: torch.nn.Module) -> dict[torch.nn.Module, str]:
        return super().find_layers(model) if self._crepe is None else self._crepe.find_layers(model)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Reduce the layers to what the search needs of them; they stay as they are."""
        if self._observer is not None:
            with processes.alone():
                for module, name, statistics in self._observer.ended(modules, self.uncalibrated):
                    self._reduce(module, name, statistics)

    def _reduce(self, module: torch.nn.Module, name: str, statistics: InputStatistics) -> None:
        self._digest.update(statistics.norm.cpu().numpy().tobytes())
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
        sequences = texts_in(self._dataloader, "PHOSearchModifier")
        give_share(self._dataloader)
        study = processes.from_first(self._new_study(sequences))
        path = Path(self.record) if self.record is not None else study.default_path()
        self._result = study
        logger.info(f"PHO: recorded in {path}, from which the same run resumes")
        started = time.perf_counter()
        try:
            if self._source is None:
                self._search(study, path)
            with own_weights(self._layers), as_it_predicts(state.model) as routing:
                pruning = functools.partial(self._pruning, routing)
                guess = (*self._starts(), self._own())[0]
                pruned = WholeModel(state.model, sequences, guess, pruning, self._calls)
                self._judge(pruned, study, path, started)
        except KeyboardInterrupt:
            logger.warning(f"PHO: interrupted; the study is kept in {path}, and the same run resumes it")
            raise
        self._conclude(study)
        self._samples.clear()
        self._calls = None

    def _new_study(self, sequences: list[torch.Tensor]) -> Study:
        """The settings of a study, before anything is measured."""
        if self._source is None and not self._samples:
            raise ValueError("no sampled layer saw a calibration token: calibrate with more or other text")
        digest = self._digest.copy()
        for sequence in sequences:
            digest.update(sequence.cpu().numpy().tobytes())
        study = self._empty_study()
        study.sample = {
            "layers": [sample.name for sample in self._samples],
            "rows": self.rows,
            "tokens": self._tokens,
            "fingerprint": fingerprint(self._samples),
            "texts": digest.hexdigest()[:16],
            "recipe": json.loads(json.dumps(self._described_recipe())),
            "starts": [each.fields for each in self._starts()],
        }
        return study

    def _empty_study(self) -> Study:
        """A study with those settings that are known before the calibration."""
        proxy = PROXIES[self.proxy]
        return Study(
            model=self._model_name,
            mask=self._mask,
            proxy=proxy.name,
            higher_is_better=proxy.higher_is_better,
            optimiser=self.optimiser,
            space=self._space(),
            seed=self.seed,
        )

    def _described_recipe(self) -> dict[str, Any] | None:
        """What the last stage prunes with: what follows CRePE's mask, and what differs from layer to layer in it."""
        if self._crepe is None:
            return None
        values = {name: self._crepe.value(name) for name in ("sparsity", "mask_structure")}
        mappings = {name: value for name, value in values.items() if isinstance(value, dict)}
        return self._crepe.pruning_pass.described() | ({type(self._crepe).__name__: mappings} if mappings else {})

    def _search(self, study: Study, path: Path) -> None:
        """Find by the proxy what is worth measuring."""
        proxy = PROXIES[self.proxy]
        logger.info(f"PHO: searching by {proxy.name} on {len(self._samples)} layers")
        search(
            lambda coefficients: evaluate(self._samples, coefficients, self._mask, proxy),
            study,
            candidates=_CANDIDATES if self.candidates is None else self.candidates,
            minutes=None if self.minutes is None else self.minutes * _BY_PROXY * min(processes.count(), _GENERATION),
            path=path,
            progress=lambda done: logger.info(
                f"PHO: {len(done.candidates) - 1} candidates, {done.seconds:.0f} s, "
                f"{done.proxy} {done.best.value:.6g} (RIA {done.reference.value:.6g}): {done.best.coefficients}"
            ),
        )

    def _judge(self, pruned: WholeModel[Coefficients], study: Study, path: Path, started: float) -> None:
        """Measure candidates on the pruned model, until the last stage says what to use."""
        own, starts = self._own(), self._starts()
        quick, last = pruned.measures()
        if self._source is not None:
            take_record(study, path)
            lent = [study.space.competing(each, self._mask.comparison_group) for each in self._source.challengers]
            run_last_stage(study, [own, *lent], last, path, _progress)
            return

        def plan(seconds: float) -> Plan:
            known = study.plan
            if known is not None and known.budget == self._budget and len(known.rounds) == 2:
                return known
            pruned.prepare()
            before = time.perf_counter()
            with processes.alone():
                quick.losses(own, range(2))
            cost = Cost(time.perf_counter() - before, pruned.seconds, seconds, processes.count())
            return self._plan(cost, pruned.tokens, time.perf_counter() - started)

        judge(study, [own, *starts], (quick, last), plan, path, _progress)

    @property
    def _budget(self) -> str:
        return f"tokens={self.tokens}" * (self.tokens is not None) + f"minutes={self.minutes}" * bool(self.minutes)

    def _plan(self, cost: Cost, tokens: tuple[int, ...], spent: float) -> Plan:
        budget = self._budget
        seconds = None if self.minutes is None else 60 * self.minutes - spent
        rounds = choose_rounds(tokens, cost, tokens=self.tokens, seconds=seconds)
        limit = None if seconds is None or not rounds else cost.limit(rounds, seconds)
        plan = Plan(budget, rounds, cost.of(rounds) if rounds else 0.0, limit)
        if rounds:
            stages = ", ".join(f"{each.candidates} candidates on {each.windows} windows" for each in rounds)
            logger.info(f"PHO: {stages}: about {plan.seconds / 60:.1f} minutes more, after {spent / 60:.1f}")
        else:
            logger.warning(
                f"PHO: {budget} does not pay for comparing anything with the recipe's coefficients, which stay: a "
                f"candidate takes {cost.pruning + cost.window:.1f} s, in the last stage {cost.last:.1f} s"
            )
        return plan

    def _pruning(self, routing: Routing, coefficients: Coefficients, masks_alone: bool) -> Pruning:
        """How the recipe's modifiers prune with these coefficients, or their masks alone."""
        if self._crepe is None:
            step = mask_step(coefficients, self._mask)
            wanted = {module: routing.counting(module, Wanted(name)) for module, name in self._layers.items()}
            return Pruning(wanted, Calibration(), lambda layer: if_usable(layer, self.uncalibrated, step))
        self._crepe.use(**coefficients.fields)
        return pruning_of(self._crepe, masks_alone, routing)

    def _starts(self) -> list[Coefficients]:
        """What the first stage measures beside the incumbent in any case."""
        starts = (
            list(known_points(self._mask))
            if self.starts is None
            else [_coefficients("starts", values) for values in self.starts]
        )
        space, own = self._space(), self._mask.comparison_group
        others = [group for group in space.comparison_groups if group != own]
        first = [space.competing(each, other) for each in starts[:1] for other in others]
        return list(dict.fromkeys([*(space.competing(each, own) for each in starts), *first]))

    def _own(self) -> Coefficients:
        """The coefficients that others must beat."""
        own = RIA if self.incumbent is None else _coefficients("incumbent", self.incumbent)
        if self._crepe is not None:
            own = Coefficients(**{name: self._crepe.value(name) for name in _NAMES})
        return self._space().competing(own, self._mask.comparison_group)

    def _conclude(self, study: Study) -> None:
        """Hand over what the last stage says."""
        logger.info(f"PHO: {study}")
        last = study.stages[-1]
        first = last.trials[0]
        winner = next(trial for trial in last.trials if trial.coefficients == study.recommended)
        if winner is first:
            logger.warning(f"PHO: nothing is clearly better than {first.coefficients}, so these are used")
        else:
            gain, error = winner.gain_over(first)
            logger.info(
                f"PHO: {winner.coefficients} is better than {first.coefficients} by {gain:.4f} nats a token, with a "
                f"standard error of {error:.4f}, so these are used"
            )
        if self._crepe is not None:
            self._crepe.pruning_pass.forget()
        self._hand_over(winner.coefficients)

    def _hand_over(self, coefficients: Coefficients) -> None:
        self._chosen = coefficients
        if self._crepe is not None:
            self._crepe.use(**coefficients.fields)

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
        others = [type(m).__name__ for m in order.modifiers_after(self) if isinstance(m, SparsityModifierBase)]
        if others and not found:
            raise ValueError(
                f"PHOSearchModifier searches for a CRePEModifier's coefficients, of which {others[0]} has none: leave "
                "PHOSearchModifier out"
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
        allocating: list[Any] = [m for m in order.modifiers_after(self) if order.role_of(m) == "allocates"]
        fields = {}
        for name in ("mask_structure", "sparsity", "comparison_group"):
            own = getattr(self, name)
            theirs, whose = None if crepe is None else crepe.value(name), "CRePEModifier"
            if name == "sparsity" and allocating and theirs is None:  # it tells the CRePEModifier later
                theirs, whose = allocating[0].sparsity, type(allocating[0]).__name__
            if isinstance(theirs, dict):
                if own is None:
                    raise ValueError(
                        f"the {whose}'s {name} differs between layers, and the search is for one: give "
                        f"PHOSearchModifier a {name}, such as their mean"
                    )
            elif own is not None and theirs is not None and own != theirs:
                raise ValueError(f"{name}={own} contradicts the {whose}'s {name}={theirs}: leave it out")
            elif own is None:
                own = theirs
            fields[name] = own
        structure = parse_mask_structure(fields["mask_structure"])
        if structure is not None:
            return Mask(fields["mask_structure"], structure[0] / structure[1])
        if fields["sparsity"] is None:
            raise ValueError('mask_structure="0:0" is unstructured and needs `sparsity`, such as 0.5')
        if fields["sparsity"] == 0:
            raise ValueError("sparsity=0 prunes nothing, so that no coefficients are better than others: give 0.5, say")
        return Mask("0:0", fields["sparsity"], fields["comparison_group"] or "row")

    def _space(self) -> SearchSpace:
        """Where to search: which weights compete, too, where that is a choice and not fixed by `space`."""
        bounds = self._bounds()
        if self._mask.mask_structure != "0:0":
            if bounds.comparison_groups:
                raise ValueError(
                    f"space has comparison_groups={bounds.comparison_groups}, and in {self._mask} masks the weights of "
                    "a group of M compete: leave comparison_groups out"
                )
            return bounds
        if "comparison_groups" in (self.space or {}):
            return bounds
        return dataclasses.replace(bounds, comparison_groups=get_args(ComparisonGroup))

    def _bounds(self) -> SearchSpace:
        bounds = self.space or {}
        known = {field.name for field in dataclasses.fields(SearchSpace)}
        for name in bounds:
            if name not in known:
                raise ValueError(f"space has no bounds called {name}; it has {', '.join(sorted(known))}")
        try:
            return SearchSpace(**bounds)
        except TypeError as error:
            raise ValueError(
                f"space={bounds}: {error}; give two numbers for each of column, neighbourhood and activation_exponent, "
                "such as column: [0.1, 10], a list of kernel_sizes and one number for row"
            ) from error


def _coefficients(field: str, values: dict[str, float | str]) -> Coefficients:
    try:
        size = int(values["kernel_size"])
        if size != values["kernel_size"]:
            raise ValueError(f"{field}={values}: kernel_size must be a whole number")
        return Coefficients(**{**values, "kernel_size": size})  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{field}={values} must hold exactly {', '.join(_NAMES)}, or comparison_group, too") from error


def _progress(stage: Stage) -> None:
    best = min(stage.trials, key=lambda trial: trial.loss)
    logger.info(
        f"PHO: {stage.name}: {len(stage.trials)} candidates, the best so far diverges by {best.loss:.4f} nats a token: "
        f"{best.coefficients}"
    )
