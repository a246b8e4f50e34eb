"""Files of published reward checkpoints: where they are, and reading their tensors without running anything."""

from __future__ import annotations

import json
import os
import re
import struct
from typing import TYPE_CHECKING

from es_trl import assets


if TYPE_CHECKING:
    import torch


# What torch.load answers to bytes that are damaged: it walks them before it can tell.
DAMAGED = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error
)  # fmt: skip
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_file(checkpoint: str, names: str | tuple[str, ...], reward: str, otherwise: str = "") -> str:
    """
    The local path of one file of a checkpoint, downloaded if needed.

    Args:
        checkpoint (`str`): a folder or a Hub id `org/name`.
        names (`str` or `tuple`): the file's name; of several, the first that a folder has (the last one on the Hub).
        reward (`str`): the reward's name, for messages.
        otherwise (`str`, *optional*): what to do with a file that was copied by hand, if not the usual.

    Raises:
        `ValueError`: the folder does not hold the file, or `checkpoint` is neither a folder nor a Hub id.
        `OSError`: the Hub cannot be reached and the file is not in the local cache.
    """
    names = (names,) if isinstance(names, str) else names
    folder = os.path.expanduser(assets.resolve(checkpoint))
    if os.path.isdir(folder):
        for name in names:
            if os.path.isfile(os.path.join(folder, name)):
                return os.path.join(folder, name)
        raise ValueError(f"reward {reward!r}: the folder {folder!r} has no {' or '.join(names)}")
    if not HUB_ID.fullmatch(checkpoint):
        raise ValueError(f"reward {reward!r}: {checkpoint!r} is neither an existing folder nor a Hub id 'org/name'")
    return download(checkpoint, names[-1], reward, otherwise or f"give that folder, '{reward}:path/to/folder'")


def download(repo_id: str, name: str, reward: str, otherwise: str) -> str:
    """One file of a Hub repository, from the local cache where it is there already."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, name)
    if isinstance(cached, str):
        return cached
    reason = why_unreachable(repo_id)
    if reason is None:
        try:
            return hf_hub_download(repo_id, name)
        except Exception as error:  # noqa: BLE001 - the classes of the HTTP library below differ between versions
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise OSError(
        f"reward {reward!r}: {name} of {repo_id!r} cannot be loaded: {reason}, and it is not in the local cache. "
        f"Connect once, or copy the result of `hf download {repo_id} {name}` here and {otherwise}"
    )


def why_unreachable(repo_id: str) -> str | None:
    """Why the Hub cannot serve `repo_id`, or None. One quick question, where a download would retry for a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().model_info(repo_id, timeout=10)
    except RepositoryNotFoundError:
        return "the Hub has no model of that name that this login may read"
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:  # noqa: BLE001 - the classes of the HTTP library below differ between versions
        return f"the Hub cannot be reached ({type(error).__name__}: {error})"
    return None


def read_tensors(path: str, reward: str) -> dict[str, torch.Tensor]:
    """
    The tensors of a weights file by name, on the CPU.

    A `.safetensors` file is plain data. The published heads of some rewards are PyTorch files (`.pt`, `.pth`), which
    can carry code: they are opened with `weights_only=True`, which builds tensors and containers and nothing else. A
    dictionary under the key `"state_dict"` is taken out.

    Raises:
        `ValueError`: the file is damaged or holds anything but named tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, *DAMAGED) as error:
        raise ValueError(
            f"reward {reward!r}: {path!r} cannot be read: {_first_sentence(error)}; download it again."
        ) from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":  # refused by weights_only; the class itself is pickle's
            raise
        raise ValueError(
            f"reward {reward!r}: {path!r} holds more than tensors and is not opened ({_first_sentence(error)}); give "
            "a .safetensors file with the same names."
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"reward {reward!r}: {path!r} holds no dictionary of tensors; is it another file?")
    return found


def fill(module: torch.nn.Module, tensors: dict[str, torch.Tensor], source: str, reward: str) -> None:
    """
    Copy `tensors` into `module`, in float32; entries that the module does not have are left alone.

    Raises:
        `ValueError`: a weight is missing, has another shape or is not finite.
    """
    expected = module.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"reward {reward!r}: {source!r} lacks {len(missing)} weights ({missing[0]}, ...): it would score noise"
        )
    for name, value in expected.items():
        if tensors[name].shape != value.shape:
            raise ValueError(
                f"reward {reward!r}: {name} of {source!r} has shape {tuple(tensors[name].shape)}, not "
                f"{tuple(value.shape)}: it belongs to another model"
            )
        if not tensors[name].isfinite().all():
            raise ValueError(f"reward {reward!r}: {name} of {source!r} is not finite")
    # assign: the module may have been built without memory of its own
    module.load_state_dict(
        {n: tensors[n].float() if tensors[n].is_floating_point() else tensors[n] for n in expected}, assign=True
    )


def read_json(path: str, reward: str) -> dict:
    """A JSON object. Raises `ValueError` naming the file."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"reward {reward!r}: {path!r} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"reward {reward!r}: {path!r} must hold a JSON object")
    return found


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
