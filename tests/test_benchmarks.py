"""The benchmarks run, compare like with like, and report what they promise. Nothing here depends on speed."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "benchmarks"
SMALL = {"population_size": 4, "prompts": 2, "members_per_forward": 2}


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def throughput():
    sys.path.insert(0, str(FOLDER))  # as when the script is run
    yield load("throughput")
    sys.path.remove(str(FOLDER))


def test_report(throughput, capsys):
    """One JSON object on stdout, with every figure of the definitions."""
    sizes = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    command = ["--models", "tiny", "--spaces", "lora_xs", "--repeats", "1", "--steps", "2", "--threads", "1"]
    throughput.main([*command, *sizes, "--skip_memory"])
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["threads"] == 1 and len(report["machine"]["load_average_before"]) == 3
    (result,) = report["results"]
    assert {name: result[name] for name in SMALL} == SMALL
    for name in ("throughput_ratio", "speedup_over_one_by_one", "step_overhead"):
        values = result[name]
        assert 0 < values["min"] <= values["median"] <= values["max"] and math.isfinite(values["max"]), name
    assert result["step_overhead"]["max"] < 1
    assert set(result["images_per_second"]) == {"plain", "fused", "one_by_one"}


@pytest.mark.parametrize("space", ["lora", "lora_xs"])
def test_the_same_images_are_timed(throughput, space):
    """With sigma 0 the stock pipeline, the fused population and the members one by one draw the same pictures."""
    drawn = {}
    for name, draw in throughput.drawing_ways(throughput.Setting("tiny", space, **SMALL), sigma=0.0).items():
        drawn[name] = np.stack([np.asarray(image, np.int16) for image in draw()])
    assert len(drawn["plain"]) == SMALL["population_size"] * SMALL["prompts"]
    assert np.abs(drawn["plain"][0] - drawn["plain"][1]).max() > 10, "prompts and latents differ within a member"
    for name in ("fused", "one_by_one"):
        assert np.abs(drawn[name] - drawn["plain"]).max() <= 1, name


@pytest.mark.parametrize("what", ["inference", "training"])
def test_peak_memory(throughput, capsys, what):
    """The process that measures memory prints one number of megabytes."""
    setting = {"model": "tiny", "es_space": "lora_xs", **SMALL}
    throughput.main(["--peak_of", what, "--threads", "1", json.dumps(setting)])
    assert float(capsys.readouterr().out) > 50


def test_peak_memory_is_the_process_own():
    """Started by a process that needed more, and itself needing more for a moment."""
    held = np.ones(50_000_000)  # 400 MB
    code = "from peak_memory import peak_megabytes as peak; a = peak(); x = b'x' * 10**8; del x; print(a, peak())"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert before < held.nbytes / 1e6 / 4
    assert after - before == pytest.approx(100, rel=0.2)


def test_wide_model_is_wide(throughput):
    transformer = throughput.build_pipeline("wide", "float32").transformer
    assert transformer.config.num_attention_heads * transformer.config.attention_head_dim >= 1152
    assert transformer.config.sample_size**2 // transformer.config.patch_size**2 == 256


def test_random_sana_sprint_has_the_true_shape():
    """1.61 B and 312 M parameters, as published; on the meta device nothing is allocated."""
    builder = load("build_random_sana_sprint")
    with torch.device("meta"):
        transformer = builder.SanaTransformer2DModel(**builder.TRANSFORMER)
        autoencoder = builder.AutoencoderDC(**builder.AUTOENCODER)
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(1.61e9, rel=1e-3)
    assert sum(p.numel() for p in autoencoder.parameters()) == pytest.approx(312e6, rel=2e-3)
    assert transformer.config.cross_attention_head_dim * transformer.config.num_cross_attention_heads == 2240
    assert autoencoder.spatial_compression_ratio == 32


def test_the_table_of_rewards_compares_ours_with_the_formula(capsys):
    rows = load("reward_table").main(
        ["--only", "tiny-pickscore", "jpeg_compressibility", "vlm_judge", "human", "--rounds", "1"]
    )
    names = ["tiny-pickscore", "jpeg_compressibility", "jpeg_incompressibility", "remote", "vlm_judge", "human"]
    assert [row["reward"] for row in rows] == names
    assert all(row["difference"] < 1e-4 and np.ptp(row["reference"]) > 0.1 for row in rows)
    shown = [line.split(" | ")[0].strip("| `") for line in capsys.readouterr().out.splitlines()[2:8]]
    assert shown == names


def test_gradient_energy_is_unbiased_and_its_gradients_are_those_of_the_reward():
    benchmark = load("gradient_energy")
    mean = torch.tensor([2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    noise = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared, stirred = benchmark.energies(mean + noise)
    assert shared.tolist() == pytest.approx([4, 0, 0, 0], abs=0.1)
    assert stirred.tolist() == pytest.approx([5, 1, 1, 1], rel=0.05)

    adapter = benchmark.PipelineAdapter(
        benchmark.load_pipeline("tiny-sana-sprint"),
        benchmark.LoraConfig(r=2, lora_alpha=2, target_modules=["time_embed.linear"]),
        "lora_xs",
        benchmark.CallSettings(1, 2.0, max_sequence_length=16),
    )
    reward, (core,) = benchmark.ClipReward("tiny-pickscore"), adapter.theta.values()
    (row,) = benchmark.gradients(adapter, reward, ["a red apple"], seed=0)
    values = []
    for change in (1e-3, -1e-3):
        core.data[0, 1] += change
        generator = benchmark.make_generator(0, "gradient_energy", 0)
        pictures = adapter.generate(["a red apple"], [generator], output_type="pt")
        values.append(float(reward(pictures, "a red apple")))
        core.data[0, 1] -= change
    assert row[1] == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.05)
