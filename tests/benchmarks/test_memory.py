"""Peaks of memory, and the sources of other revisions."""

import time

import torch

import memory
import revisions


def test_the_peak_counts_what_was_freed_within_the_block_and_not_what_was_there_before():
    before = torch.ones(1 << 24)
    with memory.PeakMemory() as peak:
        inside = torch.ones(1 << 25)
        time.sleep(0.2)  # the sampler looks every 10 ms
        del inside
    assert 0.9 * 2**27 < peak.growth < 1.5 * 2**27
    assert before.nbytes == 2**26


def test_the_best_recipe_without_permutation_is_crepe_and_admm():
    text = memory.recipe_text("crepe_2of4_best")
    assert "CRePEModifier" in text and "ADMMModifier" in text and "ChannelPermutationModifier" not in text


def test_a_short_recipe_makes_two_iterations_and_is_otherwise_the_same():
    text = memory.recipe_text("crepe_2of4_best", short=True)
    assert "iterations: 2" in text and "iterations" not in memory.recipe_text("crepe_2of4_best")
    assert "iterations: 2" in memory.recipe_text("pcg", short=True)


def test_a_revision_without_a_name_is_the_working_tree():
    with revisions.sources(None) as source:
        assert source == revisions.ROOT / "src"


def test_a_revisions_sources_are_there_meanwhile():
    with revisions.sources("HEAD") as source:
        assert (source / "crepe_llm" / "__init__.py").is_file()
        assert (source / "crepe_llm" / "recipes" / "crepe_2of4.yaml").is_file()
    assert not source.exists()
