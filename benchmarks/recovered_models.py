"""The models of recover.py on disk: pruned by a method of methods.py, then trained; and what is measured on them."""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from crepe_llm import samples
from crepe_llm.evaluation.perplexity import perplexity
from crepe_llm.training.distillation import DistillationSettings, distill
from method_recipes import MODELS
from method_runs import prune
from records import Row

CORPORA = ("test", "valid", "news")
# How a start is trained unless a run says otherwise: as the package does. The rate is a choice of each benchmark.
_DEFAULTS = DistillationSettings()
TRAINING: Row = {name: getattr(_DEFAULTS, name) for name in ("batch", "warmup", "rank", "self_generated")}
RELATIVE_RATE = _DEFAULTS.relative_rate


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how starts are made, where they are kept and on how much they are measured."""
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of calibration and training")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of every window (%(default)s)")
    parser.add_argument("--measured", type=int, default=8192, help="tokens of each corpus (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the folders")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-models"), help="where models are kept")


def texts_of(corpus: str) -> tuple[str, list[str]]:
    """What a report calls a corpus, and its texts."""
    if corpus == "news":
        return "ABC news 2001 (gensim 4.4.0)", samples.news()
    wikipedia = samples.wikipedia()
    return f"{wikipedia.name}, {corpus}", getattr(wikipedia, corpus)


def measure(model: Any, tokenizer: Any, length: int, tokens: int) -> Row:
    """Perplexity on every corpus, and how many tokens it was measured on."""
    found: Row = {"perplexity": {}, "predicted": {}}
    for corpus in CORPORA:
        name, texts = texts_of(corpus)
        windows = samples.token_windows(tokenizer, texts, length, tokens=tokens)
        result = perplexity(model, windows, corpus=name, progress=False)
        found["perplexity"][corpus], found["predicted"][corpus] = result.perplexity, result.tokens
    return found


def pruned(key: Row, folder: Path) -> tuple[Path, float]:
    """The folder of a start, made if it is not there yet, and the seconds that pruning took."""
    name = "-".join(str(key[field]) for field in ("model", "start", "structure", "seed", "dtype")).replace(" ", "")
    made = folder / name
    if not (made / "config.json").is_file():
        shutil.rmtree(made, ignore_errors=True)
        model, tokenizer, seconds, _ = prune(key | {"method": key["start"]})
        tokenizer.save_pretrained(made)
        (made / "seconds.txt").write_text(f"{seconds:.1f}\n")
        model.save_pretrained(made)
    return made, float((made / "seconds.txt").read_text())


def recovered(key: Row, source: Path, folder: Path) -> tuple[Path, Row]:
    """The folder of a start after the key's training, made if it is not there yet, and the figures of the training."""
    rate = key.get("relative_rate") or key["learning_rate"]
    target = folder / f"{source.name}-{key['method']}-{key['tokens']}-{key['self_generated']}-{rate:g}"
    figures = target.with_name(f"{target.name}.json")
    if not figures.is_file():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        figures.write_text(json.dumps(_train(key, source, target)))
    return target, json.loads(figures.read_text())


def _train(key: Row, source: Path, target: Path) -> Row:
    fields = ("method", "tokens", "learning_rate", "relative_rate", "batch", "warmup", "self_generated", "rank")
    given = {name: key[name] for name in (*fields, "length", "seed") if key.get(name) is not None}
    settings = DistillationSettings(**given)
    train = samples.wikipedia().train
    started = time.perf_counter()
    made = distill(
        source,
        target,
        target.with_name(f"{target.name}-work"),
        MODELS[key["model"]](),
        lambda tokenizer: samples.token_windows(tokenizer, train, key["length"]),
        settings,
    )
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "training_s": round(made.trained.seconds, 1),
        "steps": made.trained.steps,
        "best_step": made.trained.best_step,
        "trained_tokens": made.tokens,
        "held_out": made.trained.held_out,
        "ended": made.trained.ended,
    }
