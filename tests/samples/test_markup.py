import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.samples.markup import strip_wiki_markup


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
    assert strip_wiki_markup(markup) == prose


@settings(max_examples=200, deadline=None)
@given(st.text("[]{}|='<>/ref!-\n a*", max_size=60))
def test_any_markup_is_survived(markup):
    prose = strip_wiki_markup(markup)
    assert "{{}}" not in prose and "\n\n\n" not in prose and prose == prose.strip()
