"""Versions that are not supported are refused, with those that are."""

import re
from importlib.metadata import version

import pytest

from crepe_llm import versions


def test_what_is_installed_is_supported():
    versions.check_versions(*versions.SUPPORTED)


@pytest.mark.parametrize("supported", [("0.1", "0.2"), ("99.0", "99.1")])
def test_others_are_refused(supported, monkeypatch):
    monkeypatch.setitem(versions.SUPPORTED, "transformers", supported)
    found, (first, last) = re.escape(version("transformers")), map(re.escape, supported)
    with pytest.raises(ImportError, match=rf"transformers {found} .* supports {first} to {last}: pip install"):
        versions.check_versions("transformers")


def test_minor_versions_are_numbers_and_not_text(monkeypatch):
    monkeypatch.setitem(versions.SUPPORTED, "transformers", ("5.9", "5.100"))
    versions.check_versions("transformers")
