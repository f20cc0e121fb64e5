"""Plain text of Wikipedia's pages."""

import bz2
import html
import re
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path

__all__ = ["dump_articles", "strip_wiki_markup"]


def dump_articles(dump: Path) -> Iterator[str]:
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
