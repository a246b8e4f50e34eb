"""The page of the Space: what stands behind it draws base and adapter from the same noise."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from es_trl.pipelines import CallSettings, PipelineAdapter, load_pipeline


APP = Path(__file__).parent.parent / "recipes" / "space" / "app.py"


@pytest.fixture(scope="module")
def space():
    spec = importlib.util.spec_from_file_location("space_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    adapter = PipelineAdapter(load_pipeline("tiny-sana-sprint"), settings=CallSettings(num_inference_steps=1))
    with torch.no_grad():
        for parameter in adapter.theta.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    adapter.save_lora(folder)
    config = {"num_inference_steps": 1, "guidance_scale": 2.0, "max_sequence_length": 16, "dtype": "load"}
    (folder / "es_config.json").write_text(json.dumps({"base_model": "tiny-sana-sprint", "config": config}))
    return folder


def test_the_slider_goes_from_the_base_to_the_adapter(space, run_folder):
    painter = space.Painter(str(run_folder))

    def pictures(scale, seed=0):
        return [np.asarray(image, np.int16) for image in painter.draw("a red apple", seed, scale)]

    base, off = pictures(0.0)
    assert base.shape == (384, 384, 3) and (base == off).all()
    base_again, full = pictures(1.0)
    assert (base == base_again).all(), "the base does not feel the slider"
    half = pictures(0.5)[1]
    assert 5 < np.abs(half - base).max() and np.abs(half - base).mean() < np.abs(full - base).mean()
    assert np.abs(pictures(1.0, seed=1)[0] - base).max() > 5


def test_an_adapter_without_settings_needs_its_base_named(space, run_folder, tmp_path):
    lora = "pytorch_lora_weights.safetensors"
    (tmp_path / lora).write_bytes((run_folder / lora).read_bytes())
    with pytest.raises(ValueError, match="BASE_MODEL"):
        space.Painter(str(tmp_path))
