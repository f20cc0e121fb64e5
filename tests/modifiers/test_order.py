"""The table of orders: it names every modifier, and what it prints is what it refuses."""

import crepe_llm.modifiers
from crepe_llm.modifiers import order


def test_every_modifier_has_a_place():
    assert order.PLACES.keys() == set(crepe_llm.modifiers.__all__)


def test_the_table_has_a_row_for_each_and_all_roles_are_real():
    lines = order.markdown_table().splitlines()
    assert len(lines) == 2 + len(order.PLACES) and len({line.count("|") for line in lines}) == 1
    roles = {place.role for place in order.PLACES.values()}
    for place in order.PLACES.values():
        assert roles >= place.not_after.keys() | place.not_before.keys()


def test_a_role_that_must_not_come_before_is_never_one_that_must():
    for name, place in order.PLACES.items():
        assert not (place.after is not None and "prunes" in place.not_after), name
        assert not (place.before is not None and "prunes" in place.not_before), name
