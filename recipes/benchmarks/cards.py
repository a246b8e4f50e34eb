"""
Which model, which card, which file: the page docs/cards.md, and the line on memory in each recipe, from shapes alone.

    python recipes/benchmarks/cards.py           # says what is out of date
    python recipes/benchmarks/cards.py --write   # writes both
"""

import argparse
import gc
import itertools
import multiprocessing
import os
import re
import sys
from pathlib import Path

from es_trl.cli import MemoryPlan, parse, plan_memory
from es_trl.cli.recipes import recipes
from es_trl.trainer import METHODS


ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "cards.md"
HEAD = """\
# Which model, which card, which file

Every file below is a run: `es-trl train --config z_image_turbo/es/config_12gb`. This page is written by
`python recipes/benchmarks/cards.py --write` from the files and the models' shapes, in GB as
`es-trl dry-run --config NAME --gpu 12GB` counts them ([how near](scale.md#how-near-the-count-is)).

**Not measured on a GPU**: no card was at hand, and nothing of these models was downloaded. Each file has been through
one step on a small random model of its architecture (`pytest tests/test_cards.py`).

For a card that is not here take the file of a smaller one, or ask `es-trl dry-run` what to change.

| card | model and pictures | method | file | GB at most | when |
|---:|---|---|---|---:|---|
"""
TAIL = """
A frozen LoRA is counted as one of rank 64 on every layer. Encoded prompts are kept in the computer's memory, not on
the card.

## In true widths

`python recipes/benchmarks/true_widths.py NAME FOLDER` goes through one small step of a file on its model in true
widths, with random weights and two blocks of each kind (the UNets of SD-Turbo and SDXL whole), in 64 px. On one
thread of a shared 2-core CPU, 2026-11-28, one run each:

| file | weights | processor seconds | peak of the process, GB |
|---|---:|---:|---:|
| `sana_sprint/es` | 0.7 G | 27 | 2.4 |
| `sana_sprint_0_6b/es` | 0.5 G | 26 | 2.1 |
| `sana_sprint_0_6b/grpo` | 0.5 G | 19 | 2.1 |
| `sd_turbo/es` | 1.0 G | 37 | 3.4 |
| `sd_turbo/dpo` | 1.0 G | 29 | 3.4 |
| `sdxl_turbo/es` | 2.7 G | 138 | 11.8 |
| `sdxl_turbo/dpo` | 2.7 G | 115 | 11.7 |
| `sdxl_lightning/es` | 2.7 G | 186 | 7.9 |
| `sdxl_lightning/dpo` | 2.7 G | 117 | 7.9 |
| `flux2_klein_4b/es` | 1.2 G | 76 | 3.5 |
| `flux2_klein_4b/grpo` | 1.2 G | 56 | 3.5 |
| `z_image_turbo/es/config_12gb` | 1.4 G | 292 | 5.1 |
| `z_image_turbo/es/config_16gb` | 1.4 G | 351 | 4.9 |
| `z_image_turbo/grpo` | 1.4 G | 218 | 5.1 |
| `qwen_image_lightning/es` | 1.4 G | 234 | 4.3 |
| `qwen_image_lightning/grpo` | 1.4 G | 174 | 4.3 |
| `krea2_turbo/es` | 2.0 G | 589 | 7.0 |
| `krea2_turbo/grpo` | 2.0 G | 312 | 7.9 |

All eighteen went through, each with an estimate or gradient above zero. bitsandbytes, which needs a GPU, is torchao's
int8 there.
"""
CARD = re.compile(r"(.+?), for one GPU with (\d+) GB")


def plans() -> dict[str, tuple]:
    """By a recipe's name: its file, its first line, the arguments, and the plan of its memory."""
    found = {}
    for name, path in recipes().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        if CARD.match(first):
            found[name] = path, first, *parse(args=["--config", str(path), "--use_cpu", "True"])
    by_model: dict[str, list[str]] = {}  # whose shapes are made once
    for name, (_, _, arguments, _) in found.items():
        by_model.setdefault(arguments.model_name_or_path, []).append(name)
    longest = {name: 3 if found[name][2].method == "dpo" else 1 for name in found}  # a UNet's backward; those first
    groups = sorted(by_model.values(), key=lambda names: -sum(longest[name] for name in names))
    gc.freeze()  # what is imported stays: the collector need not walk through it again and again
    with multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn").Pool(2) as pool:
        done = pool.map(plans_of, [[found[name][2:] for name in names] for names in groups], chunksize=1)
    for name, plan in zip(itertools.chain(*groups), itertools.chain(*done), strict=True):
        found[name] = *found[name][:3], plan
    return found


def plans_of(configs: list[tuple]) -> list[MemoryPlan]:
    """One after another, of what [`parse`] returns."""
    return [plan_memory(arguments, config) for arguments, config in configs]


def memory_line(plan) -> str:
    """What a recipe says of its memory."""
    return f"# Memory: {plan.peak.total:.1f} GB at most, {plan.peak.name} (es-trl dry-run). NOT MEASURED ON A GPU."


def page(found: dict[str, tuple]) -> str:
    """The page."""
    rows = []
    for name, (_, first, arguments, plan) in found.items():
        what, card = CARD.match(first).groups()
        order, label = list(METHODS).index(arguments.method), arguments.method.upper()
        cells = [f"{card} GB", what.partition(" on ")[2], label, f"`{name}`", f"{plan.peak.total:.1f}", plan.peak.name]
        rows.append((int(card), cells[1], order, f"| {' | '.join(cells)} |"))
    return HEAD + "\n".join(row[-1] for row in sorted(rows)) + "\n" + TAIL


def with_line(text: str, plan) -> str:
    """A recipe's text with its line on memory."""
    return re.sub(r"^# Memory: .*$", lambda _: memory_line(plan), text, count=1, flags=re.MULTILINE)


def out_of_date(found: dict[str, tuple], write: bool = False) -> list[str]:
    """Files that do not say what the plans say; with `write` they then do."""
    wanted = {path: with_line(path.read_text(encoding="utf-8"), plan) for path, _, _, plan in found.values()}
    wanted[PAGE] = page(found)
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale if write else ():
        path.write_text(wanted[path], encoding="utf-8")
    return [str(path.relative_to(ROOT)) for path in stale]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write what is out of date")
    args = parser.parse_args()
    stale = out_of_date(plans(), args.write)
    print("\n".join(f"{'written' if args.write else 'out of date'}: {name}" for name in stale) or "up to date")
    return int(bool(stale) and not args.write)


if __name__ == "__main__":
    sys.exit(main())
