"""LAION's aesthetic predictor: a small head on CLIP image features (https://laion.ai/blog/laion-aesthetics)."""

from __future__ import annotations

import os

from .checkpoints import fill, find_file, read_tensors
from .clip_features import ClipReward


HEAD_FILES = ("aesthetic-model.safetensors", "sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth")
HIDDEN_SIZES = (1024, 128, 64, 16, 1)
LAYER_NAMES = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")  # between them the training had dropout


class Aesthetic(ClipReward):
    """
    `head(f)` with `f` the unit-norm image features of CLIP ViT-L/14 and the head five linear layers in a row,
    D -> 1024 -> 128 -> 64 -> 16 -> 1, without activations. Trained on ratings of 1 to 10: about 4 to 7 for pictures of
    models. It ignores the prompt.

    Args:
        checkpoint (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            A CLIP checkpoint. If it is a folder that also holds a head (`aesthetic-model.pth` or `.safetensors`), that
            head is used.
        device, dtype: see `ClipScorer`. The head is always float32.
        head (`str`, *optional*, defaults to `"trl-lib/ddpo-aesthetic-predictor"`):
            A folder or Hub id with `aesthetic-model.pth`, which is LAION's `sac+logos+ava1-l14-linearMSE.pth`.

    Raises:
        `ValueError`: a file is missing, is damaged, or belongs to another CLIP.
        `OSError`: the Hub cannot be reached and the files are not in the local cache.
    """

    default_checkpoint = "openai/clip-vit-large-patch14"
    default_head = "trl-lib/ddpo-aesthetic-predictor"
    __name__ = "aesthetic"

    def __init__(self, checkpoint: str | None = None, device="cpu", dtype=None, head: str | None = None):
        folder = os.path.expanduser(checkpoint or "")
        if head is None and any(os.path.isfile(os.path.join(folder, name)) for name in HEAD_FILES):
            head = folder
        path = find_file(
            head or self.default_head,
            HEAD_FILES,
            self.__name__,
            f"put it into a folder with {checkpoint or self.default_checkpoint}, 'aesthetic:path/to/that/folder'",
        )
        super().__init__(checkpoint, device, dtype)
        self.head = linear_head(self.scorer.model.config.projection_dim)
        fill(self.head, numbered(read_tensors(path, self.__name__)), path, self.__name__)
        self.head = self.head.to(self.scorer.device).eval().requires_grad_(False)

    def __call__(self, prompts, images, **kwargs) -> list[float]:
        return self.head(self.scorer.image_features(images))[:, 0].tolist()


def linear_head(width: int):
    """`width` -> 1024 -> 128 -> 64 -> 16 -> 1, linear throughout; ImageReward has the same."""
    import torch

    sizes = (width, *HIDDEN_SIZES)
    layers = [torch.nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    return torch.nn.Sequential(*layers)


def numbered(tensors: dict) -> dict:
    """The published names, `layers.6.weight`, as the names of a plain row of layers, `3.weight`."""
    numbers = {f"{name}.{kind}": f"{i}.{kind}" for i, name in enumerate(LAYER_NAMES) for kind in ("weight", "bias")}
    return {numbers.get(name, name): value for name, value in tensors.items()}
