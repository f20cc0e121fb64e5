"""Builds the CPU kernel library (plain C++ behind ctypes, no torch headers) when the package is built or installed.

Without a C++ compiler the installation goes on, with a message: the package then multiplies through its slow reference.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

SOURCES = Path("src/crepe_llm/kernels/cpu")
X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM = platform.machine().lower() in ("aarch64", "arm64")
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
}
COMMON = (
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)


class BuildKernels(build_ext):
    """Compiles each instruction set on its own: one that the compiler does not know is left out."""

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
            self.compiler.link_shared_object(objects, output, target_lang="c++")
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            sys.stderr.write(
                f"\ncrepe-llm: the CPU kernels were NOT built ({error}).\n"
                "crepe-llm: 2:4 products on the CPU will use the slow reference path. Install a C++17 compiler "
                "(g++ or clang++) and install crepe-llm again.\n\n"
            )

    def _compile(self, source: str, flags: list[str]) -> list[str]:
        # An output directory a set of flags: several variants are made from one source.
        directory = Path(self.build_temp) / flags[-1].lstrip("-D")
        return self.compiler.compile([str(SOURCES / source)], output_dir=str(directory), extra_postargs=flags)


setup(
    # `optional` lets an editable or wheel build go on when the library is missing.
    ext_modules=[
        Extension("crepe_llm.kernels.cpu._kernels", [str(SOURCES / "api.cpp")], language="c++", optional=True)
    ],
    cmdclass={"build_ext": BuildKernels},
)
