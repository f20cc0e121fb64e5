"""Studies of PHO: one compressed file beside the results, unpacked where they are used.

python benchmarks/studies.py --pack     # put what the benchmarks have searched since into the file
"""

import argparse
import tarfile
from pathlib import Path

from crepe_llm.user_cache import user_cache
from records import RESULTS

ARCHIVE = RESULTS / "studies.tar.xz"


def studies_folder() -> Path:
    """A folder in the user's cache that holds the archive's studies; what is there already is left as it is."""
    folder = user_cache() / "benchmark_studies"
    folder.mkdir(parents=True, exist_ok=True)
    if ARCHIVE.exists():
        with tarfile.open(ARCHIVE) as archive:
            new = [member for member in archive.getmembers() if not (folder / member.name).exists()]
            archive.extractall(folder, members=new, filter="data")
    return folder


def pack_studies(folder: Path, archive: Path = ARCHIVE) -> int:
    """Write all studies of a folder into one file that depends on nothing but them; returns how many there are."""
    paths = sorted(folder.rglob("*.json"))
    with tarfile.open(archive, "w:xz") as file:
        for path in paths:
            member = tarfile.TarInfo(str(path.relative_to(folder)))
            member.size = path.stat().st_size
            with path.open("rb") as content:
                file.addfile(member, content)
    return len(paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", action="store_true", help="write the archive anew")
    options = parser.parse_args()
    folder = studies_folder()
    if options.pack:
        print(f"{pack_studies(folder)} studies: {ARCHIVE}")
    else:
        print(folder)


if __name__ == "__main__":
    main()
