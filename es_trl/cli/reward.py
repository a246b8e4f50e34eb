"""`es-trl reward list | check`: which rewards there are, and whether one does what a run needs."""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..rewards import CATALOGUE, RewardSet
from .messages import refuse


PROMPTS = ("a red circle on a white background", 'a photo of a dog beside a sign that says "OPEN"')
SIDE = 256
SMALL = 0.01  # of the differences between pictures: changes below it do not matter


def main(argv: Sequence[str]) -> int:
    """
    Lists the rewards, or scores a few synthetic pictures twice and says what came of it.

    Returns:
        `int`: 0; 1 if the reward fails, or with `--strict` if there is a warning; 2 for an argument that cannot work.
    """
    arguments = _parser().parse_args(argv)
    if arguments.action == "list":
        sys.stdout.write(_list())
        return 0
    try:
        rewards = RewardSet(arguments.reward, device=arguments.device)
    except ValueError as error:
        return refuse("reward", error)
    try:
        report = check(rewards, arguments.prompt or PROMPTS, arguments.size, dict(arguments.column or ()))
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        here = " (here: --column NAME=VALUE)" if "that it is not given" in str(error) and not arguments.column else ""
        return refuse("reward", f"{error}{here}", 1)
    sys.stdout.write(json.dumps(report, indent=2) + "\n" if arguments.json else _text(arguments.reward, report))
    return int(bool(report["failures"]) or (arguments.strict and bool(report["warnings"])))


def check(rewards: RewardSet, prompts: Sequence[str], size: int = SIDE, columns: dict | None = None) -> dict:
    """
    Scores every prompt with four pictures of `size` pixels, twice together and once one by one, with one value for all
    of them in the `columns` that the reward reads.

    Returns:
        `dict`: `scores` (a row per prompt, a column per picture, None where missing), `min`, `max`, `missing`,
        `seconds_to_load`, `milliseconds_per_image`, `largest_change_when_repeated`, `largest_change_one_by_one`,
        `spread_over_pictures`, `spread_over_prompts`, and the lists `failures`, `warnings` and `notes`.

    Raises:
        `RuntimeError`, `ValueError`, `OSError`, `ImportError`: the reward cannot be loaded, raises, or returns
            something else than one number or None per picture.
    """
    started = time.perf_counter()
    rewards.load()
    loaded = time.perf_counter()
    pictures = synthetic_pictures(size)
    texts = [prompt for prompt in prompts for _ in pictures]
    images = [picture for _ in prompts for picture in pictures]
    given = {name: [value] * len(images) for name, value in (columns or {}).items()}
    first = rewards(texts, images, given, where="the first call")[:, 0]
    seconds = time.perf_counter() - loaded
    started_again = time.perf_counter()
    second = rewards(texts, images, given, where="the second call")[:, 0]
    seconds = min(seconds, time.perf_counter() - started_again)  # the first call also warms up
    change_alone, compares = None, bool(rewards.group_rewards)
    if not compares:
        one = {name: values[:1] for name, values in given.items()}
        rows = [rewards([text], [image], one, where="one by one") for text, image in zip(texts, images, strict=True)]
        change_alone = _largest_change(first, np.concatenate(rows)[:, 0])
    table = first.reshape(len(prompts), len(pictures))
    finite = first[np.isfinite(first)]
    report = {
        "reward": rewards.names[0],
        "prompts": list(prompts),
        "pictures": list(PICTURES),
        "scores": [[_number(value) for value in row] for row in table],
        "min": _number(finite.min()) if len(finite) else None,
        "max": _number(finite.max()) if len(finite) else None,
        "missing": int((~np.isfinite(first)).sum()),
        "seconds_to_load": round(loaded - started, 3),
        "milliseconds_per_image": round(1000 * seconds / len(images), 3),
        "largest_change_when_repeated": _largest_change(first, second),
        "largest_change_one_by_one": change_alone,
        "spread_over_pictures": _spread(table, axis=1),
        "spread_over_prompts": _spread(table, axis=0),
    }
    return report | _judge(report, finite, compares)


def _judge(report: dict, finite: np.ndarray, compares: bool) -> dict[str, list[str]]:
    """What in the numbers would spoil a run (failures), may be meant (warnings), or is good to know (notes)."""
    failures, warnings, notes = [], [], []
    if not len(finite):
        failures.append("no picture got a score: every step would stop the run")
    elif report["missing"]:
        notes.append(f"{report['missing']} of the pictures got no score; where all members miss it, it does not apply")
    spread = report["spread_over_pictures"] or 0.0
    if len(finite) and spread == 0:
        warnings.append("the score is the same for every picture of a prompt: there is nothing to learn from it")
    again, alone = report["largest_change_when_repeated"], report["largest_change_one_by_one"]
    if again is None:
        warnings.append("a second call on the same pictures gave no score where the first one did, or the reverse")
    elif again > SMALL * spread:
        warnings.append("a second call on the same pictures gave other scores: every step has to average that out")
    elif not compares and (alone is None or alone > SMALL * spread):
        warnings.append("a picture's score depends on what else is in the call: it changes with members_per_forward")
    if len(report["prompts"]) > 1 and report["spread_over_prompts"] == 0 and spread > 0:
        notes.append("the prompt makes no difference to the score")
    if compares:
        notes.append("it compares the pictures of a group, so it needs a single process")
    return {"failures": failures, "warnings": warnings, "notes": notes}


PICTURES = ("white", "red circle", "sign OPEN", "noise")


def synthetic_pictures(size: int) -> list[Image.Image]:
    """Four pictures that any reward should tell apart: nothing, one shape, a word, noise."""
    white, circle, sign = (Image.new("RGB", (size, size), "white") for _ in range(3))
    ImageDraw.Draw(circle).ellipse([size // 4, size // 4, 3 * size // 4, 3 * size // 4], fill=(220, 30, 30))
    font = ImageFont.load_default(max(size // 4, 4))
    ImageDraw.Draw(sign).text((size // 2, size // 2), "OPEN", fill=(30, 60, 160), font=font, anchor="mm")
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return [white, circle, sign, Image.fromarray(noise)]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _largest_change(a: np.ndarray, b: np.ndarray) -> float | None:
    """None where one of the two has a score and the other has not."""
    if (np.isfinite(a) != np.isfinite(b)).any():
        return None
    both = np.isfinite(a)
    return float(np.abs(a[both] - b[both]).max()) if both.any() else 0.0


def _spread(table: np.ndarray, axis: int) -> float | None:
    """Mean over the other axis of largest minus smallest, where there are two numbers to compare."""
    rows = [row[np.isfinite(row)] for row in (table if axis == 1 else table.T)]
    spreads = [row.max() - row.min() for row in rows if len(row) > 1]
    return float(np.mean(spreads)) if spreads else None


def _text(name: str, report: dict) -> str:
    width = max(len(text) for text in PICTURES) + 2
    lines = [name, "", " " * 4 + "".join(f"{text:>{width}}" for text in PICTURES)]
    for prompt, row in zip(report["prompts"], report["scores"], strict=True):
        numbers = "".join(f"{'none' if value is None else f'{value:.5g}':>{width}}" for value in row)
        lines += [f"  {prompt}", " " * 4 + numbers]
    lines += [
        "",
        f"  returns        one number per picture, {report['missing']} of {4 * len(report['prompts'])} missing",
        f"  range          {_show(report['min'])} to {_show(report['max'])}",
        f"  differences    {_show(report['spread_over_pictures'])} between pictures of a prompt, "
        f"{_show(report['spread_over_prompts'])} between prompts of a picture",
        f"  repeated       largest change {_show(report['largest_change_when_repeated'])}",
        f"  one by one     largest change {_show(report['largest_change_one_by_one'])}",
        f"  time           {report['milliseconds_per_image']:.4g} ms per picture, "
        f"{report['seconds_to_load']:.3g} s to load",
        "",
    ]
    lines += [f"  {kind}: {text}" for kind in ("failure", "warning", "note") for text in report[f"{kind}s"]]
    if not report["failures"] and not report["warnings"]:
        lines.append("  ok")
    return "\n".join(lines) + "\n"


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _list() -> str:
    width = max(len(entry.name) for entry in CATALOGUE)
    lines = [f"{entry.name:<{width}}  {entry.measures} ({entry.range})" for entry in CATALOGUE]
    lines += ["", "Also name:checkpoint, a CLIP checkpoint (scored as pickscore), remote:URL, vlm_judge:MODEL@URL,"]
    lines += ["and path/to/file.py:function. es-trl reward check NAME tries one."]
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "es-trl reward", description="List the rewards, or try one on synthetic pictures."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="all names, and what they measure")
    one = actions.add_parser("check", help="shape, range, time, determinism, constant output")
    one.add_argument("reward", help="a name, name:checkpoint, remote:URL, vlm_judge:MODEL@URL or file.py:function")
    one.add_argument("--prompt", action="append", help="a prompt to score with; may be given several times")
    what = "a column of the data set that the reward reads; VALUE is JSON or plain text"
    one.add_argument("--column", action="append", type=_column, metavar="NAME=VALUE", help=what)
    one.add_argument("--size", type=_size, default=SIDE, help=f"side of the pictures in pixels, 8 to 4096 ({SIDE})")
    one.add_argument("--device", default="cpu", help="where models run: cpu, cuda, mps (cpu)")
    one.add_argument("--json", action="store_true", help="write JSON")
    one.add_argument("--strict", action="store_true", help="warnings give exit code 1")
    return parser


def _column(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, not {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _size(text: str) -> int:
    if not text.isdecimal() or not 8 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"must be an integer from 8 to 4096, not {text!r}")
    return int(text)
