"""The GPU hour, rehearsed small on the CPU: every stage runs, what is done is skipped, what is torn is passed over."""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import fork, wait


ROOT = Path(__file__).resolve().parent.parent
RUNNER = ROOT / "recipes" / "benchmarks" / "gpu"


@pytest.fixture(scope="module")
def run():
    """The runner's `main`, in this process."""
    spec = importlib.util.spec_from_file_location("gpu_run", RUNNER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *words: module.main(list(map(str, words)))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory, run):
    """In a copy of this process, since on a card it has one of its own, and so have the recipes that it starts."""
    folder = tmp_path_factory.mktemp("gpu")
    log = folder.parent / "gpu.log"

    def rehearse():
        import stages

        stages.subprocess = SimpleNamespace(run=run_in_a_copy)
        sys.exit(run("--rehearse", "--output", folder))

    assert wait(fork(rehearse, output=log, PYTHONPATH=str(ROOT))) == 0, log.read_text()[-4000:]
    return folder


def run_in_a_copy(command, cwd, **_):
    def recipe():
        os.chdir(cwd)
        sys.argv = command[1:]
        runpy.run_path(command[1], run_name="__main__")

    with tempfile.NamedTemporaryFile("r") as said:
        return subprocess.CompletedProcess(command, wait(fork(recipe, output=Path(said.name))), stderr=said.read())


def entries(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return [line for line in lines if "started" not in line]


def test_every_stage_finds_something(rehearsal):
    found = {(entry["stage"], entry["item"]): entry["result"] for entry in entries(rehearsal)}
    assert {stage for stage, _ in found} == {"suite", "speed", "memory", "quantised", "models", "small", "size"}
    assert found["suite", "resumed = uninterrupted"] == {"bit-identical": True}
    assert found["suite", "noise = that of a CPU"] == {"bit-identical": True}
    assert found["suite", "GRPO's first ratio, float32"]["ratio"] == pytest.approx(1, abs=1e-3)
    assert found["suite", "fused = merged, lora, float32"]["fused"] is True
    assert {item for stage, item in found if stage == "memory"} == {
        f"{method}, tiny, 64 px" for method in ("inference", "ES", "GRPO", "DiffusionDPO")
    }
    assert {found["size", f"{part}, part 1 of 1"]["steps"] for part in ("autoencoder", "teacher", "student")} == {
        "1 of 1"
    }
    assert {f"gain of {name}" for name in ("tiny-pickscore", "tiny-clip-heldout")} < set(
        found["size", "ES, 64m, seed 0"]
    )
    steps = [result for (stage, _), result in found.items() if stage == "models"]
    assert len(steps) == 3 and all(result["counted GB"] >= 0 for result in steps)


def test_what_is_done_is_skipped_and_what_was_torn_is_not(rehearsal, run, capsys):
    path = rehearsal / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"noise = that of a CPU"' not in line) + '{"stage": "sui')
    assert run("--rehearse", "--output", rehearsal, "--stages", "suite") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "noise = that of a CPU: " in line


def test_time_that_is_up_is_said_and_what_was_cut_off_twice_is_passed_over(tmp_path, run, capsys):
    assert run("--rehearse", "--output", tmp_path, "--seconds", "1") == 3
    assert "no time left; run the same command again" in capsys.readouterr().out
    card = json.loads((tmp_path / "results.jsonl").read_text()) if (tmp_path / "results.jsonl").exists() else None
    assert card is None, "nothing was begun"


def test_the_pages_say_not_measured_until_it_is(tmp_path, run):
    pages = [Path(shutil.copy(ROOT / name, tmp_path)) for name in ("docs/gpu.md", "README.md")]
    before = [page.read_text() for page in pages]
    assert run("--output", tmp_path / "none", "--docs", *pages) == 0
    gpu, readme = (page.read_text() for page in pages)
    assert gpu.count("| not measured |") > 30 and "No card has been measured yet." in gpu
    assert readme.count("| not measured |") == 7
    for old, new, name in ((before[0], gpu, "results"), (before[1], readme, "status")):
        assert [text.split(f"<!-- {name}")[0] for text in (old, new)] == [old.split(f"<!-- {name}")[0]] * 2
        assert new.endswith(old.split(f"<!-- end of {name} -->")[1])


def test_what_has_not_been_trained_is_not_built_upon(tmp_path, run):
    import sizes
    import stages

    place = stages.Place("cpu", True, tmp_path)
    with pytest.raises(RuntimeError, match="the autoencoder has 0 of 1 steps"):
        sizes.trained_for_a_part(place, "teacher")
    with pytest.raises(RuntimeError, match="there is no pipeline yet"):
        sizes.gains_of(place, "ES", "64m", 0)


def test_models_of_true_shape_have_it(run):
    """The published numbers of parameters; on the meta device nothing is allocated."""
    import true_shape

    for shape in true_shape.SHAPES.values():
        with torch.device("meta"):
            parts = shape.build()
        denoiser = parts.get("transformer") or parts["unet"]
        assert sum(p.numel() for p in denoiser.parameters()) / 1e9 == pytest.approx(shape.parameters, abs=0.01)


def test_only_what_the_image_lacks_is_carried(tmp_path, monkeypatch):
    sys.path.insert(0, str(RUNNER))
    import carry

    def download(name, version, arguments):
        wheel = tmp_path / f"{name}-{version}.whl"
        needs = {"datasets": ["dill>=0.4", "torch>=2"], "diffusers": ["huggingface-hub>=99"]}.get(name, [])
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(f"{name}.dist-info/METADATA", "".join(f"Requires-Dist: {need}\n" for need in needs))
        return wheel

    monkeypatch.setattr(carry, "download", download)
    words = ["--have", str(RUNNER / "image.txt"), "--to", str(tmp_path / "carried")]
    assert carry.main(words) == 1, "diffusers asks for a newer huggingface_hub than the image has"
    names = {path.name.partition("-")[0] for path in tmp_path.glob("*.whl")}
    assert names == {"datasets", "diffusers", "open", "trl", "dill"}
