"""The scorers that ship, as the recipe uses them: unit embeddings of pictures and prompts."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import to_tensor
from transformers import CLIPModel, CLIPProcessor


class Scorer:
    """A CLIP folder: unit embeddings of pictures uint8 (n, 64, 64, 3) and of prompts."""

    def __init__(self, folder: Path) -> None:
        self.clip = CLIPModel.from_pretrained(folder).float().eval()
        self.tokenizer = CLIPProcessor.from_pretrained(folder).tokenizer

    @torch.no_grad()
    def pictures(self, pictures: np.ndarray) -> torch.Tensor:
        chunks = [to_tensor(pictures[i : i + 128]) for i in range(0, len(pictures), 128)]
        outputs = [self.clip.vision_model(pixel_values=chunk).pooler_output for chunk in chunks]
        return F.normalize(self.clip.visual_projection(torch.cat(outputs)), dim=-1)

    @torch.no_grad()
    def prompts(self, prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
        return F.normalize(self.clip.text_projection(self.clip.text_model(**tokens).pooler_output), dim=-1)
