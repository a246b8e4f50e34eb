"""Prompts to the rows of a pipeline call: each prompt is encoded once, so that the text encoder can be released."""

import inspect
from collections.abc import Sequence

import torch

from .call_settings import CallSettings


# What `encode_prompt` of a pipeline class returns, in order, as keywords of `__call__`. Classes not listed get their
# prompts as text in every call.
ENCODED = {
    "SanaSprintPipeline": ("prompt_embeds", "prompt_attention_mask"),
    "SanaPipeline": (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    ),
}


class PromptEncoder:
    """
    Encodes prompts once and serves them as call keywords.

    Args:
        pipe (`DiffusionPipeline`): The pipeline; its text encoder is used until `release`.
        settings (`CallSettings`): Text length, instruction and negative prompt.
        batch_size (`int`, *optional*, defaults to `16`): Prompts per pass of the text encoder.
    """

    def __init__(self, pipe, settings: CallSettings, batch_size: int = 16):
        self.pipe, self.settings, self.batch_size = pipe, settings, batch_size
        self.names = next((ENCODED[c.__name__] for c in type(pipe).__mro__ if c.__name__ in ENCODED), None)
        self._cache: dict[str, dict[str, torch.Tensor]] = {}
        self._length: dict[str, int] = {}
        self.released = False

    @property
    def caches(self) -> bool:
        """Whether this pipeline's prompts can be encoded ahead of the call."""
        return self.names is not None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> None:
        """Fills the cache with those of `prompts` that it lacks."""
        if not self.caches:
            return
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        if missing and self.released:
            raise RuntimeError(
                f"The text encoder was released, and {len(missing)} prompts were not encoded before, the first being "
                f"{missing[0][:80]!r}. Set release_text_encoder=False, or pass these prompts to the trainer as well."
            )
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            encoded = self.pipe.encode_prompt(batch, **self._kwargs())
            for name, rows in zip(self.names, encoded, strict=True):
                self._length[name] = rows.shape[1]
                for prompt, row in zip(batch, rows, strict=True):
                    self._cache.setdefault(prompt, {})[name] = row.cpu()
            for prompt in batch:
                self._trim(self._cache[prompt])

    def rows(self, prompts: Sequence[str]) -> dict:
        """Call keywords for `prompts`, one row each, in order, on the pipeline's device."""
        if not self.caches:
            negative = self.settings.extra.get("negative_prompt")
            negatives = {"negative_prompt": [negative] * len(prompts)} if isinstance(negative, str) else {}
            return {"prompt": list(prompts)} | negatives | self.settings.text_kwargs(self.pipe)
        self.encode(prompts)
        device = self.pipe._execution_device
        unique = list(dict.fromkeys(prompts))
        index = torch.tensor([unique.index(prompt) for prompt in prompts])
        rows = {
            name: torch.stack([self._pad(self._cache[prompt][name], name) for prompt in unique])[index].to(device)
            for name in self.names
        }
        texts = ("prompt", "negative_prompt") if "negative_prompt_embeds" in rows else ("prompt",)
        return rows | dict.fromkeys(texts)

    def release(self) -> None:
        """Frees the text encoders; only cached prompts can be drawn from here on. Tokenizers stay."""
        if not self.caches:
            raise ValueError(
                f"release_text_encoder=True is not possible with {type(self.pipe).__name__}: es_trl passes its "
                "prompts as text in every call. Set release_text_encoder=False."
            )
        for name in [name for name in self.pipe.components if name.startswith("text_encoder")]:
            setattr(self.pipe, name, None)
        self.released = True

    def _kwargs(self) -> dict:
        call = inspect.signature(type(self.pipe).__call__).parameters
        accepted = inspect.signature(self.pipe.encode_prompt).parameters
        # encode_prompt's own defaults differ from the call's (no instruction): the call's are the protocol.
        kwargs = {
            name: call[name].default
            for name in ("max_sequence_length", "complex_human_instruction", "clean_caption")
            if name in call and name in accepted
        }
        kwargs |= self.settings.text_kwargs(self.pipe)
        kwargs |= {name: value for name, value in self.settings.extra.items() if name in accepted}
        if "do_classifier_free_guidance" in accepted:
            kwargs["do_classifier_free_guidance"] = True  # a single call may guide although training does not
        return kwargs

    @staticmethod
    def _trim(entry: dict[str, torch.Tensor]) -> None:
        """Padding is masked out of attention, so it is not stored: 300 tokens of Gemma are 1.4 MB a prompt."""
        for name in [name for name in entry if name.endswith("attention_mask")]:
            used = int(entry[name].nonzero().max()) + 1 if entry[name].any() else 1
            embeds = name.replace("attention_mask", "embeds")
            entry[name], entry[embeds] = entry[name][:used].clone(), entry[embeds][:used].clone()

    def _pad(self, row: torch.Tensor, name: str) -> torch.Tensor:
        padding = self._length[name] - row.shape[0]
        return torch.cat([row, row.new_zeros(padding, *row.shape[1:])]) if padding else row
