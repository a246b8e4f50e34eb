"""
The table of docs/systems.md: package -> oldest release that passes -> what breaks below.

    python .ci/oldest.py --python ENV/bin/python --packages peft accelerate    # goes down from the lower bounds
    python .ci/oldest.py --docs                                                # writes the table, runs nothing

ENV has constraints-min.txt installed. One package at a time is laid over it (a folder in front of its own, no
dependencies), the newest patch release of each minor version, downwards until one fails or `--tries` were run; each
runs `.ci/smoke.py --only import train resume load`. Every probe is a line of RESULTS as soon as it is known; what is
there is not run again. A failure that is another package's (one of its requirements is too new) is a failure: nobody
installs that pair. The Python that runs this has pip; nothing is installed into either.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.version import Version
from versions import floors


HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "oldest.jsonl", HERE.parent / "docs" / "systems.md"
BEGIN, END = "<!-- oldest: written by .ci/oldest.py --docs -->", "<!-- end of oldest -->"
PARTS = ("import", "train", "resume", "load")


def releases(package: str) -> list[Version]:
    """The newest patch release of each minor version, newest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if line.startswith("Available versions:"))
    newest: dict[tuple[int, int], Version] = {}
    for version in map(Version, line.partition(":")[2].replace(" ", "").split(",")):
        newest[version.major, version.minor] = max(version, newest.get((version.major, version.minor), version))
    return sorted(newest.values(), reverse=True)


def probe(python: str, package: str, version: Version) -> str:
    """Why it does not work; empty where it does."""
    with tempfile.TemporaryDirectory(prefix="es_trl-oldest-") as folder:
        of_python = subprocess.run([python, "-VV"], capture_output=True, text=True, check=True).stdout.split()[1]
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        install += ["--only-binary=:all:", "--python-version", of_python, f"{package}=={version}"]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            return f"no wheel for Python {of_python.rpartition('.')[0]}"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(HERE.parent)])}
        smoke = [python, str(HERE / "smoke.py"), "--only", *PARTS]
        done = subprocess.run(smoke, capture_output=True, text=True, env=environment, cwd=folder)
    if not done.returncode:
        return ""
    failed = [line for line in done.stdout.splitlines() if "FAILED" in line]
    return failed[0] if failed else (done.stderr.strip().splitlines() or ["it was killed"])[-1]


def known() -> dict[tuple[str, str], str]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {(entry["package"], entry["version"]): entry["why"] for entry in map(json.loads, lines)}


def search(python: str, package: str, tries: int) -> None:
    floor = Version(floors()[package])
    for version in [v for v in releases(package) if v <= floor or v.release[:2] == floor.release[:2]][:tries]:
        why = known().get((package, str(version)))
        if why is None:
            why = probe(python, package, version)
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps({"package": package, "version": str(version), "why": why[:300]}) + "\n")
        print(f"{package} {version}: {why or 'passes'}", flush=True)
        if why:
            return


def table() -> str:
    lines, rest = ["| package | bound | oldest that passes | what breaks below |", "|---|---|---|---|"], []
    for package, floor in floors().items():
        found = [(Version(v), why) for (name, v), why in known().items() if name == package]
        passed, failed = [v for v, why in found if not why], [(v, why) for v, why in found if why]
        brief = [f"{v}: {re.sub(r' [(]/.*?[)]', '', why).replace('|', '/')}" for v, why in sorted(failed, reverse=True)]
        below = "; ".join(brief) or "not tried"
        if found:
            lines.append(f"| {package} | {floor} | {min(passed) if passed else 'none'} | {below} |")
        else:
            rest.append(f"{package} {floor}")
    return "\n".join(lines) + (f"\n\nNothing below these was tried: {', '.join(rest)}.\n" if rest else "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="of an environment with constraints-min.txt")
    parser.add_argument("--packages", nargs="+", choices=list(floors()), default=list(floors()))
    parser.add_argument("--tries", type=int, default=3, help="releases of a package, at most")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/systems.md, run nothing")
    arguments = parser.parse_args()
    if arguments.docs:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return 0
    for package in arguments.packages:
        search(arguments.python or parser.error("--python is needed"), package, arguments.tries)
    return 0


if __name__ == "__main__":
    sys.exit(main())
