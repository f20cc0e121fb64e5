"""Which versions of other packages this one works with; scripts/versions.sh tries them."""

from importlib.metadata import version

__all__ = ["SUPPORTED", "check_versions"]

#: For each distribution the first and the last minor version that loading, saving and recipes were tested with.
SUPPORTED = {
    "transformers": ("5.16", "5.24"),
    "compressed-tensors": ("0.19", "0.20"),
    "llmcompressor": ("0.14", "0.14"),
}


def check_versions(*names: str) -> None:
    """Raise ImportError if the version of one of these distributions, which are installed, is not supported."""
    for name in names:
        found, (first, last) = version(name), SUPPORTED[name]
        if not _minor(first) <= _minor(found) <= _minor(last):
            raise ImportError(
                f"{name} {found} does not work with crepe-llm, which supports {first} to {last}: "
                f'pip install "{name}>={first},<={last}.99"'
            )


def _minor(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
