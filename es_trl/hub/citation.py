"""What to cite for an adapter: the papers of its method, and the training code."""

PAPERS = {
    "es": [
        ("sarkar2025eggroll", "Evolution Strategies at the Hyperscale", "2511.16652", 2025,
         "Sarkar, Bidipta and Fellows, Mattie and Duque, Juan Agustin and others"),
    ],
    "ddpo": [
        ("black2023ddpo", "Training Diffusion Models with Reinforcement Learning", "2305.13301", 2023,
         "Black, Kevin and Janner, Michael and Du, Yilun and Kostrikov, Ilya and Levine, Sergey"),
    ],
    "grpo": [
        ("liu2025flowgrpo", "Flow-GRPO: Training Flow Matching Models via Online RL", "2505.05470", 2025,
         "Liu, Jie and others"),
        ("shao2024deepseekmath", "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
         "2402.03300", 2024, "Shao, Zhihong and others"),
    ],
    "pref_grpo": [
        ("wang2025prefgrpo",
         "Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image Reinforcement Learning",
         "2508.20751", 2025, "Wang, Yibin and others"),
    ],
    "dpo": [
        ("wallace2023diffusiondpo", "Diffusion Model Alignment Using Direct Preference Optimization", "2311.12908",
         2023, "Wallace, Bram and others"),
    ],
}  # fmt: skip

_CODE = """\
@software{es_trl,
  title   = {es_trl: evolution strategies for text-to-image diffusion models},
  author  = {{The es_trl contributors}},
  year    = {2026},
  license = {Apache-2.0}
}"""


def citation_section(method: str) -> str:
    """The section "Citation" of an adapter trained with `method`; an unknown one cites the code alone."""
    parts = ["## Citation"]
    papers = PAPERS.get(method, [])
    if papers:
        links = ", ".join(f"[{title}](https://huggingface.co/papers/{number})" for _, title, number, _, _ in papers)
        entries = "\n".join(_entry(*paper) for paper in papers)
        parts += [f"The method: {links}.", f"```bibtex\n{entries}\n```"]
    parts += ["The training code is es_trl:", f"```bibtex\n{_CODE}\n```"]
    return "\n\n".join(parts)


def _entry(key: str, title: str, number: str, year: int, authors: str) -> str:
    return (
        f"@article{{{key},\n  title   = {{{title}}},\n  author  = {{{authors}}},\n"
        f"  journal = {{arXiv preprint arXiv:{number}}},\n  year    = {{{year}}}\n}}"
    )
