"""Publishing an adapter: an allow-list of files from a clean folder, one commit, and the command that repeats it."""

import fnmatch
import json
import logging
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from ..files import LORA_WEIGHTS_NAME
from .escaping import redact
from .judged import adapter_digest, drawn_with, judged


logger = logging.getLogger(__name__)

# What a repository holds; anything else in the run folder (logs, tracker files, checkpoints) stays at home.
PUBLISHED = (
    "README.md", LORA_WEIGHTS_NAME, "es_config.json", "env.json", "eval.json",
    "samples/*.jpg", "samples/metadata.jsonl",
)  # fmt: skip
# What was found with one adapter and says nothing about another one.
_OF_ONE_ADAPTER = ("eval.json", "samples/before_after.jpg", "samples/adapter-*.jpg")


def collect(
    folder: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    only: str = "*",
    adapter: str | os.PathLike[str] | None = None,
) -> list[str]:
    """
    Copies what may be published from a run folder into a clean one; results and pictures that belong to another
    adapter than the one they would be published with stay where they are, with a warning.

    Args:
        folder, destination (`str`): A run folder or a checkpoint, and where to.
        only (`str`, *optional*): A pattern that narrows it down further.
        adapter (`str`, *optional*): The folder of the adapter they go with; `folder` by default.

    Returns:
        `list[str]`: The relative names of the copies. Links are left out, wherever they point to.
    """
    folder, destination = Path(folder), Path(destination)
    digest = adapter_digest(folder if adapter is None else adapter)
    names = []
    for path in sorted([*folder.glob("*"), *folder.glob("samples/*")]):
        name = path.relative_to(folder).as_posix()
        linked = path.is_symlink() or path.parent.is_symlink()
        allowed = fnmatch.fnmatchcase(name, only) and any(fnmatch.fnmatchcase(name, p) for p in PUBLISHED)
        if linked or not path.is_file() or not allowed:
            continue
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _OF_ONE_ADAPTER) and not _belongs(path, digest):
            logger.warning("%s belongs to another adapter than the one that is published; it stays at home.", path)
            continue
        copy_clean(path, destination / name)
        names.append(name)
    return names


def _belongs(path: Path, digest: str | None) -> bool:
    if path.suffix != ".json":
        return drawn_with(path, digest)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return judged(found if isinstance(found, dict) else None, digest)


def copy_clean(source: Path, target: Path) -> bool:
    """Copies a file; from JSON the home folder, which names a person, and secrets are cut. Whether any was there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix != ".json":
        shutil.copyfile(source, target)
        return False
    text = source.read_bytes().decode("utf-8")  # line ends as they are
    clean = without_home(redact(text))
    target.write_bytes(clean.encode("utf-8"))
    return clean != text


def without_home(text: str) -> str:
    """`text` with this user's home folder shown as `~`."""
    home = str(Path.home())
    return text if home in ("", "/") else text.replace(f"{home}{os.sep}", f"~{os.sep}").replace(f'"{home}"', '"~"')


def open_repository(api: Any, name: str, private: bool | None = None, revision: str | None = None) -> str:
    """
    Creates the model repository `name` (its owner is that of the token where none is named), and the branch
    `revision`, unless they exist; returns the full id. `private` is by default what the owner has set.
    """
    repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
    if revision and revision != "main" and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def limit_waiting(seconds: float = 300.0) -> None:
    """
    huggingface_hub waits for an answer without a limit, and the thread that does holds the end of the program: the
    session of this process, if it has no limit of its own, gives up a server that is silent for so long.
    """
    from huggingface_hub.utils import get_session

    session = get_session()
    if session.timeout.read is None:
        session.timeout = seconds


def retry_command(
    repo_id: str, folder: str | os.PathLike[str], revision: str | None = None, private: bool | None = None
) -> str:
    """The shell line that uploads a clean copy as it is; it creates the repository if that is missing."""
    words = ["hf", "upload", repo_id, str(folder), "."]
    words += ["--revision", revision] if revision else []
    words += ["--private"] if private else []
    return shlex.join(words)


def reason_of(error: Exception) -> str:
    """What went wrong in one line without secrets, and what helps."""
    from huggingface_hub import get_token

    text = redact(", from ".join(_first_line(e) for e in (error, error.__cause__) if e is not None))
    token = get_token()
    text = text.replace(token, "***") if token else text
    status = getattr(getattr(error, "response", None), "status_code", None)
    hints = {
        401: "run `hf auth login` or set HF_TOKEN",
        403: "the token needs write access to this repository",
        404: "the repository is not there or not visible to this token",
    }
    return f"{text}; {hints[status]}" if status in hints else text


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
