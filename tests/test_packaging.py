"""What is published: the source distribution, the wheel that is built from it, and what that does without extras."""

import contextlib
import email
import functools
import importlib.metadata
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import markdown
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from transformers import LlamaConfig, LlamaForCausalLM

import crepe_llm
from ports import free_port
from tiny_models import letters_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROBE = """
import torch
from safetensors.torch import load_file, save_file
from crepe_llm import kernels
from crepe_llm.checkpoints import compress_folder, decompress_folder
from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.kernels import cpu
from pathlib import Path

torch.manual_seed(0)
weight = torch.randn(64, 128)
keep = keep_mask(crepe_scores(weight, torch.rand(128)), 0.5, "2:4")
assert (keep.view(-1, 4).sum(dim=1) == 2).all()
weight *= keep
x = torch.randn(3, 128)
torch.testing.assert_close(kernels.linear(x, kernels.pack(weight)), x @ weight.T, rtol=1e-4, atol=1e-4)
assert "portable" in cpu.instruction_sets()
Path("plain").mkdir()
Path("plain/config.json").write_text('{"model_type": "llama"}')
save_file({"model.layers.0.mlp.up_proj.weight": weight}, "plain/model.safetensors", metadata={"format": "pt"})
compress_folder("plain", "packed")
decompress_folder("packed", "again")
assert torch.equal(load_file("again/model.safetensors")["model.layers.0.mlp.up_proj.weight"], weight)
for name in ("llmcompressor", "vllm", "transformers"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(name + " is here")
"""


def done(command, **options):
    """The finished process of a command that must succeed."""
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the source distribution and the wheel, as `make wheel` leaves them, from a copy of the tree."""
    copy = tmp_path_factory.mktemp("tree") / "crepe-llm"
    leave = shutil.ignore_patterns(".git", ".venv", "*.so", "build", "dist", "__pycache__", ".*_cache", "demo-output")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=leave)
    done(["bash", "scripts/wheel.sh"], cwd=copy, env={**os.environ, "PYTHON": sys.executable})
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(dist):
    return next(dist.glob(f"*_{platform.machine()}.whl"))


def closure(packages):
    """The files at the top of site-packages that these distributions, and all that they need, have installed."""
    files, waiting, seen = {}, list(packages), set()
    while waiting:
        name = waiting.pop()
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # what another system needs
        for file in distribution.files or ():
            files[file.parts[0]] = Path(str(distribution.locate_file(file.parts[0])))
        for need in map(Requirement, distribution.requires or ()):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need.name)
    return files


def installed(wheel, folder):
    """The Python of a new environment that has the wheel."""
    done([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin" / "python"
    install = ["-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    done([sys.executable, *install], env={name: os.environ[name] for name in os.environ if name != "PYTHONPATH"})
    return python


def site_packages(python):
    return next((python.parents[1] / "lib").glob("python3*")) / "site-packages"


def metadata(wheel):
    """The fields of the wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(info).decode())


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """The Python of a new environment with the wheel and what it needs without any extra, those linked from here."""
    python = installed(wheel, tmp_path_factory.mktemp("fresh") / "venv")
    needs = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist")]
    for name, path in closure(need.name for need in needs if need.marker is None).items():
        if name not in ("..", "__pycache__"):
            (site_packages(python) / name).symlink_to(path)
    return python


@pytest.fixture(scope="module")
def whole(wheel, tmp_path_factory):
    """The Python of a new environment with the wheel and all that is installed here but this checkout."""
    python = installed(wheel, tmp_path_factory.mktemp("whole") / "venv")
    # Of folders that are named so, Python reads no .pth file, which is how the checkout is installed.
    (site_packages(python) / "rest.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return python


def test_the_wheel_is_tagged_by_what_it_depends_on(wheel):
    assert re.fullmatch(rf"crepe_llm-[\d.]+-py3-none-manylinux[\w.]*_{platform.machine()}\.whl", wheel.name)
    assert wheel.stat().st_size < 1_500_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library = archive.read("crepe_llm/kernels/cpu/_kernels.so")
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/")) or name.endswith((".cpp", ".h"))]
    assert b".debug_info" not in library and b".symtab" not in library


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("aarch64-linux-gnu-g++") is None,
    reason="aarch64-linux-gnu-g++ is missing (Debian: g++-aarch64-linux-gnu libc6-dev-arm64-cross)",
)
def test_the_kernels_of_the_wheel_for_aarch64_run_there(dist, wheel, tmp_path):
    """On what auditwheel found that they need; where qemu is there, each product is compared with portable C++."""
    other = next(dist.glob("*_aarch64.whl"))
    assert re.fullmatch(r"crepe_llm-[\d.]+-py3-none-manylinux[\w.]*_2_(17|24)_aarch64\.whl", other.name)
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(other) as theirs:
        assert [name for name in ours.namelist() if "dist-info" not in name] == [
            name for name in theirs.namelist() if "dist-info" not in name
        ]
        library = Path(theirs.extract("crepe_llm/kernels/cpu/_kernels.so", tmp_path))
    content = library.read_bytes()
    assert int.from_bytes(content[18:20], "little") == 183  # EM_AARCH64
    assert max((int(a), int(b)) for a, b in re.findall(rb"GLIBC_(\d+)\.(\d+)", content)) <= (2, 17)
    qemu = shutil.which("qemu-aarch64")
    if qemu is None:
        pytest.skip("the library is built; qemu-aarch64 is missing (Debian: qemu-user), so it was not run")
    program, headers = tmp_path / "driver", ROOT / "src" / "crepe_llm" / "kernels" / "cpu"
    sources = [ROOT / "tests" / "kernels_driver.cpp", library, f"-I{headers}", f"-Wl,-rpath,{library.parent}"]
    done(["aarch64-linux-gnu-g++", "-std=c++17", "-O1", *sources, "-o", program])
    assert "neon_dotprod neon portable" in done([qemu, "-L", "/usr/aarch64-linux-gnu", program]).stdout


def test_the_wheel_works_without_extras(fresh, tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done([fresh, "-W", "error::RuntimeWarning", "-c", PROBE], cwd=tmp_path, env=environment)
    crepe = fresh.with_name("crepe")
    assert "crepe_2of4_best" in done([crepe, "recipes"], cwd=tmp_path, env=environment).stdout
    doctor = done([crepe, "doctor"], cwd=tmp_path, env=environment).stdout
    assert "built, used with" in doctor and 'pip install ".[compress]" in the checkout' in doctor
    assert "crepe-llm" in done([crepe, "--version"], cwd=tmp_path, env=environment).stdout
    for command, extra in (
        ("prune M --recipe crepe_2of4 --sample --output O", "compress"),
        ("search M --study S --sample", "compress"),
        ("recover M --sample --output O", "recover"),
        ("evaluate M --sample", "compress"),
        ("report M --sample", "recover"),
        ("compare M --sample", "compress"),
        ("serve M", "serve"),
        ("demo", "compress"),
    ):
        refused = subprocess.run(
            [crepe, *command.split()], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert refused.returncode == 2, (command, refused.stderr)
        assert re.fullmatch(
            rf"crepe: error: crepe .* needs .*pip install ['\"]\.\[{extra}\]['\"] in the checkout.*\n", refused.stderr
        ), refused.stderr


def test_the_source_distribution_has_what_its_tests_read(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, pattern in (("tests", "*.py"), ("docs", "*.md"), ("recipes", "*.yaml"), ("benchmarks", "*.py")):
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)} <= names
    for name in ("tests/kernels_driver.cpp", "scripts/setup.sh", "CHANGELOG.md", "CITATION.cff", "Makefile"):
        assert name in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def targets(description):
    """Where the links and pictures of a description lead, once it is a page."""
    page = markdown.markdown(description, extensions=["tables", "fenced_code"])
    return re.findall(r'(?:href|src)="([^"]+)"', page)


def test_the_index_shows_no_link_that_leads_nowhere(dist, wheel):
    """In the source distribution and the wheel, where pyproject.toml names no address of the project."""
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        page = archive.extractfile(next(n for n in archive.getnames() if n.count("/") == 1 and n.endswith("PKG-INFO")))
        described = email.message_from_bytes(page.read())
    for message in (described, metadata(wheel)):
        assert message["Description-Content-Type"] == "text/markdown"
        found = targets(message.get_payload())
        assert found and all(target.startswith("https://") for target in found), found
        assert "(`docs/results.md`)" in message.get_payload() and "in the source distribution" in message.get_payload()


def test_the_index_links_to_the_repository_that_is_named(tmp_path):
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "src" / "crepe_llm").mkdir(parents=True)
    named = '\n[project.urls]\nRepository = "https://forge.example/us/it/"\n'
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + named)
    done([sys.executable, "setup.py", "-q", "egg_info"], cwd=tmp_path)
    page = (tmp_path / "src" / "crepe_llm.egg-info" / "PKG-INFO").read_text()
    at, version = "https://forge.example/us/it", f"v{crepe_llm.__version__}"
    assert f"![perplexity by method]({at}/raw/{version}/docs/perplexity.png)" in page
    assert f"[All results]({at}/blob/{version}/docs/results.md)" in page
    assert f"]({at}/blob/{version}/docs/kernels.md#on-a-gpu)" in page
    found = targets(email.message_from_string(page).get_payload())
    assert "https://github.com/vllm-project/vllm" in found
    assert all(target.startswith("https://") for target in found), found


CURE = "pip install --force-reinstall --no-deps --no-cache-dir ."


def test_without_a_compiler_pip_goes_on_and_doctor_names_the_cure(tmp_path):
    """README's line to install from a checkout; pip hides what a build prints unless it is asked for it."""
    copy, site = tmp_path / "tree", tmp_path / "site"
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    line = re.search(r'`pip install "(\.\[\w+\])"`', README)[1]
    environment = {**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    pip = ["-m", "pip", "install", "-v", "--no-deps", "--no-index", "--no-build-isolation", "--target", site, line]
    pip = done([sys.executable, *pip], cwd=copy, env=environment)
    assert "kernels were NOT built" in pip.stdout + pip.stderr and CURE in pip.stdout + pip.stderr
    environment = {**os.environ, "PYTHONPATH": str(site)}
    found = done([sys.executable, "-m", "crepe_llm", "doctor"], env=environment, cwd=tmp_path).stdout
    assert "not used: crepe-llm's CPU kernel library is missing (it was not built when crepe-llm was inst" in found
    assert CURE in found


EXTRAS = {"compress", "demo", "recover", "serve"}


def test_readme_installs_extras_that_there_are(wheel):
    assert set(re.findall(r'"\.\[(\w+)\]"', README)) == EXTRAS
    assert set(metadata(wheel).get_all("Provides-Extra")) >= EXTRAS


def test_versions_agree():
    version = crepe_llm.__version__
    assert f'version = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(rf"^## {re.escape(version)}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_commands_of_the_contribution_guide_are_there():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"^ {4}(\S.*?)(?: {2,}#.*)?$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(commands) > 5
    for command in commands:
        program, *words = command.split()
        assert program in ("make", ".venv/bin/python", ".venv/bin/ruff", ".venv/bin/mypy", ".venv/bin/clang-format"), (
            command
        )
        if program == "make":
            assert set(words) <= set(targets), command
        for word in words:
            assert not word.endswith(".py") or (ROOT / word).is_file(), command


LINES = {"train": 60, "test": 10}


def write_data_set(folder, config):
    """A data set on the disk that is loaded by the folder's name and a config's, as one of the hub is."""
    folder.mkdir(parents=True)
    chosen = random.Random(0)
    for split, lines in LINES.items():
        texts = ("".join(chosen.choices("abcdefghijklmnop ", k=200)) for _ in range(lines))
        (folder / f"{split}.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    files = [{"split": split, "path": f"{split}.jsonl"} for split in LINES]
    head = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{head}---\n")


def user_of(python, folder, models):
    """A function that runs a command as a user of the wheel does, in a folder.

    The folder holds what the texts name: tiny models and short texts under the names that those of the hub have. The
    models' weights are large, so that they predict something, of which there is something to recover.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    for name in models:
        LlamaForCausalLM(config).save_pretrained(folder / name)
        letters_tokenizer(True).save_pretrained(folder / name)
    write_data_set(folder / "allenai" / "c4", "en")
    write_data_set(folder / "NAME", "default")
    write_data_set(folder / "Salesforce" / "wikitext", "wikitext-2-raw-v1")
    environment = {
        "PATH": f"{python.parent}:/usr/bin:/bin",
        "HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": "600",
        **{name: os.environ[name] for name in os.environ if name.startswith("OMP_")},
    }
    return functools.partial(done, cwd=folder, env=environment)


@pytest.fixture(scope="module")
def user(whole, tmp_path_factory):
    """A user who has read README."""
    return user_of(whole, tmp_path_factory.mktemp("user"), ("MODEL", "meta-llama/Llama-3.2-1B"))


def test_readmes_commands_run(user):
    """All of them in their order, from the wheel; what is added or replaced makes them short."""
    small = {
        "doctor": "",
        "prune": "--samples 8 --length 64",
        "recover": "--tokens 8192 --length 64",
        "report": "--window 64 --tokens 256",
    }
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^ {4}(crepe .*)$", README, re.MULTILINE)]
    assert [words[1] for words in commands] == [*small, "serve"]
    said = {words[1]: user([*words, *small[words[1]].split()]).stdout for words in commands[:-1]}
    assert "built, used with" in said["doctor"] and " no: " not in said["doctor"]
    assert "are zero" in said["prune"] and "RECOVERED" in said["recover"] and "perplexity" in said["report"]
    assert tokens_served(user, commands[-1]) == 32


def tokens_served(user, command):
    """How many tokens a served model makes for the request of docs/tutorial.md, which wants 32.

    Its server is then stopped and must end well.
    """
    port = free_port()
    options = ["--port", port, "--enforce-eager", "--max-model-len", 64, "--kv-cache-memory-bytes", 16 << 20]
    log = user.keywords["cwd"] / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen([*map(str, command + options)], stdout=output, stderr=output, **user.keywords)
    curl = re.search(r"^    (curl .*?)\n\n", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    curl = shlex.split(curl.replace("\\\n", ""))
    asked = json.loads(curl[curl.index("-d") + 1]) | {"model": command[2], "ignore_eos": True}
    url = curl[1].replace("localhost:8000", f"127.0.0.1:{port}")
    request = urllib.request.Request(url, json.dumps(asked).encode(), dict([curl[curl.index("-H") + 1].split(": ")]))
    try:
        while True:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(ConnectionError, urllib.error.URLError):
                tokens = json.load(urllib.request.urlopen(request, timeout=300))["usage"]["completion_tokens"]
                break
            time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0, log.read_text()
    return tokens


def test_readmes_example_runs(user):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shorter = example.replace("samples=128", "samples=8").replace("length=2048", "length=64")
    zeros = (
        "from safetensors.torch import load_file\n"
        "names = load_file('llama-2of4/model.safetensors')\n"
        "assert 'model.layers.0.mlp.up_proj.bitmask' in names"
    )
    user(["python", "-c", shorter])
    user(["python", "-c", zeros])


# Runs steps of a JSON file in one process: commands of `crepe`, blocks of Python, and folders to remove.
STEPS = """
import json, shutil, sys
from pathlib import Path
import crepe_llm
from crepe_llm.cli.main import main
assert "site-packages" in crepe_llm.__file__, crepe_llm.__file__
names = {}
for kind, step in json.loads(Path(sys.argv[1]).read_text()):
    print(kind, step, flush=True)
    if kind == "crepe":
        assert main(step) == 0, step
    elif kind == "python":
        exec(step, names)
    else:
        shutil.rmtree(step)
"""
SMALLER = {"--tokens": "256", "--samples": "4", "--length": "32", "--windows": "8"}
DOCS = sorted((ROOT / "docs").rglob("*.md"))


def shortened(words):
    """A command of the docs, with a short text and small numbers."""
    words = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if "--minutes" in words:  # in which a busy machine does little
        at = words.index("--minutes")
        words[at : at + 2] = ["--tokens", "4096"]
    words = [each for word in words for each in (["--text", "FILE"] if word == "--sample" else [word])]
    more = {
        "prune": {"--samples": "4", "--length": "32"},
        "recover": {"--length": "32"},
        "evaluate": {"--window": "32"},
        "report": {"--window": "32"},
    }.get(words[0], {})
    return words + [each for name, value in more.items() if name not in words for each in (name, value)]


def docs_steps():
    """The commands and the score of the docs, page by page; a folder goes before it is made a second time."""
    steps, made = [], set()
    for page in DOCS:
        text = page.read_text()
        for line in re.findall(r"^ {4}((?:crepe|torchrun) .*)$", text, re.MULTILINE):
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                words = words[1:] if words[0] == "crepe" else words[words.index("crepe_llm") + 1 :]
                if "..." in words or words[0] == "serve":  # which README's test runs
                    continue
                target = words[words.index("--output") + 1] if "--output" in words else words[-1]
                if words[0] in ("prune", "recover", "decompress"):
                    steps += [("remove", target)] * (target in made or words[0] == "decompress")
                    made.add(target)
                steps.append(("crepe", shortened(words)))
        if page.name == "extend.md":
            steps.append(("python", re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]))
    return steps


def recipe_steps(folder):
    """Each recipe of the docs, as a file that a command names, and where that writes its figures.

    The blocks of the reference are the docstrings' of the modifiers, and are run with them.
    """
    steps, figures = [], []
    for page in DOCS:
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)):
            if page.name == "reference.md":
                continue
            name = f"{page.stem}-{number}"
            small = block.replace("candidates: 200", "candidates: 4, tokens: 600").replace("minutes: 10", "tokens: 600")
            (folder / f"{name}.yaml").write_text(small)
            words = ["prune", "MODEL", "--recipe", f"{name}.yaml", "--text", "FILE", "--output", f"recipe-{name}"]
            figures.append(folder / f"{name}.json")
            steps.append(("crepe", [*shortened(words), "--json", figures[-1].name]))
    return steps, figures


def test_the_docs_commands_and_recipes_run(whole, tmp_path):
    """From the wheel, in one process, in a folder that has nothing but what a reader brings."""
    user = user_of(whole, tmp_path, ("MODEL", "smollm2"))
    (tmp_path / "FILE").write_text("".join(random.Random(0).choices("abcdefghijklmnop ", k=4000)))
    (tmp_path / "my_recipe.yaml").write_text((ROOT / "recipes" / "wanda_2of4.yaml").read_text())
    commands = docs_steps()
    # `crepe compress` of the page on formats takes a model with zeros.
    first = next(number for number, (_, step) in enumerate(commands) if step[0] == "compress")
    zeros = [("crepe", shortened(["prune", "MODEL", "--recipe", "wanda_2of4", "--text", "FILE", "--output", "PRUNED"]))]
    zeros.append(("crepe", ["decompress", "PRUNED", "DENSE_WITH_ZEROS"]))
    recipes, figures = recipe_steps(tmp_path)
    (tmp_path / "steps.json").write_text(json.dumps([*commands[:first], *zeros, *commands[first:], *recipes]))
    user(["python", "-c", STEPS, "steps.json"])
    ran = {step[0] for kind, step in commands if kind == "crepe"}
    assert ran >= {"evaluate", "prune", "recover", "report", "compress", "decompress"}
    assert (tmp_path / "crepe_2of4_recovered" / "loss.png").is_file()
    assert len(figures) >= 12
    for path in figures:
        assert json.loads(path.read_text())["sparsity"] > 0.3, path.name
