from crepe_llm.modifiers.tables import aligned


def test_names_are_padded_to_the_longest_or_the_head():
    assert aligned(("layer", "pruned"), [("a.longer.name", "50 %"), ("all", "")]) == (
        "layer          pruned\na.longer.name  50 %\nall"
    )
    assert aligned(("layer", "pruned"), []) == "layer  pruned"
    assert aligned(("layer", "pruned"), [("a", "50 %")]) == "layer  pruned\na      50 %"
