"""
The wheels that a card's software image lacks, in the versions of constraints.txt; nothing that it has comes along.

    python -m pip freeze > image.txt                                        # on the image, or from its description
    python recipes/benchmarks/gpu/carry.py --have image.txt --to carried    # where there is a network

`image.txt` has one `name` or `name==version` a line; a package of the image that is too old or too new for what is
carried is an error. The wheels are for Python 3.12 on 64-bit x86 Linux unless --python and --platform say otherwise.
Unpacked, they go in front of the checkout:

    python -m pip install --no-index --no-deps --target carried/site carried/*.whl
    PYTHONPATH=carried/site:. python recipes/benchmarks/gpu/run.py --output outputs/gpu
"""

import argparse
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).resolve().parents[3]
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]
NOT_NEEDED = {"wandb"}  # nothing that measures imports it


def versions_of(lines: list[str]) -> dict[str, str | None]:
    """Name -> version, None where the line has none; comments and links to files are passed over."""
    requirements = [
        Requirement(line) for line in map(str.strip, lines) if line and line[0].isalnum() and " @ " not in line
    ]
    pinned = {canonicalize_name(r.name): next(iter(r.specifier), None) for r in requirements}
    return {name: pin.version if pin else None for name, pin in pinned.items()}


def download(name: str, version: str | None, arguments: argparse.Namespace) -> Path:
    before = set(arguments.to.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", arguments.python, "--implementation", "cp", "--dest", str(arguments.to)]
    command += [word for platform in arguments.platform for word in ("--platform", platform)]
    subprocess.run([*command, f"{name}=={version}" if version else name], check=True)
    return (set(arguments.to.glob("*.whl")) - before).pop()


def needs_of(wheel: Path, python: str) -> list[Requirement]:
    """What a wheel asks for on Linux, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "extra": "",
            "platform_system": "Linux", "platform_machine": "x86_64"}  # fmt: skip
    return [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate(here)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--have", type=Path, required=True, help="what the image has: one name or name==version a line"
    )
    parser.add_argument("--to", type=Path, required=True, help="new folder for the wheels")
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--platform", nargs="+", default=PLATFORMS)
    arguments = parser.parse_args(argv)
    arguments.to.mkdir(parents=True)
    there = versions_of(arguments.have.read_text().splitlines())
    tested = versions_of((ROOT / "constraints.txt").read_text().splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo, odd, seen = [(r, "es_trl") for r in map(Requirement, project["dependencies"])], [], set(NOT_NEEDED)
    while todo:
        wanted, by = todo.pop(0)
        name = canonicalize_name(wanted.name)
        if name in there and there[name] and not wanted.specifier.contains(there[name], prereleases=True):
            odd.append(f"{by} asks for {wanted}, the image has {there[name]}")
        if name in there or name in seen:
            continue
        seen.add(name)
        wheel = download(name, tested.get(name), arguments)
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB, for {by}", flush=True)
        todo += [(need, wheel.name.partition("-")[0]) for need in needs_of(wheel, arguments.python)]
    size = sum(path.stat().st_size for path in arguments.to.glob("*.whl")) / 2**20
    print(f"{len(seen - NOT_NEEDED)} wheels, {size:.1f} MiB", *odd, sep="\n")
    return int(bool(odd))


if __name__ == "__main__":
    sys.exit(main())
