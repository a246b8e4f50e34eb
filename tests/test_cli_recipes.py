"""The recipes are usable by name, in a clone and from an installed wheel."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from es_trl.cli import load_config, main
from es_trl.cli.recipes import recipes, with_recipes


ROOT = Path(__file__).parent.parent


def test_every_config_of_the_clone_has_a_name():
    assert set(recipes().values()) == set((ROOT / "recipes").glob("*/*/*.yaml"))
    assert {"sana_sprint/es", "tiny_sana_sprint/dpo", "tiny_sana_sprint/es/config_long"} <= set(recipes())


def test_a_name_stands_for_its_file_unless_there_is_a_file_of_that_name(tmp_path, monkeypatch):
    path = recipes()["tiny_sana_sprint/es"]
    assert with_recipes(["--config", "tiny_sana_sprint/es"]) == ["--config", str(path)]
    assert with_recipes(["--config=tiny_sana_sprint/es", "--seed", "1"]) == [f"--config={path}", "--seed", "1"]
    assert load_config("tiny_sana_sprint/es")[0] == load_config(str(path))[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_sana_sprint").mkdir()
    (tmp_path / "tiny_sana_sprint" / "es").write_text("seed: 1")
    assert with_recipes(["--config", "tiny_sana_sprint/es"]) == ["--config", "tiny_sana_sprint/es"]


def test_list_and_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "list"]) == 0
    assert re.search("^sana_sprint/es +ES on Sana Sprint 1.6B", capsys.readouterr().out, re.MULTILINE)
    assert main(["recipes", "copy", "sana_sprint/es", "my.yaml"]) == 0
    assert (tmp_path / "my.yaml").read_bytes() == recipes()["sana_sprint/es"].read_bytes()
    assert main(["recipes", "copy", "sana_sprint/es", "my.yaml"]) == 2
    assert "my.yaml cannot be written: File exists" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "es_trl.cli.commands", "recipes", "list"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_name_says_where_the_names_are(capsys):
    assert main(["train", "--config", "sana_sprint/ess"]) == 2
    assert "`es-trl recipes list` names them" in capsys.readouterr().err


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clone without the models, which would take the time."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "VERSION"):
        shutil.copy(ROOT / name, source / name)
    ignored = shutil.ignore_patterns("*.safetensors", "__pycache__", "art")
    for name in ("es_trl", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    return source


@pytest.fixture(scope="module")
def wheel(source):
    return built(source, "build_wheel('.')")


def built(source: Path, call: str) -> zipfile.ZipFile:
    build = f"from setuptools import build_meta; print('built', build_meta.{call})"
    environment = {"ES_TRL_REPOSITORY": "https://example.org/us/es_trl", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", build], cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(source / done.stdout.split()[-1])


def test_a_clone_beside_a_script_does_not_hide_the_editable_install(source):
    """A script in the folder that holds the clone: `es_trl` beside it is a folder without an __init__.py."""
    (path,) = [
        name for name in built(source, "build_editable('.')").namelist() if name.endswith((".pth", "finder.py"))
    ]
    assert path.endswith(".pth"), "a finder comes after the folder, a path does not"


def test_the_wheel_carries_the_recipes_and_nothing_of_the_clone(wheel):
    names = wheel.namelist()
    for path in recipes().values():
        assert wheel.read(f"es_trl/{path.relative_to(ROOT)}") == path.read_bytes()
    assert {name.partition("/")[0] for name in names} == {"es_trl", names[-1].partition("/")[0]}


def test_links_of_the_package_page_lead_to_the_repository(wheel):
    page = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    assert "Project-URL: Repository, https://example.org/us/es_trl\n" in page
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert links and all(link.startswith(("https://", "#")) for link in links)
    assert "](https://example.org/us/es_trl/raw/HEAD/docs/images/demo_before_after.jpg)" in page


@pytest.mark.parametrize("script", sorted((ROOT / "recipes").glob("*_sana.py")), ids=lambda path: path.stem)
def test_a_recipe_says_on_what_it_runs_as_a_job(script):
    header = script.read_text().split("# ///")[1]
    assert "[tool.hf-jobs]" in header and 'dependencies = ["es-trl"]' in header
    assert yaml.safe_load(re.search('flavor = (".*")', header)[1]) == "a100-large"
