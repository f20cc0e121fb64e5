import io
import random

import sentencepiece
from tokenizers import Tokenizer, models

from crepe_llm.samples import gguf


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
    types = [gguf._CONTROL if i < 3 else gguf._ORDINARY for i in range(len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    rebuilt = Tokenizer(models.BPE(vocab=vocabulary, merges=gguf._merges(tokens, scores, types)))
    for sentence in sentences[:100]:
        assert rebuilt.encode(sentence.replace(" ", "▁")).ids == published.encode(sentence)


def test_merges_of_white_space_come_first_and_longest_first():
    tokens = ["\n", "\n\n", "\n\n\n", "a", "b", "ab"]
    kinds = [gguf._ORDINARY, gguf._USER_DEFINED, gguf._USER_DEFINED, *[gguf._ORDINARY] * 3]
    merges = gguf._merges(tokens, [-9.0, -1000.0, -1000.0, -7.0, -8.0, -1.0], kinds)
    assert merges == [("\n\n", "\n"), ("\n", "\n\n"), ("\n", "\n"), ("a", "b")]
