"""
Looks the installed packages up in the vulnerability database of PyPI, with pip-audit in an environment of its own.

    python .ci/audit.py          # the packages of this Python

First it asks for a version that is known to be vulnerable. If that is not found, the database does not answer here,
and the result is "not measured": no claim, and exit code 0. A vulnerability that a newer version mends is exit code 1;
one that no version mends is said, and no more.
"""

import json
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path


PIP_AUDIT = "pip-audit==2.10.1"
CONTROL = "jinja2==2.4.1"  # CVE-2014-1402 and others


def installed() -> list[str]:
    """`name==version` of every package that was installed from an index; a build's local label is left out."""
    found = set()
    for package in metadata.distributions():
        origin = package.read_text("direct_url.json")
        if package.read_text("INSTALLER") is None:  # the egg-info of a source tree that is on the path
            continue
        if origin is None or "dir_info" not in json.loads(origin):
            found.add(f"{package.metadata['Name'].lower()}=={package.version.partition('+')[0]}")
    return sorted(found)


def ask(folder: Path, requirements: list[str]) -> dict:
    """pip-audit's report; an empty one if it has none to give."""
    listed = folder / "requirements.txt"
    listed.write_text("\n".join(requirements) + "\n")
    command = [folder / "env/bin/pip-audit", "-r", listed, "--no-deps", "--disable-pip", "--format", "json"]
    answer = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True)
    try:
        return json.loads(answer.stdout)
    except json.JSONDecodeError:
        return {}


def prepare(folder: Path) -> bool:
    """Installs pip-audit below `folder`, away from what it looks at."""
    venv.create(folder / "env", with_pip=True)
    command = [folder / "env/bin/python", "-m", "pip", "install", "-qq", PIP_AUDIT]
    return subprocess.run(command, capture_output=True).returncode == 0


def verdict(report: dict) -> tuple[list[str], int]:
    """What a report says, line by line, and the exit code."""
    packages = report.get("dependencies", [])
    measured = [package for package in packages if "vulns" in package]
    lines, mended = [], 0
    for package in measured:
        for vulnerability in package["vulns"]:
            fixes = ", ".join(vulnerability["fix_versions"])
            mended += bool(fixes)
            name = " ".join([vulnerability["id"], *vulnerability.get("aliases", [])])
            lines.append(
                f"{package['name']} {package['version']}: {name}, {f'fixed in {fixes}' if fixes else 'no fix'}"
            )
    lines += [f"{p['name']}: not measured ({p['skip_reason']})" for p in packages if "skip_reason" in p]
    lines.append(f"{len(measured)} of {len(packages)} packages measured; {mended} vulnerabilities have a fix.")
    return lines, int(mended > 0)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="es_trl-audit-") as place:
        folder = Path(place)
        if not prepare(folder):
            print(f"Dependency audit: not measured, {PIP_AUDIT} cannot be installed here.")
            return 0
        control = ask(folder, [CONTROL]).get("dependencies", [])
        if not any(package.get("vulns") for package in control):
            print(f"Dependency audit: not measured, the database does not know of {CONTROL} here.")
            return 0
        lines, code = verdict(ask(folder, installed()))
    print("Dependency audit:", *lines, sep="\n  ")
    return code


if __name__ == "__main__":
    sys.exit(main())
