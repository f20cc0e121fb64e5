"""The kernels as a C++ program: under AddressSanitizer with hostile metadata, and for AArch64 (NEON) under qemu."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "crepe_llm" / "kernels" / "cpu"
X86 = platform.machine().lower() in ("x86_64", "amd64")


def build(compiler, directory, variants, flags):
    """Compiles the driver and the kernels; ``variants`` are (macro, source, flags)."""
    common = ["-std=c++17", "-O1", "-Wno-maybe-uninitialized", f"-I{SOURCES}", *flags]
    macros = [f"-D{macro}" for macro, _, _ in variants]
    units = [(source, [f"-D{macro}", *extra]) for macro, source, extra in variants]
    units += [("portable.cpp", []), ("api.cpp", macros)]
    running, objects = [], []
    for index, (source, extra) in enumerate([*units, (ROOT / "tests" / "kernels_driver.cpp", [])]):
        objects.append(str(directory / f"{index}.o"))
        command = [compiler, *common, *extra, "-c", str(SOURCES / source), "-o", objects[-1]]
        running.append((command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for command, process in running:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, f"{' '.join(command)}\n{errors}"
    program = directory / "driver"
    subprocess.run([compiler, *flags, *objects, "-o", str(program)], check=True)
    return program


def run(command, **environment):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def variants_of_setup(arm=False):
    """``VARIANTS`` of setup.py, so that the test builds what is installed."""
    text = (ROOT / "setup.py").read_text()
    scope: dict = {"X86": not arm, "ARM": arm}
    begin, end = text.index("AVX512 ="), text.index("COMMON =")
    exec(text[begin:end], scope)
    return [(macro, source, list(flags)) for macro, (source, flags, wanted) in scope["VARIANTS"].items() if wanted]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")
@pytest.mark.skipif(not X86, reason="the sanitizer build lists x86-64 instruction sets")
def test_no_access_outside_the_buffers(tmp_path):
    """AddressSanitizer and UBSan see nothing, whatever the metadata says."""
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    if subprocess.run(
        ["g++", "-fsanitize=address,undefined", str(probe), "-o", str(tmp_path / "probe")], capture_output=True
    ).returncode:
        pytest.skip("g++ has no sanitizer runtime (Debian: libasan and libubsan of its version)")
    # One AVX-512 build is enough for bounds: the three share every load and store.
    variants = [v for v in variants_of_setup() if v[0] in ("CREPE_HAVE_AVX2", "CREPE_HAVE_AVX512_BF16")]
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=alignment", "-g1"]
    program = build("g++", tmp_path, variants, flags)
    assert "portable" in run([program])


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None,
    reason="aarch64-linux-gnu-g++ is missing (Debian: g++-aarch64-linux-gnu)",
)
def test_neon(tmp_path):
    """NEON agrees with portable C++; without qemu it is compiled only, and the test says so."""
    program = build("aarch64-linux-gnu-g++", tmp_path, variants_of_setup(arm=True), ["-static"])
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is None:
        pytest.skip("NEON compiles; qemu-aarch64 is missing (Debian: qemu-user), so it was not run")
    assert "neon_dotprod neon portable" in run([qemu, program])
    assert run([qemu, "-cpu", "cortex-a72", program]).startswith("neon portable ")  # which has no dot product
