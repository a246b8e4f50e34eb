"""Rewards written for TRL's former DDPOTrainer."""

import numpy as np
import pytest
import torch
from PIL import Image

from es_trl.rewards import RewardSet, from_ddpo


IMAGES = [Image.new("RGB", (8, 4), color) for color in ("red", "white", "black")]
PROMPTS = ["a", "b", "c"]


def test_tensor_reward_gets_images_prompts_and_metadata():
    seen = {}

    def redness(images, prompts, metadata):
        seen.update(images=images, prompts=prompts, metadata=metadata)
        return images[:, 0].mean(dim=(1, 2)), {"note": ["x", "y", "z"], "scalar": 3}

    extra = {}
    rewards = RewardSet(from_ddpo(redness))
    scores = rewards(PROMPTS, IMAGES, columns={"target": [4, 5, 6]}, log_extra=extra.__setitem__)
    assert rewards.names == ["redness"]
    assert scores[:, 0].tolist() == [1.0, 1.0, 0.0]
    assert seen["images"].shape == (3, 3, 4, 8) and seen["images"].dtype == torch.float32
    assert seen["images"][0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert seen["prompts"] == ("a", "b", "c")
    assert seen["metadata"] == ({"target": 4}, {"target": 5}, {"target": 6})
    assert extra == {"note": ["x", "y", "z"]}


def test_array_and_pil_formats():
    def array_mean(images, prompts, metadata):
        assert images.dtype == np.uint8 and images.shape == (3, 4, 8, 3) and metadata == ({}, {}, {})
        return images.mean(axis=(1, 2, 3)), {}

    assert RewardSet(from_ddpo(array_mean, "np"))(PROMPTS, IMAGES)[:, 0].tolist() == [85.0, 255.0, 0.0]

    def widths(images, prompts, metadata):
        return np.array([image.width for image in images]), {}

    mixed = [*IMAGES[:2], Image.new("RGB", (5, 5))]
    assert RewardSet(from_ddpo(widths, "pil"))(PROMPTS, mixed)[:, 0].tolist() == [8, 8, 5]
    with pytest.raises(RuntimeError, match="images of one size.*image_format='pil'"):
        RewardSet(from_ddpo(widths))(PROMPTS, mixed)
    with pytest.raises(ValueError, match="image_format"):
        from_ddpo(widths, "jpg")
