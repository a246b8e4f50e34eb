"""
The two files of versions, from what pyproject.toml says and from what this Python has.

    python .ci/versions.py min > constraints-min.txt     # every lower bound at once
    python .ci/versions.py here > constraints.txt        # the newest that were tested: run it where the tests passed
"""

import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


PROJECT = Path(__file__).parents[1] / "pyproject.toml"
OF_TORCH = ("torch", "nvidia-", "cuda-", "triton")  # which torch is the machine's to say, and it says the rest


def floors() -> dict[str, str]:
    """Name -> oldest version, of what is always installed and of what has to go with the torch there."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    listed = map(Requirement, project["dependencies"] + project["optional-dependencies"]["quantised"])
    return {canonicalize_name(r.name): next(s.version for s in r.specifier if s.operator == ">=") for r in listed}


def here() -> dict[str, str]:
    """Name -> installed version, of each package that es-trl and its `dev` extra lead to."""
    found, todo = {}, [Requirement("es-trl[dev]")]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        new = {f"{name}[{extra}]" for extra in wanted.extras or {""}} - found.keys()
        found |= dict.fromkeys(new, package.version)
        for line in package.requires or () if new else ():
            requirement = Requirement(line)
            extras = wanted.extras or {""}
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras):
                todo.append(requirement)
    names = {name.partition("[")[0]: version for name, version in found.items()}
    return {n: v.partition("+")[0] for n, v in names.items() if n != "es-trl" and not n.startswith(OF_TORCH)}


if __name__ == "__main__":
    versions = {"min": floors, "here": here}[sys.argv[1]]()
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in sorted(versions.items()))
