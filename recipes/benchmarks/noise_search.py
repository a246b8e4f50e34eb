"""Search over the starting noise: what rewards can do for one picture without training anything.

Zeroth-order search (after arXiv 2605.11347 and 2501.09732; own code): from the picture's own noise `z`, in every round
draw `candidates` neighbours `sqrt(1 - change^2) z + change n` with fresh `n`, score their pictures, and go on from the
best seen. It costs as many reward calls and pictures as best-of-N with the same number, for every picture, for ever.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from es_trl.es import make_generator


def search_noise(
    adapter,
    prompts: Sequence[str],
    score: Callable[[Sequence[str], list], np.ndarray],
    calls: Sequence[int],
    seed: int,
    change: float = 0.7,
    candidates: int = 3,
) -> dict[int, list]:
    """
    Searches for one picture per prompt.

    Args:
        adapter ([`~es_trl.pipelines.PipelineAdapter`]): Of a pipeline whose call takes `latents`.
        prompts (`Sequence[str]`): P prompts.
        score (`Callable`): Prompts and pictures to `(P,)`; it is called with all prompts at once.
        calls (`Sequence[int]`): After how many reward calls per prompt the best pictures are kept, ascending.
        seed (`int`): Of all noise.
        change (`float`): Share of a neighbour that is new, in (0, 1]; .7 was best of .3, .5, .7, 1 after 16 calls.
        candidates (`int`): Neighbours in a round.

    Returns:
        `dict[int, list]`: P pictures by number of calls.
    """
    denoiser = adapter.denoiser.config
    shape = (len(prompts), denoiser.in_channels, denoiser.sample_size, denoiser.sample_size)
    generator = make_generator(seed, "noise_search")
    pivot = torch.randn(shape, generator=generator)
    pictures = _draw(adapter, prompts, pivot)
    best, kept, spent = np.asarray(score(prompts, pictures)), {}, 1
    while True:
        if spent in calls:
            kept[spent] = list(pictures)
        if spent >= max(calls):
            return kept
        start = pivot.clone()
        for _ in range(min(candidates, next(n for n in calls if n > spent) - spent)):
            latents = (1 - change**2) ** 0.5 * start + change * torch.randn(shape, generator=generator)
            drawn = _draw(adapter, prompts, latents)
            scores = np.asarray(score(prompts, drawn))
            for i in np.flatnonzero(scores > best):
                best[i], pivot[i], pictures[i] = scores[i], latents[i], drawn[i]
            spent += 1


@torch.no_grad()
def _draw(adapter, prompts: Sequence[str], latents: torch.Tensor) -> list:
    """The pictures of these latents, by the pipeline's own call."""
    pictures = []
    for first in range(0, len(prompts), 64):
        part = slice(first, first + 64)
        kwargs = adapter.call_kwargs(prompts[part])
        pictures += adapter.pipe(**kwargs, latents=latents[part], output_type="pil").images
    return pictures
