"""One folder for all that outlives a run."""

from pathlib import Path

from crepe_llm.cli.quiet import log_folder
from crepe_llm.kernels.cuda import plans
from crepe_llm.samples.fetch import cache_folder
from crepe_llm.user_cache import user_cache

ROOT = Path(__file__).parents[1]


def test_all_that_is_kept_lies_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("CREPE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "crepe-llm"
    assert cache_folder(None) == user_cache()
    assert log_folder().parent == plans.cache_path().parent == user_cache()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "crepe-llm"


def test_no_other_file_asks_for_the_cache_folder():
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert [path.name for path in files if 'get("XDG_CACHE_HOME")' in path.read_text()] == ["user_cache.py"]
