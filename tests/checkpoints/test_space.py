import shutil

import pytest

from crepe_llm.checkpoints.space import check_destination


def test_places_that_can_be_written(tmp_path):
    check_destination(tmp_path, 1000)
    check_destination(tmp_path / "new" / "newer", 1000)


def test_places_that_cannot(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file"):
        check_destination(tmp_path / "file", 1000)
    with pytest.raises(OSError, match=r"1e\+06 GB are to be written, but .* GB free; make room"):
        check_destination(tmp_path / "new", 10**15)
    with pytest.raises(NotADirectoryError, match="file is a file"):
        check_destination(tmp_path / "file" / "new", 1000)
    with pytest.raises(OSError, match=r"/proc/crepe/new cannot be written \("):
        check_destination("/proc/crepe/new", 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_shard_is_written_beside_the_others(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=15 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="16 GB are to be written"):
        check_destination(tmp_path, 10**10)
    check_destination(tmp_path, 10**10, shard_bytes=10**9)
    with pytest.raises(OSError, match=r"15\.6 GB are to be written"):
        check_destination(tmp_path, 10**10, 5 * 10**9, shard_bytes=10**9)
