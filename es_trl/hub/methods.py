"""What a card says of a method: its name, tags and papers, and the settings that make a run what it is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv, to link to and to cite."""

    id: str
    title: str
    key: str
    year: int
    authors: str

    @property
    def citation(self) -> str:
        """A BibTeX entry."""
        return (
            f"@article{{{self.key},\n  title   = {{{self.title}}},\n  author  = {{{self.authors}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.id}}},\n  year    = {{{self.year}}}\n}}"
        )


@dataclass(frozen=True)
class Method:
    """Facts about a method, for its card."""

    title: str
    tags: tuple[str, ...] = ()
    papers: tuple[Paper, ...] = ()
    settings: tuple[str, ...] = ()


# The settings of every method, in the order of the card. Everything else is in `es_config.json`.
SETTINGS = (
    "max_steps", "prompts_per_step", "images_per_prompt", "scale_rewards", "multi_objective_aggregation", "optim",
    "optim_args", "learning_rate", "lr_scheduler_type", "warmup_steps", "gradient_accumulation_steps", "max_grad_norm",
    "dtype", "seed",
)  # fmt: skip
_POLICY_SETTINGS = (
    "num_generations", "sample_num_steps", "intermediate_times", "output_noise", "noise_level", "init_same_noise",
    "num_iterations", "steps_per_generation", "epsilon", "epsilon_high", "advantage_clip", "sde_window_size", "beta",
    "loss_type", "per_prompt_stat_tracking", "win_rate_temperature", "weight_decay",
)  # fmt: skip

METHODS = {
    "es": Method(
        "evolution strategies (EGGROLL)",
        ("evolution-strategies", "eggroll"),
        (Paper("2511.16652", "Evolution Strategies at the Hyperscale", "sarkar2025eggroll", 2025,
               "Sarkar, Bidipta and Fellows, Mattie and Duque, Juan Agustin and others"),),
        ("population_size", "prompts_per_member", "antithetic", "sigma", "noise_rank", "noise_reuse",
         "fitness_shaping", "members_per_forward"),
    ),
    "ddpo": Method(
        "DDPO",
        ("ddpo", "reinforcement-learning"),
        (Paper("2305.13301", "Training Diffusion Models with Reinforcement Learning", "black2023ddpo", 2023,
               "Black, Kevin and Janner, Michael and Du, Yilun and Kostrikov, Ilya and Levine, Sergey"),),
        _POLICY_SETTINGS,
    ),
    "grpo": Method(
        "GRPO",
        ("grpo", "flow-grpo", "reinforcement-learning"),
        (Paper("2505.05470", "Flow-GRPO: Training Flow Matching Models via Online RL", "liu2025flowgrpo", 2025,
               "Liu, Jie and others"),
         Paper("2402.03300",
               "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
               "shao2024deepseekmath", 2024, "Shao, Zhihong and others")),
        _POLICY_SETTINGS,
    ),
    "pref_grpo": Method(
        "Pref-GRPO",
        ("pref-grpo", "grpo", "reinforcement-learning"),
        (Paper("2508.20751",
               "Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image Reinforcement Learning",
               "wang2025prefgrpo", 2025, "Wang, Yibin and others"),),
        _POLICY_SETTINGS,
    ),
    "dpo": Method(
        "Diffusion-DPO",
        ("diffusion-dpo", "dpo"),
        (Paper("2311.12908", "Diffusion Model Alignment Using Direct Preference Optimization",
               "wallace2023diffusiondpo", 2023, "Wallace, Bram and others"),),
        ("online", "num_generations", "draw_with", "beta", "loss_type", "noise_draws", "noise_level_sampling",
         "min_noise_level", "max_noise_level", "num_iterations"),
    ),
}  # fmt: skip
