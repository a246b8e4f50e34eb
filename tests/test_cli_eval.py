"""`es-trl eval` and `es_trl.evaluate`: one folder of tables, and one line for arguments that cannot work."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import es_trl
from es_trl.cli import main
from es_trl.evaluation import find_adapters
from es_trl.pipelines import LORA_WEIGHTS_NAME, CallSettings, LoadedAdapters, PipelineAdapter, load_pipeline


CALL = CallSettings(num_inference_steps=1, guidance_scale=2.0, max_sequence_length=16)
PARTI = [path for path in (Path("/work/shared/data/PartiPrompts.tsv"), Path("PartiPrompts.tsv")) if path.is_file()][:1]
ROWS = [("a red cat", "Animals", "Basic"), ('a sign that says "hi"', "Artifacts", "Writing & Symbols"),
        ("two blue stars", "Abstract", "Quantity"), ("a green dog", "Animals", "Basic")]  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a run leaves: an adapter, and what it was trained with."""
    folder = tmp_path_factory.mktemp("demo_run")
    adapter = PipelineAdapter(load_pipeline("tiny-sana-sprint"), settings=CALL)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.theta.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    adapter.save_lora(folder)
    config = {"guidance_scale": 2.0, "max_sequence_length": 16, "num_inference_steps": 1, "dtype": "float32"}
    ran = {"method": "es", "base_model": "tiny-sana-sprint", "reward_funcs": ["tiny-pickscore"], "config": config}
    (folder / "es_config.json").write_text(json.dumps(ran))
    return folder, adapter


@pytest.fixture(scope="module")
def parti_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "PartiPrompts.tsv"
    lines = ["\t".join(("Prompt", "Category", "Challenge", "Note")), *("\t".join((*row, "")) for row in ROWS)]
    file.write_text("\n".join(lines) + "\n")
    return file


def test_the_command_line_writes_the_whole_folder(run_folder, parti_file, tmp_path, capsys):
    code = main([
        "eval", "--adapter", str(run_folder[0]), "--prompts", str(parti_file), "--rewards",
        "tiny-pickscore,jpeg_compressibility", "--max_prompts", "3", "--seeds", "0", "5", "--best_of", "2",
        "--judge", "tiny-clip-heldout", "--output_dir", str(tmp_path), "--use_cpu", "--save_images", "2",
    ])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    assert str(tmp_path / "eval.md") in capsys.readouterr().out.splitlines()
    table = json.loads((tmp_path / "eval.json").read_text())
    assert [row["name"] for row in table["rows"]] == [
        "base@1", "adapter@1", "base@2", "adapter@2", "base@1 best of 2",
    ]  # fmt: skip
    protocol = table["protocol"]
    assert (protocol["prompts"], protocol["images_per_prompt"], protocol["seeds"]) == (3, 2, [0, 5])
    assert protocol["pipeline"]["guidance_scale"] == 2.0, "the run's settings, as none were given"
    assert protocol["model"] == "tiny-sana-sprint" and "--seeds 0 5" in protocol["command"]
    assert table["rewards"] == {
        "tiny-pickscore": {"optimised": True, "weight": 1.0, "rises_with_steps": True},
        "jpeg_compressibility": {"optimised": False, "weight": None, "rises_with_steps": False},
    }
    assert {"retrieval_accuracy", "diversity"} <= set(table["rows"][4]["judge"])
    groups = {(entry["by"], entry["value"]) for entry in table["exploratory"]["entries"]}
    assert ("category", "Animals") in groups and ("challenge", "Writing & Symbols") in groups
    for name in ("eval.md", "scores.parquet", "prompts.jsonl", "journal/settings.json"):
        assert (tmp_path / name).is_file(), name


def test_an_adapter_draws_the_pictures_it_was_trained_to_draw(run_folder):
    """Loaded by diffusers from its file, against the adapter in training; at scale 0 it is the base, bit by bit."""
    folder, trained = run_folder
    loaded = LoadedAdapters(load_pipeline("tiny-sana-sprint"), {"demo.run": str(folder)}, CALL)
    prompts = ["a red cat", "two blue stars"]

    def noise():
        return [torch.Generator().manual_seed(i) for i in range(2)]

    expected = np.stack([np.asarray(image, np.int16) for image in trained.generate(prompts, noise())])
    with loaded.chosen("demo.run"):
        found = np.stack([np.asarray(image, np.int16) for image in loaded.generate(prompts, noise())])
    assert np.abs(found - expected).max() <= 1
    with loaded.chosen("demo.run", 0.0):
        off = loaded.generate(prompts, noise(), output_type="pt")
    base = loaded.generate(prompts, noise(), output_type="pt")
    assert torch.equal(off, base)
    with trained.adapter_disabled():
        torch.testing.assert_close(base, trained.generate(prompts, noise(), output_type="pt"))
    loaded.unload()
    assert torch.equal(base, loaded.generate(prompts, noise(), output_type="pt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewards", "tiny-pickscor"], "did you mean 'tiny-pickscore'"),
        (["--rewards", ""], "--rewards is missing"),
        (["--adapter", "/nowhere/run"], "'/nowhere/run'"),
        (["--adapter", "RUN", "RUN"], "the same file"),
        (["--adapter", "a=RUN", "b=RUN"], "the same file"),
        (["--adapter", "base=RUN"], "adapter name 'base'"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--best_of", "4", "--rewards", "jpeg_compressibility"], "tiny-pickscore is not among the rewards"),
        (["--trained_rewards", "pickscore"], "trained_rewards names pickscore"),
        (["--images_per_prompt", "0"], "images_per_prompt is 0"),
        (["--adapter_scales", "-1"], "adapter_scales holds -1"),
        (["--seeds", "1", "1"], "each once"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--adapter", "a", "--adapter", "b"], "--adapter is given 2 times: give it once, with all its"),
        (["--batch-size", "1", "--batch_size=2"], "--batch_size is given 2 times: give it once"),
        (["--colour", "red"], "--colour"),
        (["--batch_size", "many"], "invalid int value"),
    ],
)
def test_what_cannot_work_is_one_line_before_a_model_loads(
    arguments, message, run_folder, parti_file, tmp_path, capsys, monkeypatch
):
    def no_model(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("es_trl.evaluation.api.load_pipeline", no_model)
    usual = {"--adapter": [str(run_folder[0])], "--prompts": [str(parti_file)], "--rewards": ["tiny-pickscore"]}
    given = [argument.replace("RUN", str(run_folder[0])) for argument in arguments]
    for name, values in usual.items():
        given += [] if name in given else [name, *values]
    assert main(["eval", *given, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("es-trl eval: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_adapters_get_labels(run_folder, tmp_path):
    folder = str(run_folder[0])
    assert [(a.label, a.method) for a in find_adapters(folder)] == [("adapter", "adapter")]
    other = tmp_path / "seed1"
    other.mkdir()
    shutil.copy(run_folder[0] / LORA_WEIGHTS_NAME, other)
    with pytest.raises(ValueError, match="the same file"):
        find_adapters({"es": [folder, str(other)]})
    (described,) = find_adapters([f"es={folder}"])
    assert (described.label, described.rank, described.trained_rewards) == ("es", 8, {"tiny-pickscore": 1.0})
    assert described.target_modules == ["to_k", "to_out.0", "to_q", "to_v"]


def test_a_file_that_is_no_lora_is_refused(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        find_adapters(str(tmp_path))


def test_an_adapter_of_another_model_is_refused(run_folder, tmp_path):
    from tiny_pipelines import stable_diffusion

    pipe = stable_diffusion()
    shutil.copy(run_folder[0] / LORA_WEIGHTS_NAME, tmp_path)
    with pytest.raises(ValueError, match="does not fit StableDiffusionPipeline|changes nothing"):
        es_trl.evaluate(pipe, ["a cat"], "jpeg_compressibility", adapters=str(tmp_path))
    assert not pipe.unet.__dict__.get("peft_config"), "and the pipeline is as it was"


def test_the_seed_projects_metrics_are_four_names_in_a_recipe():
    config = yaml.safe_load((Path(__file__).parents[1] / "recipes/sana_sprint/eval.yaml").read_text())
    rewards = [f"{name}:tiny-clip-heldout" for name in config["rewards"]]  # its own checkpoints are not here
    result = es_trl.evaluate(
        "tiny-sana-sprint", "showcase", rewards, steps=config["steps"][:1], settings=CALL, max_prompts=2,
        images_per_prompt=2,
    )  # fmt: skip
    assert result.reward_names == config["rewards"] == ["clip_aesthetic", "clip_text", "no_artifacts", "pickscore"]
    assert [row.name for row in result.rows] == ["base@1"] and len(result.prompts) == 2
    assert 0 <= result.mean("base@1", "clip_aesthetic") <= 1 and "diversity" in result.judge_scores["base@1"]


@pytest.mark.parametrize("path", PARTI)
def test_partiprompts_are_all_there_with_their_groups(path):
    loaded = es_trl.load_prompts(str(path))
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    assert list(loaded["prompt"]) == [line[0].strip() for line in lines] and len(loaded) == 1632
    counts = {name: list(loaded[name]) for name in ("category", "challenge")}
    assert counts["category"].count("Animals") == 314 and len(set(counts["category"])) == 12
    assert counts["challenge"].count("Fine-grained Detail") == 312 and len(set(counts["challenge"])) == 11


def test_a_lost_partiprompt_is_said(parti_file, caplog):
    es_trl.load_prompts(str(parti_file))
    assert "PartiPrompts has 4 prompts here, the original has 1632" in caplog.text
