"""Image and text features of any CLIP checkpoint in transformers format, shared by all CLIP rewards."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

from es_trl import assets

from ..pictures import rgb
from .checkpoints import HUB_ID, why_unreachable


if TYPE_CHECKING:
    import torch
    from PIL import Image


logger = logging.getLogger(__name__)

# Checkpoints published without their own processor files, and where those are.
PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
MAX_CACHED_TEXTS = 50_000
DTYPES = ("float32", "bfloat16", "float16", "float64")

_scorers: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_image_memo: ContextVar[dict | None] = ContextVar("image_memo", default=None)


def get_scorer(
    checkpoint: str, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> ClipScorer:
    """The `ClipScorer` of these settings; rewards on the same checkpoint share one model while one of them lives."""
    key = (assets.resolve(checkpoint), str(device), as_torch_dtype(dtype))
    scorer = _scorers.get(key)
    if scorer is None:
        scorer = _scorers[key] = ClipScorer(checkpoint, device, dtype)
    return scorer


@contextlib.contextmanager
def share_image_features() -> Iterator[None]:
    """Inside, a scorer asked twice for the features of the same image objects computes them once; may be nested."""
    if _image_memo.get() is not None:
        yield
        return
    token = _image_memo.set({})
    try:
        yield
    finally:
        _image_memo.reset(token)


def memoised(owner: object, images: Sequence[Image.Image], compute: Callable):
    """`compute(images)`, once for the same `owner` and image objects inside [`share_image_features`]."""
    memo = _image_memo.get()
    if memo is None:
        return compute(images)
    key = (id(owner), tuple(id(image) for image in images))
    if key not in memo:
        memo[key] = (list(images), compute(images))  # holding the images keeps their ids from being given to others
    return memo[key][1]


class TwoTowers(ABC):
    """
    Unit-norm features of pictures and of texts, float32, and their cosines.

    Every text is computed once, and alone, so that its features never depend, not even in the last bit, on what else
    was asked for: resumed and multi-process runs stay identical.

    Args:
        device, dtype: Where and in what the model runs.
        batch_size (`int`): Images per forward pass.
    """

    def __init__(self, device: str | torch.device, dtype: str | torch.dtype | None, batch_size: int | None):
        import torch

        self.device, self.dtype = torch.device(device), as_torch_dtype(dtype)
        self.batch_size = batch_size or (16 if self.device.type == "cpu" else 64)
        self._texts: dict[str, torch.Tensor] = {}

    @abstractmethod
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """`(B, D)`, of any length and dtype."""

    @abstractmethod
    def encode_text(self, text: str) -> torch.Tensor:
        """`(1, D)`, of any length and dtype."""

    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features of `images`, shape (B, D), float32, unit norm, on `device`; B >= 1 images of any size and mode."""
        return memoised(self, images, self._image_features)

    def _image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        import torch

        starts = range(0, len(images), self.batch_size)
        with torch.no_grad():
            return torch.cat([_unit(self.encode_images(images[start : start + self.batch_size])) for start in starts])

    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """Features of `prompts`, shape (B, D), float32, unit norm, on `device`."""
        import torch

        rows = []
        with torch.no_grad():
            for text in prompts:
                row = self._texts.get(text)
                if row is None:
                    if len(self._texts) >= MAX_CACHED_TEXTS:
                        del self._texts[next(iter(self._texts))]
                    row = self._texts[text] = _unit(self.encode_text(text))[0]
                rows.append(row)
        return torch.stack(rows)

    def cosine(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        """Cosine of each prompt with its own image, shape (B,), float32, in [-1, 1]."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)

    def cosines(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        """Cosine of every image with every prompt, shape (B, P), float32, in [-1, 1]."""
        return self.image_features(images) @ self.text_features(prompts).T

    def mean_cosine(self, texts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        """Mean over `texts` of the cosine of each image with that text, shape (B,), float32, in [-1, 1]."""
        return (self.image_features(images) * self.text_features(texts).mean(dim=0)).sum(dim=-1)


class ClipScorer(TwoTowers):
    """
    Unit-norm image and text features of one CLIP checkpoint; texts longer than the model's context (77 tokens for the
    usual CLIP) are cut.

    Args:
        checkpoint (`str`):
            A shipped name (`"tiny-pickscore"`), a local folder, or a Hub id (`"openai/clip-vit-base-patch32"`). Only
            safetensors weights are read.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where the model runs.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `float32`):
            Weights and activations of the model. Features, norms and the logit scale are always float32.
        processor (`str`, *optional*):
            Folder or Hub id of the processor, if it is not the checkpoint's own. Known for PickScore_v1.
        batch_size (`int`, *optional*):
            Images per forward pass; by default 16 on a CPU (measured fastest: activations stay in the cache), else 64.

    Attributes:
        logit_scale (`float`): the factor on the cosine, already exponentiated (100 for OpenAI's CLIP).

    Raises:
        `ValueError`: the folder is missing, is not a CLIP checkpoint or lacks weights.
        `OSError`: a Hub id cannot be downloaded and is not in the local cache.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        *,
        processor: str | None = None,
        batch_size: int | None = None,
    ):
        super().__init__(device, dtype, batch_size)
        self.checkpoint = checkpoint
        model, self.processor = _load(checkpoint, processor or PROCESSORS.get(checkpoint, checkpoint))
        # Read before the cast: bfloat16 would turn the usual factor of 100 into 98.9.
        self.logit_scale = float(model.logit_scale.detach().double().exp())
        self.max_text_tokens = model.config.text_config.max_position_embeddings
        self.model = model.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pictures = [rgb(image) for image in images]
        pixels = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        output = self.model.get_image_features(pixel_values=pixels.to(device=self.device, dtype=self.dtype))
        return getattr(output, "pooler_output", output)  # transformers 5 wraps it in an output object, 4 does not

    def encode_text(self, text: str) -> torch.Tensor:
        tokens = self.processor.tokenizer(
            [text], truncation=True, max_length=self.max_text_tokens, return_tensors="pt"
        ).to(self.device)
        output = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return getattr(output, "pooler_output", output)


class ClipReward:
    """
    A reward built on a CLIP checkpoint.

    Args:
        checkpoint (`str`, *optional*): A CLIP checkpoint; by default the class's `default_checkpoint`.
        device, dtype: See `ClipScorer`.
    """

    default_checkpoint = "openai/clip-vit-base-patch32"
    rises_with_steps = True

    def __init__(self, checkpoint: str | None = None, device="cpu", dtype=None):
        self.scorer = get_scorer(checkpoint or self.default_checkpoint, device, dtype)


def as_torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """`None` -> float32; a torch dtype or its name -> that dtype. Raises `ValueError` for anything else."""
    import torch

    return getattr(torch, dtype_name(dtype))


def dtype_name(dtype: str | torch.dtype | None) -> str:
    """As [`as_torch_dtype`], but the name, without torch."""
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    return name


def _unit(features: torch.Tensor) -> torch.Tensor:
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


def _load(checkpoint: str, processor: str):
    """The model in float32 on the CPU and its processor, from a folder, the Hub or the Hub's local cache."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoProcessor, CLIPModel

    source, processor_source = (os.path.expanduser(assets.resolve(name)) for name in (checkpoint, processor))
    local = os.path.isdir(source)
    if not local and not HUB_ID.fullmatch(source):
        raise ValueError(f"CLIP checkpoint {checkpoint!r} is neither an existing folder nor a Hub id 'org/name'")
    unreachable = None if local else why_unreachable(source)
    options = {"local_files_only": local or unreachable is not None}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if config.model_type == "clip":
            model, info = CLIPModel.from_pretrained(
                source, config=config, use_safetensors=True, dtype="float32", output_loading_info=True, **options
            )
            loaded = AutoProcessor.from_pretrained(
                processor_source, local_files_only=os.path.isdir(processor_source) or unreachable is not None
            )
    except (OSError, ValueError, SafetensorError) as error:
        reason = unreachable or " ".join(str(error).split())
        if local:
            raise ValueError(
                f"CLIP folder {source!r} cannot be loaded: {reason} It needs config.json, model.safetensors, "
                "the tokenizer and preprocessor_config.json or processor_config.json"
            ) from error
        files = checkpoint if processor == checkpoint else f"{checkpoint}` and the processor files of `{processor}"
        raise OSError(
            f"CLIP checkpoint {checkpoint!r} cannot be loaded: {reason}, and it is not complete in the local cache. "
            f"Connect once, or copy the result of `hf download {files}` here and give that folder instead; "
            "for a private or gated model run `hf auth login` first"
        ) from error
    if config.model_type != "clip":
        raise ValueError(f"checkpoint {checkpoint!r} is a {config.model_type!r} model: give a CLIP checkpoint")
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"CLIP checkpoint {checkpoint!r} lacks {len(missing)} weights ({missing[0]}, ...): it would score noise"
        )
    if not hasattr(loaded, "image_processor") or not hasattr(loaded, "tokenizer"):
        raise ValueError(f"processor {processor!r} needs both an image processor and a tokenizer")
    logger.info("loaded CLIP checkpoint %s", checkpoint)
    return model, loaded
