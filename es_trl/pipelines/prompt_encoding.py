"""Prompts to the rows of a pipeline call: each prompt is encoded once, so that the text encoder can be released."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch

from .call_settings import CallSettings
from .prompt_rows import RowSplit, Unsplittable
from .replaced import replaced
from .watching import device_of


ENCODED_AT_ONCE = 4  # prompts per pass of a text encoder on a GPU: more take memory that small cards do not have
# A short text and a long one: whether encoding them together is encoding them alone shows how they may be stored.
PROBES = ("a cat", "a very long line of words about two red houses, a green tree and a small blue boat on a lake")


class _Encoded(Exception):
    """The pipeline has encoded its prompts and is about to denoise."""


class PromptEncoder:
    """
    Stands in for the pipeline's own `encode_prompt` while it is called, and asks it once per text.

    Nothing of a class is written down here: prompts go into the call as text, and which axis of what `encode_prompt`
    returns belongs to the prompts shows when two texts are encoded, and three. Where a text's encoding
    depends on the length of what is encoded with it, such prompts have calls of their own.

    Args:
        pipe, denoiser, settings: As in [`Drawer`]; the text encoders are used until `release`.

    Attributes:
        mixed (`bool`): Whether a call had texts that are encoded otherwise together than alone.
        whole_reason (`str`): Why prompts cannot be encoded ahead of the call; empty if they can.
    """

    batch_size = 16  # prompts per pass of a text encoder on a CPU

    def __init__(self, pipe: Any, denoiser: torch.nn.Module, settings: CallSettings) -> None:
        self.pipe, self.denoiser, self.settings = pipe, denoiser, settings
        self.released, self._serving, self.mixed = False, False, False
        self.whole_reason = "" if hasattr(pipe, "encode_prompt") else "it has no encode_prompt"
        self._splits: dict[str, RowSplit | None] = {}
        self._cache: dict[tuple[Any, ...], Any] = {}

    def rows(self, prompts: Sequence[str] | str) -> dict[str, Any]:
        """Call keywords for `prompts`, one row each, in order; or for a text, which stands for itself."""
        prompt = prompts if isinstance(prompts, str) else list(prompts)
        return {"prompt": prompt} | self.settings.text_kwargs(self.pipe)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, the pipeline gets what was encoded before."""
        if not hasattr(self.pipe, "encode_prompt") or self._serving:
            yield
            return
        self._serving = True
        try:
            with replaced(self.pipe, encode_prompt=self.stand_in(self.pipe.encode_prompt)):
                yield
        finally:
            self._serving = False

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None, **overrides: Any
    ) -> None:
        """
        Encodes those of `prompts` that are not known, by calling the pipeline up to its denoiser.

        Args:
            prompts (`Sequence[str]`): Texts.
            columns (`Mapping`, *optional*): Their columns, of which negative prompts and pictures go into the call.
            **overrides: Of the settings: `guidance_scale`.
        """
        if self.whole_reason:
            return
        columns = self.settings.row_columns(self.pipe, columns or {})
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            kwargs = self.settings.call_kwargs(self.pipe, **overrides, rows=len(prompts[part]))
            kwargs |= {name: values[part] for name, values in columns.items()} | self.rows(prompts[part])
            self._call_up_to_denoiser(kwargs, len(prompts[part]))
            if self.whole_reason:
                return

    def release(self) -> None:
        """
        Frees the text encoders; only prompts encoded before can be drawn from here on. Tokenizers stay.

        Raises:
            `ValueError`: if this pipeline needs them for every call.
        """
        known = list(dict.fromkeys(dict(zip(key[1], key[2], strict=True)).get("prompt") for key in self._cache))
        known = [prompt for prompt in known if prompt is not None]
        if known and "guidance_scale" in self.settings.parameters(self.pipe):
            for guidance in (1.0, 5.0):  # an evaluation may guide although training does not
                self.encode(known, guidance_scale=guidance)
        parts = {name: part for name, part in self.pipe.components.items() if name.startswith("text_encoder")}
        for name in parts:
            setattr(self.pipe, name, None)
        self.released = True
        try:
            if self.whole_reason:
                raise RuntimeError(self.whole_reason)
            self.encode(known[:1])
        except Exception as error:
            self.released = False
            for name, part in parts.items():
                setattr(self.pipe, name, part)
            raise ValueError(
                f"release_text_encoder=True is not possible with {type(self.pipe).__name__}: it needs its text "
                f"encoder in every call ({error}). Set release_text_encoder=False."
            ) from error

    def _call_up_to_denoiser(self, kwargs: dict[str, Any], count: int) -> None:
        def stop(*_args: Any) -> NoReturn:
            raise _Encoded

        generators = [torch.Generator().manual_seed(0) for _ in range(count)]
        compiled = replaced(self.denoiser, _compiled_call_impl=None)  # it cannot be left so
        with suppress(_Encoded), self.denoiser.register_forward_pre_hook(stop), compiled, self.serving():
            self.pipe(**kwargs, generator=generators)

    # ---- in place of encode_prompt ----

    def stand_in(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`encode_prompt` that asks `original` only for what it has not been asked before."""
        signature = inspect.signature(original)

        @torch.no_grad()
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            values = _flat(signature.bind(*args, **kwargs).arguments, signature)
            texts = {name: value for name, value in values.items() if _is_text(name, value)}
            others = {name: value for name, value in values.items() if name not in texts}
            lengths = {len(value) for value in texts.values() if not isinstance(value, str)} or {1}
            if not texts or len(lengths) > 1 or not _is_plain(others):
                self.whole_reason = self.whole_reason or "its encode_prompt is given more than text"
                return original(*args, **kwargs)
            rows = {n: [v] * max(lengths) if isinstance(v, str) else list(v) for n, v in texts.items()}
            return self._serve(original, rows, others)

        return encode_prompt

    def _serve(self, original: Callable[..., Any], texts: dict[str, list[str]], others: dict[str, Any]) -> Any:
        names, settings = tuple(texts), repr(sorted((k, str(v)) for k, v in others.items()))
        split = self._split_of(original, texts, others, f"{names} {settings}")
        rows = list(zip(*texts.values(), strict=True))
        unique = list(dict.fromkeys(rows))
        if split is None:
            return original(**texts, **others)
        # Where an encoding depends on its company, each prompt is encoded alone, as it would be drawn alone.
        device = self._drawing_device(others)
        size = (self.batch_size if device.type == "cpu" else ENCODED_AT_ONCE) if split.separable else 1
        missing = [row for row in unique if (settings, names, row) not in self._cache]
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            parts = split.rows(self._encode(original, names, batch, others), len(batch))
            self._cache |= {(settings, names, row): part for row, part in zip(batch, parts, strict=True)}
        found = {row: self._cache[settings, names, row] for row in unique}
        if not split.separable and not split.same_lengths(found.values()):
            parts = split.rows(self._encode(original, names, unique, others), len(unique))
            found, self.mixed = dict(zip(unique, parts, strict=True)), True
        return split.join([found[row] for row in rows], device)

    def _drawing_device(self, others: dict[str, Any]) -> torch.device:
        """
        What the pipeline says itself, if it says it: every look-up goes through all modules of all parts, twice. Two
        of them were a quarter of a call of the shipped model.
        """
        own = others.get("device")
        return own if isinstance(own, torch.device) else self.pipe._execution_device

    def _encode(
        self,
        original: Callable[..., Any],
        names: Sequence[str],
        rows: Sequence[tuple[Any, ...]],
        others: dict[str, Any],
    ) -> Any:
        if self.released:
            raise RuntimeError(
                f"The text encoder was released, and {len(rows)} prompts were not encoded before, the first being "
                f"{rows[0][0][:80]!r}. Set release_text_encoder=False, or pass these prompts to the trainer as well."
            )
        texts = {name: [row[i] for row in rows] for i, name in enumerate(names)}
        return original(**texts, **others | self._own_device(original, others))

    def _own_device(self, original: Callable[..., Any], others: dict[str, Any]) -> dict[str, Any]:
        """Where the text encoders are, if that is not where the pipeline draws."""
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)}
        devices = {device_of(part) for name, part in parts.items() if name.startswith("text_encoder")}
        apart = len(devices) == 1 and devices != {self._drawing_device(others)}
        return {"device": devices.pop()} if apart and "device" in inspect.signature(original).parameters else {}

    def _split_of(
        self, original: Callable[..., Any], texts: dict[str, list[str]], others: dict[str, Any], key: str
    ) -> RowSplit | None:
        if key in self._splits:
            return self._splits[key]
        names = tuple(texts)

        def encode(rows: Sequence[tuple[Any, ...]]) -> Any:
            return self._encode(original, names, rows, others)

        probes = [tuple(v[0] if "negative" in name else text for name, v in texts.items()) for text in PROBES]
        try:
            split = RowSplit(encode(probes), encode([*probes, probes[0]]))
            split.check(encode, probes)
        except Unsplittable as error:
            split, self.whole_reason = None, str(error)
        if split is not None and not split.separable:
            self.whole_reason = "what it encodes depends on the length of the call's other prompts"
        self._splits[key] = split
        return split


def _flat(arguments: Mapping[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    """Arguments by name, those of `**kwargs` among them."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        kind = signature.parameters[name].kind
        flat |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return flat


def _is_text(name: str, value: Any) -> bool:
    texts = isinstance(value, list | tuple) and value and all(isinstance(text, str) for text in value)
    return "prompt" in name and (isinstance(value, str) or bool(texts))


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str | torch.device | torch.dtype)
