"""
Everything the project wants to know about a GPU, in stages that fit nine minutes each and survive being cut off.

    python recipes/benchmarks/gpu/run.py --output outputs/gpu                      # all stages, in order
    python recipes/benchmarks/gpu/run.py --output outputs/gpu --stages speed       # one of them
    python recipes/benchmarks/gpu/run.py --output outputs/gpu --table              # what was measured, as Markdown
    python recipes/benchmarks/gpu/run.py --output outputs/gpu --docs docs/gpu.md README.md
    python recipes/benchmarks/gpu/run.py --output /tmp/rehearsal --rehearse        # every stage small, on a CPU

A finished item is one line of OUTPUT/results.jsonl. What is there is skipped; an item that was cut off is tried once
more, then it is passed over. `--seconds` stops before an item that would not fit any more (exit code 3): run it again.
"""

import argparse
import gc
import json
import os
import platform
import sys
import time
import traceback
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch


HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]  # stages beside this file, and the benchmarks it shares

from sizes import ASKED, size  # noqa: E402
from stages import ASKS, STAGES, Item, Place  # noqa: E402


STAGES, ASKS = STAGES | {"size": size}, ASKS | {"size": ASKED}
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
BLOCK = "<!-- {}: written by recipes/benchmarks/gpu/run.py --docs -->", "<!-- end of {} -->"
TRIES = 2  # of an item that was cut off


class Results:
    """`results.jsonl`: a line when an item starts and one when it ends."""

    def __init__(self, folder: Path, card: str):
        self.path, self.card = folder / "results.jsonl", card
        self.finished: dict[tuple[str, str], dict] = {}
        self.started: dict[tuple[str, str], int] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # the end of a run that was cut off
                continue
            self._count(entry)

    def _count(self, entry: dict) -> None:
        key = entry["stage"], entry["item"]
        if entry["card"] != self.card:
            return
        if "started" in entry:
            self.started[key] = self.started.get(key, 0) + 1
        else:
            self.finished[key] = entry

    def write(self, entry: dict) -> None:
        entry = {"card": self.card} | entry
        self._count(entry)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def card_name(place: Place) -> str:
    name = torch.cuda.get_device_name() if place.device == "cuda" else f"CPU ({platform.machine()})"
    return f"{name}, rehearsal" if place.rehearse else name


def versions() -> str:
    found = [f"{name} {metadata.version(name)}" for name in PACKAGES]
    return ", ".join([f"Python {platform.python_version()}", *found, f"CUDA {torch.version.cuda}"])


def measure(item: Item, place: Place) -> dict:
    """What the item found, or one line about what went wrong; too little memory is a finding."""
    began = time.perf_counter()
    try:
        found = {"result": item.run(place)}
    except torch.cuda.OutOfMemoryError:
        found = {"result": {"out of memory": True}}
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    gc.collect()
    if place.device == "cuda":
        torch.cuda.empty_cache()
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def run(stages: list[str], place: Place, results: Results, seconds: float) -> int:
    """0: all was measured; 1: something failed; 3: the time was up before the end."""
    began, failed = time.perf_counter(), False
    for stage in stages:
        for item in STAGES[stage](place):
            key = stage, item.name
            if "result" in results.finished.get(key, ()) or results.started.get(key, 0) >= TRIES:
                continue
            if time.perf_counter() - began + item.seconds > seconds:
                print(f"{stage} {item.name}: no time left; run the same command again", flush=True)
                return 3
            now = {"stage": stage, "item": item.name, "date": datetime.now(UTC).isoformat(timespec="seconds")}
            results.write(now | {"started": True})
            entry = now | measure(item, place) | {"versions": versions()}
            results.write(entry)
            failed = failed or "error" in entry
            print(f"{stage} {item.name}: {entry['seconds']} s, {brief(entry)}", flush=True)
    return int(failed)


def brief(entry: dict | None) -> str:
    if entry is None:
        return "not measured"
    if "error" in entry:
        return f"failed: {entry['error']}"
    return ", ".join(f"{name} {value}" for name, value in entry["result"].items())


def table(place: Place, results: Results) -> str:
    """Every item there is, with what was found or `not measured`."""
    lines = [f"Card: {results.card}. " + "; ".join(sorted({e["versions"] for e in results.finished.values()}))]
    if not results.finished:
        lines = ["No card has been measured yet."]
    lines += ["", "| stage | item | found | date |", "|---|---|---|---|"]
    for stage, items in STAGES.items():
        for item in items(place):
            entry = results.finished.get((stage, item.name))
            found, date = brief(entry).replace("|", "/"), entry["date"][:10] if entry else ""
            lines.append(f"| {stage} | {item.name} | {found} | {date} |")
    return "\n".join(lines) + "\n"


def summary(place: Place, results: Results) -> str:
    """How much of each stage has been measured."""
    lines = ["| on a CUDA card | state |", "|---|---|"]
    for stage, items in STAGES.items():
        keys = [(stage, item.name) for item in items(place)]
        found = sum("result" in results.finished.get(key, ()) for key in keys)
        lines.append(f"| {ASKS[stage]} | {f'{found} of {len(keys)} items measured' if found else 'not measured'} |")
    return "\n".join(lines) + "\n"


def write_docs(path: Path, blocks: dict[str, str]) -> None:
    """Writes those of the blocks that the page has."""
    text = path.read_text(encoding="utf-8")
    for name, block in blocks.items():
        begin, end = (mark.format(name) for mark in BLOCK)
        if begin in text:
            text = f"{text.partition(begin)[0]}{begin}\n\n{block}\n{end}{text.partition(end)[2]}"
    path.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--seconds", type=float, default=540, help="start nothing that would end later than this")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, as small as it goes")
    parser.add_argument("--table", action="store_true", help="print what has been measured, run nothing")
    parser.add_argument("--docs", type=Path, nargs="+", help="write that table into these pages, run nothing")
    parser.add_argument("--card", help="with --table or --docs: of this card, as results.jsonl names it")
    arguments = parser.parse_args(argv)
    device = "cpu" if arguments.rehearse or not torch.cuda.is_available() else "cuda"
    place = Place(device, arguments.rehearse, arguments.output)
    reading = arguments.table or arguments.docs
    if not reading and place.device == "cpu" and not arguments.rehearse:
        print("No CUDA device is here; --rehearse runs every stage on the CPU, small.", file=sys.stderr)
        return 2
    results = Results(arguments.output, arguments.card or card_name(place))
    if arguments.docs:
        for page in arguments.docs:
            write_docs(page, {"results": table(place, results), "status": summary(place, results)})
    elif arguments.table:
        print(table(place, results))
    else:
        return run(arguments.stages, place, results, arguments.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
