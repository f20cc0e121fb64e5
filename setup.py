"""Builds the CPU kernel library (plain C++ behind ctypes, no torch headers) when the package is built or installed.

Without a C++ compiler the installation goes on, with a message: the package then multiplies through its slow reference.
"""

import os
import re
import sys
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

SOURCES = Path("src/crepe_llm/kernels/cpu")
MACHINE = sysconfig.get_platform()  # what is built for: _PYTHON_HOST_PLATFORM names another one for a cross compiler
X86 = MACHINE.endswith(("x86_64", "amd64"))
ARM = MACHINE.endswith(("aarch64", "arm64"))
AVX512 = (
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mprefer-vector-width=512",
)
# macro -> source, flags: one translation unit an instruction set. Which one runs is decided at run time.
VARIANTS = {
    "CREPE_HAVE_AVX2": ("avx2.cpp", ("-mavx2", "-mfma", "-mf16c"), X86),
    "CREPE_HAVE_AVX512": ("avx512.cpp", AVX512, X86),
    "CREPE_HAVE_AVX512_VNNI": ("avx512.cpp", (*AVX512, "-mavx512vnni"), X86),
    "CREPE_HAVE_AVX512_BF16": ("avx512.cpp", (*AVX512, "-mavx512vnni", "-mavx512bf16"), X86),
    "CREPE_HAVE_NEON": ("neon.cpp", (), ARM),
    "CREPE_HAVE_NEON_DOTPROD": ("neon.cpp", ("-march=armv8.2-a+dotprod",), ARM),
}
COMMON = (
    "-std=c++17",
    "-O3",
    "-g0",  # Python's own flags ask for debug information
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",  # vectors wider than registers are passed to inlined functions only
)
# An operator says by an exception what is wrong.
EXCEPTIONS = ("-fexceptions", "-frtti")


class BuildKernels(build_ext):
    """Compiles each instruction set on its own: one that the compiler does not know is left out."""

    def get_ext_filename(self, fullname: str) -> str:
        # Called through ctypes, the library depends on no Python version: its name has none either.
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        output = self.get_ext_fullpath(ext.name)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        try:
            wanted = {macro: spec[:2] for macro, spec in VARIANTS.items() if spec[2]}
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = {
                    macro: pool.submit(self._compile, source, [*COMMON, *flags, f"-D{macro}"])
                    for macro, (source, flags) in wanted.items()
                }
            objects, macros = [], []
            for macro, job in jobs.items():
                try:
                    objects += job.result()
                    macros.append(macro)
                except CCompilerError:
                    self.announce(
                        f"crepe-llm: this compiler cannot build {wanted[macro][0]} for {macro}; left out", level=3
                    )
            for source in ("portable.cpp", "api.cpp"):
                objects += self._compile(source, [*COMMON, *(f"-D{macro}" for macro in macros)])
            objects += self._compile("operator.cpp", [*COMMON, *EXCEPTIONS])
            strip = ["-Wl,--strip-all"] if sys.platform == "linux" else []
            self.compiler.link_shared_object(objects, output, target_lang="c++", extra_postargs=strip)
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            sys.stderr.write(
                f"\ncrepe-llm: the CPU kernels were NOT built ({error}).\n"
                "crepe-llm: 2:4 products on the CPU will use the slow reference path. Install a C++17 compiler "
                "(g++ or clang++), then install again without pip's cache, which keeps what was built without one:\n"
                "pip install --force-reinstall --no-deps --no-cache-dir .\n"
                "(of what came from an index: --no-binary crepe-llm crepe-llm instead of the dot)\n\n"
            )

    def _compile(self, source: str, flags: list[str]) -> list[str]:
        # An output directory a set of flags: several variants are made from one source.
        directory = Path(self.build_temp) / flags[-1].lstrip("-D")
        return self.compiler.compile([str(SOURCES / source)], output_dir=str(directory), extra_postargs=flags)


class WheelForAnyPython(bdist_wheel):
    """Tags the wheel with its platform alone: nothing in it depends on Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def index_readme() -> str:
    """README.md as a package index shows it: its links lead to the files of this version in the project's repository.

    Where pyproject.toml names no repository, files beside it are named, not linked, its pictures are left out, and it
    says where the files are.
    """
    text = Path("README.md").read_text(encoding="utf-8")
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project.get("urls", {}).get("Repository")
    if repository:
        at, version = repository.rstrip("/"), f"v{project['version']}"
        text = re.sub(r"(!\[[^\]]*\]\()(?!https?://)([^)]*\))", rf"\g<1>{at}/raw/{version}/\2", text)
        return re.sub(r"(\]\()(?!https?://)([^)#][^)]*\))", rf"\g<1>{at}/blob/{version}/\2", text)
    text = re.sub(r"!\[[^\]]*\]\((?!https?://)[^)]*\)\n*", "", text)
    text = re.sub(r"\[([^\]]+)\]\((?!https?://)([^)#]*)#?[^)]*\)", _named, text)
    return text.rstrip() + "\n\nThe files that this page names are in the source distribution.\n"


def _named(link: re.Match[str]) -> str:
    words, path = link.groups()
    return f"{words} (`{path}`)" if path and path != words.strip("`") else words


setup(
    long_description=index_readme(),
    long_description_content_type="text/markdown",
    # `optional` lets an editable or wheel build go on when the library is missing.
    ext_modules=[
        Extension("crepe_llm.kernels.cpu._kernels", [str(SOURCES / "api.cpp")], language="c++", optional=True)
    ],
    cmdclass={"bdist_wheel": WheelForAnyPython, "build_ext": BuildKernels},
)
