"""The chunked loss against autograd on whole logits; the teacher's top k; which heads can be taken apart."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from crepe_llm.training import targets
from crepe_llm.training.targets import Head, Target, TopK, Whole, find_head, keep_top, mean_loss
from tiny_models import FAMILIES, VOCABULARY, configs

ROWS, WIDTH, WORDS = 23, 12, 40


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(targets, "_CHUNK_NUMEL", 7 * WORDS)
    monkeypatch.setattr(targets, "_WIDE_NUMEL", 3 * WORDS)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(bias, cap):
    head = torch.nn.Linear(WIDTH, WORDS, bias=bias)
    with torch.no_grad():
        for index, parameter in enumerate(head.parameters()):
            parameter.copy_(draws(*parameter.shape, seed=index))
    ids = torch.randint(WORDS, (ROWS,), generator=torch.Generator().manual_seed(3))
    return Head(head, cap), draws(ROWS, WIDTH, seed=4).requires_grad_(), draws(ROWS, WORDS, seed=5), ids


def capped(logits, cap):
    return logits if cap is None else cap * torch.tanh(logits / cap)


def whole_loss(logits, teacher_logits, ids, share):
    """By autograd on all logits."""
    p = log_softmax(teacher_logits, 1)
    divergence = kl_div(log_softmax(logits, 1), p, log_target=True, reduction="sum") / len(ids)
    return (1 - share) * divergence + share * cross_entropy(logits, ids)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("bias", "cap"), [(False, None), (True, None), (True, 2.0)])
def test_loss_and_gradients_are_those_of_whole_logits(bias, cap, share):
    head, hidden, teacher, ids = problem(bias, cap)
    expected = whole_loss(capped(head.module(hidden), cap), teacher, ids, share)
    wanted = torch.autograd.grad(expected, [hidden, *head.module.parameters()])
    target = Target(Whole(teacher) if share < 1 else None, ids, share)
    loss = mean_loss(hidden, head, target)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(2 * loss, [hidden, *head.module.parameters()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, 2 * other, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(mean_loss(hidden, head, target), expected.detach())


def test_logits_without_a_head():
    head, hidden, teacher, ids = problem(False, None)
    logits = head.module(hidden).detach().requires_grad_()
    kept = logits.detach().clone()
    expected = whole_loss(logits, teacher, ids, 0.5)
    (wanted,) = torch.autograd.grad(expected, logits)
    loss = mean_loss(logits, None, Target(Whole(teacher), ids, 0.5))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_teachers_top_k_and_the_rest_as_one_token(share):
    head, hidden, teacher, ids = problem(False, None)
    k = 5
    kept = keep_top(Whole(teacher), k)
    assert kept.tokens.dtype == torch.int32 and kept.log_p.dtype == torch.float16
    exact = TopK(kept.tokens, log_softmax(teacher, 1).topk(k, 1).values)
    logits = head.module(hidden)
    log_q, p = log_softmax(logits, 1), log_softmax(teacher, 1).exp()
    top = p.topk(k, 1).indices
    inside = torch.zeros_like(p, dtype=torch.bool).scatter_(1, top, True)
    rest_p, rest_q = (x.masked_fill(inside, 0).sum(1) for x in (p, log_q.exp()))
    divergence = (p * (p.log() - log_q)).masked_fill(~inside, 0).sum() + (rest_p * (rest_p / rest_q).log()).sum()
    expected = (1 - share) * divergence / len(ids) + share * cross_entropy(logits, ids)
    (wanted,) = torch.autograd.grad(expected, hidden, retain_graph=True)
    loss = mean_loss(hidden, head, Target(exact, ids, share))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], wanted, rtol=1e-4, atol=1e-6)
    rounded = mean_loss(hidden, head, Target(kept, ids, share))
    torch.testing.assert_close(rounded, expected, rtol=1e-3, atol=1e-3)


def test_the_top_of_everything_is_the_whole():
    head, hidden, teacher, ids = problem(False, None)
    log_p, tokens = log_softmax(teacher, 1).topk(WORDS, 1)
    loss = mean_loss(hidden, head, Target(TopK(tokens, log_p), ids))
    torch.testing.assert_close(loss, mean_loss(hidden, head, Target(Whole(teacher), ids)), rtol=1e-4, atol=1e-5)


def test_half_precision_is_near():
    head, hidden, teacher, ids = problem(False, None)
    exact, near = (
        mean_loss(hidden, head, Target(Whole(teacher), ids), dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(near, exact, rtol=2e-2, atol=2e-2)
    (wanted,) = torch.autograd.grad(exact, hidden)
    (found,) = torch.autograd.grad(near, hidden)
    assert found.dtype == torch.float32 and (found - wanted).norm() < 0.03 * wanted.norm()


def heads():
    gemma2 = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=1.0, query_pre_attn_scalar=8,
    )  # fmt: skip
    cohere = CohereConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logit_scale=0.25,
    )  # fmt: skip
    return {family: configs()[family] for family in FAMILIES} | {"gemma2": lambda: gemma2, "cohere": lambda: cohere}


@pytest.mark.parametrize("family", heads())
def test_a_head_counts_where_it_gives_the_models_own_logits(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(heads()[family]())
    with torch.no_grad():  # logits of a size at which a cap or a scale is seen
        model.get_output_embeddings().weight.mul_(20)
    ids = torch.randint(3, VOCABULARY, (1, 8))
    head = find_head(model, ids)
    assert model.training
    if family == "cohere":  # scales its logits
        assert head is None
        return
    assert head.cap == (1.0 if family == "gemma2" else None)
    model.eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids)[0][0]
        logits = model(input_ids=ids).logits[0]
        target = Target(None, ids[0].roll(-1), 1.0)
        torch.testing.assert_close(mean_loss(hidden, head, target), mean_loss(logits, None, target))
