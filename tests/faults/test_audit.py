"""The dependency audit: what its answers mean, for replies in the form that pip-audit writes. No network."""

import runpy
from importlib import metadata
from pathlib import Path

import pytest


AUDIT = runpy.run_path(str(Path(__file__).resolve().parents[2] / ".ci" / "audit.py"))


def package(name, *vulnerabilities):
    return {"name": name, "version": "1.0", "vulns": list(vulnerabilities)}


def known(name, *fixes):
    return {"id": name, "fix_versions": list(fixes), "aliases": ["CVE-1"], "description": "..."}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([package("a"), package("b")], 0, "2 of 2 packages measured; 0 vulnerabilities have a fix."),
        ([package("a", known("P-1", "1.1", "2.0"))], 1, "a 1.0: P-1 CVE-1, fixed in 1.1, 2.0"),
        ([package("a", known("P-1"))], 0, "a 1.0: P-1 CVE-1, no fix"),
        ([package("a"), {"name": "b", "skip_reason": "not found"}], 0, "b: not measured (not found)"),
        ([package("a"), {"name": "b", "skip_reason": "not found"}], 0, "1 of 2 packages measured; 0 vulnerabilities"),
        ([], 0, "0 of 0 packages measured"),
    ],
)
def test_verdict(packages, code, said):
    lines, exit_code = AUDIT["verdict"]({"dependencies": packages})
    assert exit_code == code and any(said in line for line in lines)


@pytest.mark.parametrize(("installs", "report"), [(False, {}), (True, {}), (True, {"dependencies": [package("x")]})])
def test_what_cannot_be_measured_is_no_failure_and_no_claim(monkeypatch, capsys, installs, report):
    """pip-audit is not to be had; it does not answer; it does not know of what everybody knows."""
    asked = []
    monkeypatch.setitem(AUDIT["main"].__globals__, "prepare", lambda folder: installs)
    monkeypatch.setitem(AUDIT["main"].__globals__, "ask", lambda folder, names: asked.append(names) or report)
    assert AUDIT["main"]() == 0
    assert "not measured" in capsys.readouterr().out
    assert len(asked) == installs, "the packages are not looked up one by one where that is of no use"


def test_the_installed_packages_are_those_of_this_python():
    names = AUDIT["installed"]()
    assert f"numpy=={metadata.version('numpy')}" in names
    assert not any("+" in name or name.startswith("es-trl=") for name in names)
