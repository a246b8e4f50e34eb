"""The four metrics of the project that this one began with: aesthetic, text, no_artifacts, pickscore."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..rewards import parse_reward


NAME = "seed_metrics"
# Three CLIP ViT-B/32 similarities to fixed texts or to the prompt, proxies all of them, and PickScore.
SEED_METRICS = {
    "aesthetic": "clip_aesthetic",
    "text": "clip_text",
    "no_artifacts": "no_artifacts",
    "pickscore": "pickscore",
}


class RenamedReward:
    """
    A named reward under another name; its model is loaded when it is first needed.

    Args:
        name (`str`): Name in the tables.
        spec (`str`): What [`~es_trl.rewards.parse_reward`] understands.
        device (`str`): Where it runs.
    """

    def __init__(self, name: str, spec: str, device: str = "cpu"):
        self.__name__, self.spec, self.device = name, spec, device
        self._named, self._reward = parse_reward(spec), None

    def load(self):
        if self._reward is None:
            self._reward = self._named.build(self.device, None)
        return self._reward

    @property
    def scorer(self):
        """The CLIP model behind it."""
        return self.load().scorer

    def __call__(self, prompts, images, **kwargs) -> list[float]:
        return self.load()(prompts=prompts, images=images)


def expand_seed_metrics(rewards: Sequence[str | Callable], device: str = "cpu") -> list[str | Callable]:
    """
    Replaces `"seed_metrics"` by the four metrics, each with its published checkpoint.

    Args:
        rewards (`Sequence[str | Callable]`): Rewards as [`RewardSet`] takes them; `"seed_metrics:checkpoint"` computes
            all four with one CLIP checkpoint, which is another protocol.
        device (`str`, *optional*, defaults to `"cpu"`): Where they run.
    """
    expanded: list[str | Callable] = []
    for reward in rewards:
        name, colon, checkpoint = reward.partition(":") if isinstance(reward, str) else ("", "", "")
        if name == NAME:
            expanded += [RenamedReward(k, spec + colon + checkpoint, device) for k, spec in SEED_METRICS.items()]
        else:
            expanded.append(reward)
    return expanded
