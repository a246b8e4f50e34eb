"""One way in for prompts, whatever they are stored in."""

from __future__ import annotations

import difflib
import logging
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from es_trl import assets

from .parti import is_parti, read_parti
from .prompt_files import SUFFIXES, read_columns
from .showcase import SHOWCASE
from .storable import all_unsigned, unstorable


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

LONG_PROMPT = 1000  # characters; more than any text encoder in use reads
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_loaded: weakref.WeakSet[Any] = weakref.WeakSet()  # what was returned is clean: neither checked nor reported again


def load_prompts(
    source: str
    | os.PathLike[str]
    | Sequence[str]
    | Mapping[str, Sequence[Any]]
    | datasets.Dataset
    | datasets.DatasetDict,
    split: str = "train",
    column: str = "prompt",
    max_prompts: int | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> datasets.Dataset:
    """
    Load prompts as a `datasets.Dataset` with a string column "prompt"; further columns are kept for the rewards.

    Args:
        source (`str`, `list[str]`, `dict`, `Dataset` or `DatasetDict`):
            A list of prompts, a dict of columns, a data set, or a string: a .txt (one prompt a line), .csv, .tsv (tabs
            and no quoting), .jsonl or .parquet file, a folder of `Dataset.save_to_disk`, a shipped list
            (`"tiny-train"`, `"tiny-validation"`, `"tiny-test"`), `"showcase"` (eight prompts to look at), or a data
            set on the Hub (`"org/name"`) or a folder that is a copy of one. The columns of PartiPrompts become
            "category", "challenge" and "note".
        split (`str`, *optional*, defaults to `"train"`): which split of a `DatasetDict` or of a data set on the Hub.
        column (`str`, *optional*, defaults to `"prompt"`):
            The column with the prompts, renamed to "prompt"; upper and lower case matter only if several would fit.
        max_prompts (`int`, *optional*): keep the first so many prompts.
        name (`str`, *optional*): configuration of a data set on the Hub that has several.
        revision (`str`, *optional*): branch, tag or commit of a data set on the Hub; a commit pins it.

    Returns:
        `datasets.Dataset`: order kept. Blank prompts are left out everywhere. Text files are stripped of outer space,
        and files lose exact duplicates if there is no other column. What was left out is logged once.

    Raises:
        `ValueError`: no prompts, no such file, split or column, or prompts that are not plain strings.
        `OSError`: a data set on the Hub that cannot be loaded.
    """
    check_max_prompts(max_prompts)
    if max_prompts is None and column == "prompt" and any(source is found for found in _loaded):
        return source
    title, found, from_file, blank = _open(source, split, column, max_prompts, name, revision)
    found = _take_column(found, column, title)
    found = read_parti(found) if is_parti(found) else found
    prompts = list(found.select_columns(["prompt"]).with_format(None)["prompt"])
    check_prompts(prompts, title)
    keep = [i for i, prompt in enumerate(prompts) if prompt.strip()]
    blank += len(prompts) - len(keep)
    duplicates = 0
    if from_file and found.column_names == ["prompt"]:
        first = {prompts[i]: i for i in reversed(keep)}
        duplicates, keep = len(keep) - len(first), sorted(first.values())
    if not keep:
        raise ValueError(f"there are no prompts in {title}: give at least one that is not blank")
    keep = keep[:max_prompts]
    if len(keep) < len(prompts):
        found = found.select(keep)
    too_long = sum(len(prompts[i]) > LONG_PROMPT for i in keep)
    counts = {"blank left out": blank, "duplicates left out": duplicates}
    counts |= {f"longer than {LONG_PROMPT} characters, which text encoders cut": too_long}
    notes = "; ".join(f"{count} {what}" for what, count in counts.items() if count)
    level = logging.WARNING if duplicates or too_long else logging.INFO
    logger.log(level, "%d prompts from %s%s", len(keep), title, f" ({notes})" if notes else "")
    _loaded.add(found)
    return found


def check_max_prompts(max_prompts: int | None) -> None:
    """Raises `ValueError` unless it is None or at least 1."""
    whole = isinstance(max_prompts, int) and not isinstance(max_prompts, bool)
    if max_prompts is not None and not (whole and max_prompts >= 1):
        raise ValueError(f"max_prompts must be a positive integer or None, not {max_prompts!r}")


def _open(
    source: Any, split: str, column: str, max_prompts: int | None, name: str | None, revision: str | None
) -> tuple[str, Any, bool, int]:
    """A name for messages, the raw data set, whether it came from a file, and the blank lines passed over."""
    import datasets

    if isinstance(source, str | os.PathLike):
        return _open_path(os.fspath(source), split, column, name, revision)
    _only_on_the_hub(f"a {type(source).__name__}", name, revision)
    if isinstance(source, datasets.DatasetDict):
        return "the DatasetDict", _pick_split(source, split, "the DatasetDict"), False, 0
    if isinstance(source, datasets.Dataset):
        return "the Dataset", source, False, 0
    if isinstance(source, datasets.IterableDataset):
        if max_prompts is None:
            raise ValueError("prompts from an IterableDataset need max_prompts, the number to take from it")
        return "the IterableDataset", datasets.Dataset.from_list(list(islice(source, max_prompts))), False, 0
    if isinstance(source, Mapping):
        return "the dict", _from_columns(dict(source), column, "the dict"), False, 0
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        check_prompts(source, "the list")
        return "the list", datasets.Dataset.from_dict({column: list(source)}), False, 0
    raise ValueError(
        f"prompts cannot be loaded from {type(source).__name__}: give a list of strings, a file, a Dataset or a Hub id"
    )


def _only_on_the_hub(title: str, name: str | None, revision: str | None) -> None:
    for option, value in (("name", name), ("revision", revision)):
        if value is not None:
            raise ValueError(
                f"{option}={value!r} is for data sets on the Hub, but the prompts are {title}: leave it out"
            )


def _open_path(
    source: str, split: str, column: str, name: str | None, revision: str | None
) -> tuple[str, Any, bool, int]:
    import datasets

    title = repr(source)
    if source == "showcase":
        _only_on_the_hub(f"the built-in list {title}", name, revision)
        return title, datasets.Dataset.from_dict({column: list(SHOWCASE)}), False, 0
    path = os.path.expanduser(assets.resolve(source))
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isfile(path):
        _only_on_the_hub(f"the file {title}", name, revision)
        if suffix not in SUFFIXES:
            raise ValueError(f"prompt file {path!r} has an unknown ending: use one of {', '.join(SUFFIXES)}")
        if suffix == ".parquet":
            return title, _from_parquet(path), True, 0
        columns, blank, lines = read_columns(path, column)
        return title, _from_columns(columns, column, f"prompt file {path!r}", lines), True, blank
    if os.path.isdir(path):
        saved = [file for file in ("dataset_dict.json", "state.json") if os.path.isfile(os.path.join(path, file))]
        _only_on_the_hub(f"in the folder {title}", name if saved else None, revision)
        if saved:
            loaded = datasets.load_from_disk(path)
            several = isinstance(loaded, datasets.DatasetDict)
            return title, _pick_split(loaded, split, title) if several else loaded, False, 0
        if not _holds_data(path):
            raise ValueError(
                f"folder {path!r} is neither one of Dataset.save_to_disk nor a copy of a data set on the Hub: give a "
                "file in it instead"
            )
        return title, _from_hub(path, split, name, None), False, 0
    if suffix in SUFFIXES or source in assets.SHIPPED or path.startswith(("/", ".")) or path.count("/") > 1:
        raise ValueError(f"there is no prompt file {path!r}: check the path, relative paths start at {os.getcwd()!r}")
    if not HUB_ID.fullmatch(source):
        near = difflib.get_close_matches(source, assets.SHIPPED, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"prompts {source!r} are neither a file nor shipped with es_trl nor a data set on the Hub ('org/name'): "
            f"{hint}A single prompt is given as a list, [{source!r}]"
        )
    return title, _from_hub(source, split, name, revision), False, 0


def _holds_data(folder: str) -> bool:
    endings = tuple(suffix for suffix in SUFFIXES if suffix != ".txt")
    places = [place for place in (folder, f"{folder}/data") if os.path.isdir(place)]
    return any(name.lower().endswith(endings) for place in places for name in os.listdir(place))


def _from_hub(repo_id: str, split: str, name: str | None, revision: str | None) -> datasets.Dataset:
    """A data set on the Hub, or a folder that is a copy of one."""
    import datasets

    try:
        return datasets.load_dataset(repo_id, name, split=split, revision=revision)
    except ValueError as error:  # an unknown split or several configurations; the library's sentence lists them
        wanted = f"split {split!r}" + (f", configuration {name!r}" if name else "")
        raise ValueError(f"data set {repo_id!r}, {wanted}: {' '.join(str(error).split())}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise OSError(
            f"data set {repo_id!r} cannot be loaded from the Hub ({reason}): check the name and the network, "
            "run `hf auth login` for a private one, or give a local file"
        ) from error


def _from_parquet(path: str) -> datasets.Dataset:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        return datasets.Dataset(pyarrow.parquet.read_table(path))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"prompt file {path!r} is not a readable parquet file: {error}") from error


def _from_columns(
    columns: Mapping[str, Sequence[Any]], column: str, name: str, lines: Sequence[int] | None = None
) -> datasets.Dataset:
    """Columns of Python values as a data set; `lines` are the lines of the file that they stand in."""
    import datasets
    import pyarrow

    prepared: dict[str, Any] = {}
    for key, values in columns.items():
        if unstorable(key):
            raise ValueError(f"the column name {key!r} of {name} holds {unstorable(key)}")
        if key == column or key.lower() == column.lower() and column not in columns:
            check_prompts(values, name, lines)
        unsigned = all_unsigned(values)
        for i, value in enumerate(() if unsigned else values):
            reason = unstorable(value)
            if reason:
                raise ValueError(f"{_place(name, i, lines)}, column {key!r}, holds {reason}")
        prepared[key] = pyarrow.array(values, pyarrow.uint64()) if unsigned else values
    try:
        return datasets.Dataset.from_dict(prepared)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, TypeError, OverflowError) as error:
        raise ValueError(
            f"the columns of {name} cannot be stored: {error} Each needs one type and one length"
        ) from error


def _place(name: str, index: int, lines: Sequence[int] | None = None) -> str:
    return f"{name}, row {index}" if lines is None else f"{name}, line {lines[index]}"


def _pick_split(splits: datasets.DatasetDict, split: str, name: str) -> datasets.Dataset:
    if split not in splits:
        raise ValueError(f"there is no split {split!r} in {name}: choose one of {', '.join(splits)}")
    return splits[split]


def _take_column(found: datasets.Dataset, column: str, name: str) -> datasets.Dataset:
    names = found.column_names
    fitting = [column] if column in names else [other for other in names if other.lower() == column.lower()]
    if len(fitting) != 1:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no column {column!r} in {name}, only {', '.join(map(repr, names)) or 'none'}: name the column "
            "of the prompts with `column`, in a recipe dataset_prompt_column (eval_dataset_prompt_column, "
            f"test_dataset_prompt_column), in es-trl eval --prompt_column{hint}"
        )
    if fitting[0] == "prompt":
        return found
    if "prompt" in names:
        raise ValueError(f"{name} has a column 'prompt' besides {column!r}: remove or rename one of them")
    return found.rename_column(fitting[0], "prompt")


def check_prompts(prompts: Sequence[Any], name: str, lines: Sequence[int] | None = None) -> None:
    """
    Raises `ValueError`, with the place, unless all are strings that a text encoder and a file can take.

    Args:
        prompts (`Sequence`): what should be prompts.
        name (`str`): of where they come from.
        lines (`Sequence[int]`, *optional*): of the file, one per prompt; without them rows are counted from 0.
    """
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise _not_plain(prompt, _place(name, i, lines))
        if "\x00" in prompt:
            raise ValueError(f"there is a null byte in the prompt of {_place(name, i, lines)}: remove it")
        reason = unstorable(prompt)
        if reason:
            raise ValueError(f"the prompt of {_place(name, i, lines)} holds {reason}")


def _not_plain(prompt: Any, place: str) -> ValueError:
    turns = prompt if isinstance(prompt, list | tuple) else [prompt]
    if turns and isinstance(turns[0], Mapping) and "content" in turns[0]:
        return ValueError(
            f"the prompt of {place} is conversational: image models take plain text, give the 'content' alone"
        )
    return ValueError(f"the prompt of {place} is {type(prompt).__name__} ({str(prompt)[:60]}), not a string")
