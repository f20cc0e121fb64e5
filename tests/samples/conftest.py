import zipfile

import pytest

from package_index import PARTS


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of real wheels that stands in for the package index: two packages with a part of a file each."""
    folder = tmp_path / "index"
    folder.mkdir()
    for i, part in enumerate(PARTS):
        with zipfile.ZipFile(folder / f"crepe_part{i}-1.0-py3-none-any.whl", "w") as wheel:
            info = f"crepe_part{i}-1.0.dist-info"
            wheel.writestr(f"crepe_part{i}/data/file.bin.part{i}", part)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: crepe-part{i}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder
