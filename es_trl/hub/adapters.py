"""An adapter by name: a run folder, a file, or a repository on the Hub."""

import os
from collections.abc import Sequence
from contextlib import suppress

from ..files import LORA_WEIGHTS_NAME
from .base_model import is_hub_id
from .publishing import reason_of


PEFT_FILE = "adapter_model.safetensors"


def find_adapter(name: str | os.PathLike[str], revision: str | None = None) -> str:
    """
    The `.safetensors` file of an adapter; one on the Hub is downloaded (the LoRA and its settings, nothing else) into
    the cache.

    Args:
        name (`str`): A run folder or checkpoint, a folder of peft, a `.safetensors` file of any name, or a Hub id
            (`"user/repo"`), perhaps with the file in it (`"user/repo/lightning.safetensors"`).
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.

    Raises:
        `ValueError`: No adapter is there, or it cannot be had from the Hub.
    """
    name = os.fspath(name)
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        if not path.endswith(".safetensors"):
            raise ValueError(f"adapter {name!r} is a file, but no .safetensors one; other formats are not read.")
        return path
    if os.path.isdir(path):
        return _in_folder(name, path)
    repo_id, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    if file.endswith(".safetensors") and is_hub_id(repo_id):
        return _download(repo_id, revision, file)
    if not is_hub_id(name) or path.endswith(".safetensors"):
        raise ValueError(
            f"adapter {name!r} is neither a folder nor a file nor a Hub id ('user/repo'); paths start at "
            f"{os.getcwd()!r}."
        )
    return _download(name, revision)


def frozen_files(adapters: Sequence[str] | None) -> list[tuple[str, float]]:
    """
    `(file, scale)` of adapters by name, each perhaps with `=scale` behind it; `ValueError` where none is there, or a
    scale is not a number.
    """
    found = []
    for text in adapters or ():
        name, equals, scale = text.rpartition("=")
        name, scale = (name, scale) if equals and not os.path.exists(os.path.expanduser(text)) else (text, "1")
        try:
            found.append((find_adapter(name), float(scale)))
        except ValueError as error:
            raise ValueError(f"frozen_adapters: {text!r}: {error}") from error
    return found


def _in_folder(name: str, path: str) -> str:
    for known in (LORA_WEIGHTS_NAME, PEFT_FILE):
        if os.path.isfile(os.path.join(path, known)):
            return os.path.join(path, known)
    others = ", ".join(sorted(file for file in os.listdir(path) if file.endswith(".safetensors"))[:3])
    found = f"; it has {others}: give the file itself" if others else ": give a run folder of a finished run"
    raise ValueError(
        f"{name!r} holds no {LORA_WEIGHTS_NAME} and no {PEFT_FILE}{found}, or one of its checkpoint-<step> folders."
    )


def _download(repo_id: str, revision: str | None, file: str = LORA_WEIGHTS_NAME) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError

    try:
        path = hf_hub_download(repo_id, file, revision=revision)
    except RemoteEntryNotFoundError as error:
        hint = "it is not an adapter of diffusers" if file == LORA_WEIGHTS_NAME else "look the name up on its page"
        raise ValueError(f"{repo_id!r} on the Hub holds no {file}: {hint}.") from error
    except Exception as error:
        raise ValueError(
            f"adapter {repo_id!r} cannot be had from the Hub ({reason_of(error)}): check the name, `revision` and the "
            "network, run `hf auth login` for a private one, or give a folder."
        ) from error
    if file != LORA_WEIGHTS_NAME:
        return path
    commit = os.path.basename(os.path.dirname(path))  # the same commit for both, whatever is pushed in between
    with suppress(EntryNotFoundError):  # other people's adapters have none
        hf_hub_download(repo_id, "es_config.json", revision=commit)
    return path
