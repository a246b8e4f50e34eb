"""What an image starts from: a function of the evaluation's seeds, its prompt's index and its own."""

from dataclasses import dataclass

import torch

from ..es.keys import make_generator


@dataclass(frozen=True)
class Noise:
    """
    The generators of an evaluation.

    Args:
        seeds (`tuple[int, ...]`): Each gives `images_per_seed` images of every prompt.
        images_per_seed (`int`, *optional*, defaults to 1): Images per prompt and seed.
    """

    seeds: tuple[int, ...]
    images_per_seed: int = 1

    @property
    def images_per_prompt(self) -> int:
        """J, the images of a prompt that count."""
        return len(self.seeds) * self.images_per_seed

    def generator(self, prompt: int, image: int) -> torch.Generator:
        """
        Of one image, by its indices; with one seed `image` is that of the key (seed, prompt, image). Images beyond
        `images_per_prompt` are further tries (best of N), in rounds of so many.
        """
        tries, place = divmod(image, self.images_per_prompt)
        seed, place = divmod(place, self.images_per_seed)
        return make_generator(self.seeds[seed], "evaluation", prompt, tries * self.images_per_seed + place)
