"""From `--model` to a folder that holds a whole checkpoint, or a reason why there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from .errors import LoadError

DEFAULT_MODEL: Final = "default"
_DEFAULT_FOLDER: Final = Path(__file__).resolve().parent / "default_model"
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_HUB_FILES: Final = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


def find_checkpoint(model: str) -> Path:
    """The folder of `model`: "default", a path, or a hub id (fetched if it is not cached).

    LoadError if it does not hold config.json, safetensors weights and a tokenizer.
    """
    if model == DEFAULT_MODEL:
        folder = _DEFAULT_FOLDER
    elif Path(model).is_dir() or _looks_like_path(model):
        folder = Path(model)
    else:
        folder = _fetch(model)
    _check_files(folder, model)
    return folder


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists()


def _fetch(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except GatedRepoError as error:
        raise LoadError(
            f"the model {model} needs its owner's permission",
            "accept its terms on the hub and log in with `hf auth login`, or give a local folder",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise LoadError(
            f"there is no model {model}: it is neither a folder here nor on the hub",
            "check the name; a local folder is given by its path, such as ./my_model",
        ) from error
    except Exception as error:  # the hub's client raises many kinds when it has no network
        raise LoadError(
            f"the model {model} is no folder here, is not in the hub's cache, and the hub cannot "
            f"be reached ({type(error).__name__})",
            "check the network, or give the path of a local folder",
        ) from error


def _check_files(folder: Path, model: str) -> None:
    if not folder.exists():
        raise LoadError(
            f"there is no folder {model}",
            "check the path, or use --model default for the embedded model",
        )
    if not folder.is_dir():
        raise LoadError(
            f"{model} is a file, not a folder",
            "give the folder that holds config.json and *.safetensors",
        )
    try:
        json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise LoadError(
            f"the folder {model} has no config.json, so it is no transformers checkpoint",
            "give the folder that `save_pretrained` wrote or the hub's download",
        ) from error
    except ValueError as error:
        raise LoadError(
            f"{model}/config.json is not JSON: {error}", "download the checkpoint again"
        ) from error
    if not any(folder.glob("*.safetensors")):
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = "only pickled ones, which can run code when they are read" if pickles else "none"
        raise LoadError(
            f"the model {model} has no safetensors weights ({why})",
            "convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)",
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise LoadError(
            f"the model {model} has no tokenizer (looked for {', '.join(_TOKENIZER_FILES)})",
            "save its tokenizer into the same folder: AutoTokenizer...save_pretrained(FOLDER)",
        )
