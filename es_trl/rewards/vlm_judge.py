"""A vision-language model as judge, over the chat interface that vLLM, SGLang, llama.cpp and others serve."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

from .calling import gather_or_cancel
from .endpoint import Endpoint, EndpointError
from .preferences import check_pairing, members_of_groups, pairs_within, share_won
from .remote import ON_FAILURE, png_base64


logger = logging.getLogger(__name__)

# Our own wording. {prompt} is replaced, nothing else in the text is special.
QUESTIONS = {
    "yes_no": 'Does this image show exactly what is asked for in the description "{prompt}"? Answer Yes or No.',
    "score": 'The description is "{prompt}". How well does this image follow it, and how good does it look? '
    "Answer with one whole number from 0 (bad) to 10 (perfect) and nothing else.",
    "pairwise": 'The description is "{prompt}". Which of the two images follows it better and looks better, the '
    "first or the second? Answer 1 or 2 and nothing else.",
}
MODES = tuple(QUESTIONS)
TOP_SCORE = 10
NUMBER = re.compile(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w.]*\d)")


class VlmJudge:
    """
    Ask a model that sees pictures, at temperature 0.

    | mode | question | score |
    |---|---|---|
    | `"yes_no"` | does the picture show the prompt? | `P(Yes) / (P(Yes) + P(No))` at the first token, in [0, 1] |
    | `"score"` | how good, 0 to 10? | the number / 10, in [0, 1]; None if the answer has no number from 0 to 10 |
    | `"pairwise"` | which of two, within the group? | share of comparisons won, in [0, 1]; see below |

    Every pair is asked twice, with the pictures swapped, and the mean counts, which takes out a preference for one
    position. An answer is `P(1) / (P(1) + P(2))` where the server gives log-probabilities, else 1 or 0; anything
    unclear is a tie. Groups must be whole, so this mode needs a single process.

    Args:
        model (`str`): the model's name at the server.
        url (`str`): base of the interface, as in `https://host/v1`; `/chat/completions` is added. See `Endpoint`.
        mode (`str`, *optional*, defaults to `"yes_no"`): see the table.
        question (`str`, *optional*): another wording, with `{prompt}` in it.
        pairing (`str`, *optional*, defaults to `"neighbours"`): who meets whom, see `es_trl.rewards.preferences`.
        on_failure (`str`, *optional*, defaults to `"raise"`): as in `Remote`; a failed comparison is skipped.
        token_env (`str`, *optional*, defaults to `"ES_TRL_VLM_TOKEN"`): environment variable with the API key.
        options: `timeout`, `retries`, `retry_budget`, `max_reply_bytes`, `concurrency`, `allow_http` of
            `Endpoint`.

    Raises:
        `ValueError`: a setting that cannot work.
        `EndpointError`: when called, with `on_failure="raise"`.
    """

    rises_with_steps = True

    def __init__(
        self,
        model: str,
        url: str,
        mode: str = "yes_no",
        question: str | None = None,
        pairing: str = "neighbours",
        on_failure: str = "raise",
        token_env: str | None = "ES_TRL_VLM_TOKEN",
        **options,
    ):
        if mode not in MODES:
            raise ValueError(f"mode of the judge must be one of {', '.join(MODES)}, not {mode!r}")
        if question is not None and "{prompt}" not in question:
            raise ValueError("question of the judge must hold {prompt}, where the prompt goes")
        if on_failure not in ON_FAILURE:
            raise ValueError(f"on_failure of the judge must be one of {', '.join(ON_FAILURE)}, not {on_failure!r}")
        check_pairing(pairing)
        self.endpoint = Endpoint(f"{url.rstrip('/')}/chat/completions", token_env, **options)
        self.model, self.mode, self.pairing, self.on_failure = model, mode, pairing, on_failure
        self.question = question or QUESTIONS[mode]
        self.groupwise = mode == "pairwise"
        self.__name__ = "vlm_judge" if mode == "yes_no" else f"vlm_judge_{mode}"

    def __repr__(self) -> str:
        return f"VlmJudge({self.model}, {self.mode}, {self.endpoint})"

    async def __call__(self, prompts, images, groups=None, **kwargs) -> list[float | None]:
        pictures = [png_base64(image) for image in images]
        if self.mode != "pairwise":
            return await gather_or_cancel(self._rate(p, picture) for p, picture in zip(prompts, pictures, strict=True))
        pairs = [pair for group in members_of_groups(prompts, groups) for pair in pairs_within(group, self.pairing)]
        won = await gather_or_cancel(self._compare(prompts[i], pictures[i], pictures[j]) for i, j in pairs)
        return share_won(len(images), [(i, j, p) for (i, j), p in zip(pairs, won, strict=True)])

    async def _rate(self, prompt: str, picture: str) -> float | None:
        choice = await self._ask(prompt, [picture])
        if choice is None:
            return None
        if self.mode == "score":
            return rating(_text(choice))
        found = first_token_share(choice, "yes", "no")
        if found is None:
            logger.warning("%s: neither Yes nor No among the likely answers (%r)", self, _text(choice)[:60])
        return found

    async def _compare(self, prompt: str, a: str, b: str) -> float | None:
        """How far `a` beats `b`, in [0, 1], over both orders."""
        first, second = await gather_or_cancel(self._ask(prompt, pictures) for pictures in ([a, b], [b, a]))
        if first is None or second is None:
            return None
        return (_first_wins(first) + 1 - _first_wins(second)) / 2

    async def _ask(self, prompt: str, pictures: list[str]) -> dict | None:
        """The first choice of the reply; None where the request failed and failures are skipped."""
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}} for picture in pictures
        ]
        content.append({"type": "text", "text": self.question.replace("{prompt}", prompt)})
        question: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 8,
        }
        if self.mode != "score":
            question |= {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        try:
            return self._choice(await self.endpoint.ask(question))
        except EndpointError as error:
            if self.on_failure == "raise":
                raise
            logger.warning("%s: no score", error)
            return None

    def _choice(self, reply: Any) -> dict:
        try:
            choice = reply["choices"][0]
            answered = isinstance(choice["message"]["content"], str)
        except (KeyError, IndexError, TypeError):
            answered = False
        if not answered:
            raise EndpointError(f"{self.endpoint}: the reply has no choices[0].message.content: no chat interface?")
        if self.mode == "yes_no" and _likely(choice) is None:
            raise EndpointError(
                f"{self.endpoint}: the reply has no log-probabilities, which mode 'yes_no' needs: use mode 'score'"
            )
        return choice


def rating(text: str) -> float | None:
    """The first number of an answer, 0 to 10, as 0 to 1; None without one in that range."""
    match = NUMBER.search(text)
    value = float(match[0]) if match else math.inf
    return value / TOP_SCORE if value <= TOP_SCORE else None


def first_token_share(choice: dict, one: str, other: str) -> float | None:
    """`P(one) / (P(one) + P(other))` at the first token, over all spellings of the two; None if neither is likely."""
    mass = {one: 0.0, other: 0.0}
    for token, probability in _likely(choice) or ():
        word = token.strip(" \n\t.,:;!\"'*\u2581\u0120").lower()
        if word in mass:
            mass[word] += probability
    total = sum(mass.values())
    return mass[one] / total if total > 0 else None


def _likely(choice: dict) -> list[tuple[str, float]] | None:
    """Tokens and probabilities at the first position, or None where the server gives none."""
    try:
        entries = choice["logprobs"]["content"][0]["top_logprobs"]
        return [(str(entry["token"]), math.exp(min(float(entry["logprob"]), 0.0))) for entry in entries]
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _first_wins(choice: dict) -> float:
    share = first_token_share(choice, "1", "2")
    return {"1": 1.0, "2": 0.0}.get(_text(choice).strip()[:1], 0.5) if share is None else share


def _text(choice: dict) -> str:
    return choice["message"]["content"]
