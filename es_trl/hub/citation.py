"""Whom to cite for an adapter trained with evolution strategies."""

CITATION = """\
## Citation

The algorithm is EGGROLL ([paper](https://huggingface.co/papers/2511.16652)):

```bibtex
@article{sarkar2025eggroll,
  title   = {Evolution Strategies at the Hyperscale},
  author  = {Sarkar, Bidipta and Fellows, Mattie and Duque, Juan Agustin and others},
  journal = {arXiv preprint arXiv:2511.16652},
  year    = {2025}
}
```

The training code is es_trl:

```bibtex
@software{es_trl,
  title   = {es_trl: evolution strategies for text-to-image diffusion models},
  author  = {{The es_trl contributors}},
  year    = {2026},
  license = {Apache-2.0}
}
```"""
