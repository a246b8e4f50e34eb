# /// script
# requires-python = ">=3.11"
# dependencies = ["es-trl"]
#
# [tool.hf-jobs]
# flavor = "a100-large"
# timeout = "6h"
# secrets = ["HF_TOKEN"]
# ///
"""Diffusion-DPO (online: best against worst) on Sana Sprint or Sana, or on a data set of pairs.

On a laptop, with the model that ships with es_trl:

    python recipes/dpo_sana.py --config recipes/tiny_sana_sprint/dpo/config.yaml

On GPUs, with Sana Sprint 1.6B (settings are commented in the file; any of them can be overridden here):

    accelerate launch recipes/dpo_sana.py --config recipes/sana_sprint/dpo/config.yaml --output_dir outputs/sana

With pairs of your own (columns prompt, chosen, rejected) instead of drawing them:

    python recipes/dpo_sana.py --config recipes/sana_sprint/dpo/config.yaml --online False --dataset_name my/pairs
"""

from es_trl import DiffusionDPOConfig, DiffusionDPOTrainer
from es_trl.cli import RunArguments, parse, prepare, run


def main(arguments: RunArguments, config: DiffusionDPOConfig) -> None:
    trainer = prepare(DiffusionDPOTrainer, arguments, config)  # loads prompts, model and rewards
    run(trainer, arguments)  # trains, compares the adapter with the base, saves it with its card, pushes


if __name__ == "__main__":
    main(*parse(DiffusionDPOConfig))
