"""The model that a command is given: found, checked before any work, and loaded."""

import argparse
import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
SAMPLE_MODELS = ("smollm2", "gemma3")
MODEL_HELP = "a Hugging Face id or folder, or smollm2 or gemma3, real models that pip can fetch"


def add_loading(parser: Any) -> None:
    """The options of `open_model`."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype to load the weights in (as they are stored)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that a model brings along, if it needs that"
    )


def model_folder(name: str) -> str:
    """The folder of a sample model, which is fetched if need be; any other name as it is."""
    if name in SAMPLE_MODELS and not Path(name).exists():
        from crepe_llm import samples

        return str(getattr(samples, name)())
    return name


@dataclass(frozen=True)
class Model:
    """A model that is known to be there, with its tokenizer; the weights are not loaded yet.

    Attributes:
        name: a Hugging Face id or a folder.
        config: as transformers reads it.
        tokenizer: likewise.
        options: the command's `dtype` and `trust_remote_code`.
    """

    name: str
    config: Any
    tokenizer: Any
    options: argparse.Namespace

    def load(self, *, on_device: bool) -> Any:
        """Load the weights; `on_device` puts them on the accelerators there are.

        Raises:
            ValueError: they cannot be read, or do not fit what config.json says.
        """
        import torch

        from crepe_llm.models.classes import load_whole

        placement = {"device_map": "auto"} if on_device and torch.cuda.is_available() else {}
        with _named_code(self.name, self.config):
            return load_whole(self.name, self.config, **self._loading, **placement)

    def load_within(self, memory: int, folder: Path) -> Any:
        """Load so many bytes of weights for llm-compressor; the others stay on the disk, and what changes of them goes
        to a folder. Raises as :meth:`load`."""
        from crepe_llm.models.classes import load_within

        with _named_code(self.name, self.config):
            return load_within(self.name, self.config, memory, folder, **self._loading)

    def sizes(self) -> tuple[int, int]:
        """The bytes of the weights, and the inputs of the widest linear layer."""
        import torch

        from crepe_llm.models.classes import sizes_of

        dtype = None if self.options.dtype == "auto" else getattr(torch, self.options.dtype)
        with _named_code(self.name, self.config):
            return sizes_of(self.config, dtype, trust_remote_code=self.options.trust_remote_code)

    def context(self) -> int | None:
        """How many tokens the model takes at most; None where it does not tell."""
        from crepe_llm.models.classes import without_weights
        from crepe_llm.models.losses import longest_sequence

        try:
            model = without_weights(self.config, trust_remote_code=self.options.trust_remote_code)
        except Exception:  # a class that is not made without weights: loading it shows what there is to say
            model = None
        return longest_sequence(self.config, model)

    @property
    def _loading(self) -> dict[str, Any]:
        return {"dtype": self.options.dtype, "trust_remote_code": self.options.trust_remote_code}


def open_model(options: argparse.Namespace, *, dense: bool = False) -> Model:
    """Find the model of a command, its config and its tokenizer.

    Raises:
        ValueError, OSError: there is no such model, it has no tokenizer or code that is not trusted, or it is quantized
            and `dense` asks for one that is not.
    """
    from transformers import AutoConfig

    from crepe_llm.models.classes import auto_class, load_tokenizer

    name = model_folder(options.model)
    check_model(name, dense)
    trust = options.trust_remote_code
    with _named_code(name):
        config = _config(AutoConfig, name, trust)
        auto_class(config)
        tokenizer = load_tokenizer(name, trust_remote_code=trust)
    return Model(name, config, tokenizer, options)


def check_code(name: str, trust: bool) -> None:
    """Raise ValueError if a model's config, tokenizer or model brings code along that is not trusted."""
    from transformers import AutoConfig

    from crepe_llm.models.classes import load_tokenizer

    with _named_code(name):
        _config(AutoConfig, name, trust)
        load_tokenizer(name, trust_remote_code=trust)


def _config(kind: Any, name: str, trust: bool) -> Any:
    """The config of a model; ValueError where transformers finds a field of it wrong."""
    try:
        return kind.from_pretrained(name, trust_remote_code=trust)
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{name}: config.json is wrong: {' '.join(str(error).split())}") from error


def copy_processor(name: str, folder: Path) -> None:
    """Copy what a model has for images, sounds and chats beside its tokenizer, where the tokenizer has not saved it."""
    from transformers import utils

    names = (
        utils.PROCESSOR_NAME,
        utils.FEATURE_EXTRACTOR_NAME,
        utils.VIDEO_PROCESSOR_NAME,
        utils.CHAT_TEMPLATE_FILE,
        "chat_template.json",
    )
    for file in names:
        found = utils.cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if found is not None and not (folder / file).exists():
            shutil.copyfile(found, folder / file)


def weight_bytes(folder: Path) -> int:
    """The bytes of the safetensors files that a folder's model is read from."""
    from crepe_llm.checkpoints import read_folder

    return sum(path.stat().st_size for path in read_folder(folder).files)


def known_bytes(name: str) -> int | None:
    """As `weight_bytes` of a model that lies in a folder, as safetensors; None of any other."""
    from crepe_llm.checkpoints.reading import has_weights

    return weight_bytes(Path(name)) if has_weights(name) else None


def window_length(asked: int | None, source: Model) -> int:
    """The window length: what was asked for if the model's context holds it, else 2048 or the whole context."""
    context = source.context()
    if asked is None:
        return min(2048, context or 2048)
    if context is not None and asked > context:
        raise ValueError(f"a window of {asked} tokens exceeds the model's context of {context}")
    return asked


def check_model(name: str, dense: bool) -> None:
    """Raise if there is no model of that name, or its config.json says that it is quantized."""
    from transformers import PreTrainedConfig

    from crepe_llm.checkpoints.reading import (
        INDEX,
        OLD_QUANTIZATION,
        check_plain,
        check_unquantized,
        find_quantization,
        read_config,
        read_folder,
    )

    path = Path(name)
    if not name:
        raise ValueError("the model's name is empty: give a model's folder, a Hugging Face id, smollm2 or gemma3")
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{name} has no config.json{_what_else(path)}")
    if path.is_file():
        raise NotADirectoryError(f"{name} is a file: name the folder of a Hugging Face model")
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(
            f"there is no folder {name}: give a model's folder, a Hugging Face id, smollm2 or gemma3"
        )
    if path.is_dir():
        content = read_config(path)
    else:
        try:
            content, _ = PreTrainedConfig.get_config_dict(name)
        except Exception as error:
            raise ValueError(
                f"{name} is not a folder here, and not a model that the hub could give: {_first_line(error)}"
            ) from error
    _check_dtype(name, content)
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} holds an adapter (PEFT) beside the model, which transformers would load into it: merge it "
            "(merge_and_unload), or move adapter_config.json elsewhere"
        )
    place, quantization = find_quantization(content)
    _check_generation_config(path / "generation_config.json")
    if any(path.glob("*.safetensors")) or (path / INDEX).is_file():
        checkpoint = read_folder(path)  # names a file that is cut off or missing
        if quantization is None or place == OLD_QUANTIZATION:  # of which transformers reads nothing
            check_plain(checkpoint)
            check_unquantized(checkpoint, content)
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise ValueError(
            f"{name}/config.json: {place} is {quantization!r}, which is not an object: the file is damaged"
        )
    method = quantization.get("quant_method", "an unnamed method")
    if dense and (method != "compressed-tensors" or quantization.get("config_groups")):
        raise ValueError(
            f"{name} is quantized ({method}): pruning starts from the full-precision model that it was made from"
        )


def _what_else(folder: Path) -> str:
    """What a folder without a model is, as far as its files tell, and what to give instead."""
    if (folder / "adapter_config.json").is_file():
        return ", it is an adapter (PEFT): merge it into its base model (merge_and_unload), and name that folder"
    if any(folder.glob("*.gguf")):
        return " but GGUF files, which are not read here: name the Hugging Face model that they were made from"
    return ": name the folder of a Hugging Face model"


def _check_generation_config(path: Path) -> None:
    """Raise ValueError if there is such a file and it is not a JSON object, which transformers would leave out, or one
    that transformers loads no model with."""
    from transformers import GenerationConfig

    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {_first_line(error)}; mend or delete it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object but {str(content)[:60]!r}; mend or delete it")
    try:
        GenerationConfig.from_dict(content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is wrong: {' '.join(str(error).split())}; mend or delete it") from error


@contextmanager
def _named_code(name: str, config: Any = None) -> Iterator[None]:
    """Have what transformers says of code that is not trusted, of weights that do not fit, or of a config that no model
    can be made of, name the cure."""
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"the weights of {name} have other shapes than its config.json says: the folder mixes files of two models"
        ) from error
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        if config is not None:
            _check_builds(name, config)
        if isinstance(error, AssertionError | AttributeError | TypeError):
            raise
        raise ValueError(
            f"the weights of {name} cannot be read ({type(error).__name__}: {_first_line(error)}): the files are "
            "damaged; fetch or export them again"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} brings code of its own, which has to run to load it: read that code, then give --trust-remote-code"
        ) from error


def _check_builds(name: str, config: Any) -> None:
    """Raise ValueError, with the field if it can be told, if transformers can make no model of a config."""
    from crepe_llm.models.classes import without_weights

    try:
        without_weights(config)
    except Exception as error:
        value = error.args[0] if error.args else None
        field = next((key for key, found in _fields(config.to_dict()) if found == value), None)
        why = (
            f"{type(error).__name__}: {_first_line(error)}" if field is None else f"{field} is {value!r}, unknown here"
        )
        raise ValueError(f"{name}: config.json is wrong: {why}") from error


def _fields(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The names and values of a config's fields, those of its parts included."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", found) for inner, found in _fields(value))
        else:
            yield key, value


def _check_dtype(name: str, content: dict[str, Any]) -> None:
    """Raise ValueError if config.json's dtype is none that weights are loaded in."""
    import torch

    for key in ("dtype", "torch_dtype"):
        value = content.get(key)
        dtype = getattr(torch, value, None) if isinstance(value, str) else None
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        if value not in (None, "auto") and not floating:
            raise ValueError(f"{name}/config.json: {key} is {value!r}: write bfloat16, float16 or float32")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
