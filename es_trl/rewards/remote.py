"""A reward computed by a server: pictures go out as JSON, one number per picture comes back."""

from __future__ import annotations

import base64
import io
import logging
import math
import numbers
from typing import TYPE_CHECKING, Any

from ..pictures import rgb
from .calling import gather_or_cancel
from .endpoint import Endpoint, EndpointError


if TYPE_CHECKING:
    from PIL import Image


logger = logging.getLogger(__name__)

ON_FAILURE = ("raise", "skip")


class Remote:
    """
    Ask a server for the scores.

    A request is `{"prompts": [...], "images": ["<PNG in base64>", ...], "columns": {name: [...]}}` (`columns` only if
    some were asked for), the reply `{"scores": [...]}` or just the list: one finite number or null per picture, in
    order. Several requests run at the same time, and while a run waits for them it draws the next pictures.

    Args:
        url (`str`): see `Endpoint`.
        batch_size (`int`, *optional*, defaults to `8`): pictures per request.
        columns (`tuple[str]`, *optional*): columns of the dataset that are sent along.
        on_failure (`str`, *optional*, defaults to `"raise"`):
            When a request has finally failed: `"raise"` stops the run, `"skip"` gives its pictures no score (their
            members sit out the step, and `max_invalid_fraction` bounds how many).
        token_env (`str`, *optional*, defaults to `"ES_TRL_REMOTE_TOKEN"`):
            Environment variable with the bearer token; the token itself is never part of the settings.
        options: `timeout`, `retries`, `retry_budget`, `max_reply_bytes`, `concurrency`, `allow_http` of
            `Endpoint`.

    Raises:
        `ValueError`: a setting that cannot work.
        `EndpointError`: when called, with `on_failure="raise"`.
    """

    __name__ = "remote"

    def __init__(
        self,
        url: str,
        batch_size: int = 8,
        columns: tuple[str, ...] = (),
        on_failure: str = "raise",
        token_env: str | None = "ES_TRL_REMOTE_TOKEN",
        **options,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size of the remote reward must be an integer of at least 1, not {batch_size!r}")
        if on_failure not in ON_FAILURE:
            raise ValueError(f"on_failure of the remote reward must be one of {', '.join(ON_FAILURE)}: {on_failure!r}")
        self.endpoint = Endpoint(url, token_env, **options)
        self.batch_size, self.columns, self.on_failure = batch_size, tuple(columns), on_failure

    def __repr__(self) -> str:
        return f"Remote({self.endpoint})"

    async def __call__(self, prompts, images, **columns) -> list[float | None]:
        missing = [name for name in self.columns if name not in columns]
        if missing:
            raise ValueError(f"the remote reward sends the column {missing[0]!r}, which the dataset does not have")
        chunks = [slice(start, start + self.batch_size) for start in range(0, len(images), self.batch_size)]
        answers = await gather_or_cancel(
            self._ask(prompts[c], images[c], {name: list(columns[name])[c] for name in self.columns}) for c in chunks
        )
        return [score for scores in answers for score in scores]

    async def _ask(self, prompts, images, columns: dict[str, list]) -> list[float | None]:
        question: dict[str, Any] = {"prompts": list(prompts), "images": [png_base64(image) for image in images]}
        if columns:
            question["columns"] = columns
        try:
            return check_scores(await self.endpoint.ask(question), len(images), self.endpoint)
        except EndpointError as error:
            if self.on_failure == "raise":
                raise
            logger.warning("%s: %d pictures get no score", error, len(images))
            return [None] * len(images)


def png_base64(image: Image.Image) -> str:
    """The pixels, unchanged, as PNG in base64."""
    buffer = io.BytesIO()
    rgb(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def check_scores(reply: Any, count: int, endpoint: Endpoint) -> list[float | None]:
    """The scores of a reply. Raises `EndpointError` unless they are `count` finite numbers or nulls."""
    scores = reply.get("scores") if isinstance(reply, dict) else reply
    if not isinstance(scores, list):
        raise EndpointError(f"{endpoint}: the reply must be a list or hold one under 'scores'")
    if len(scores) != count:
        raise EndpointError(f"{endpoint}: asked for {count} scores, got {len(scores)}")
    for index, score in enumerate(scores):
        if score is not None and not _finite(score):
            shown = endpoint.hide(repr(score))[:60]
            raise EndpointError(f"{endpoint}: score {index} is no finite number: {shown}")
    return [None if score is None else float(score) for score in scores]


def _finite(value) -> bool:
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False
