"""What `train()` says at its end: what was gained on the evaluation prompts, and where everything lies."""

import math

from ..evaluation import EvaluationRow, paired_difference
from ..formatting import interval, number, percent


def closing_lines(trainer) -> list[str]:
    """Two lines; every process takes part, since the evaluation prompts are drawn once more where that is needed."""
    folder = trainer.args.output_dir
    where = f"All of it is in {folder}; save_model() writes the adapter and its card, es-trl report {folder} the page."
    if trainer.test_dataset is not None:  # the comparison on the test prompts follows
        return [f"All of it is in {folder}."]
    if trainer.eval_dataset is None:
        return ["Nothing was compared with the base: give eval_dataset, or call compare_with_base(prompts).", where]
    return [gain_line(trainer), where]


def gain_line(trainer) -> str:
    """The trained reward on the evaluation prompts, the adapter against the base from the same noise."""
    dataset = trainer.eval_dataset
    columns = {name: dataset[name] for name in dataset.column_names if name != "prompt"}
    with trainer.peers.together("the last look at the evaluation prompts"):
        now = trainer.results.last
        fresh = trainer.results.last_step == trainer.state.global_step and not trainer.args.load_best_model_at_end
        if not fresh or list(now.prompts) != list(dataset["prompt"]):
            now = trainer.results.evaluate(EvaluationRow("adapter"), dataset["prompt"], columns)
        base = trainer.results.base(dataset["prompt"], columns)
    after, before = now.total(now.scores["adapter"]), base.total(base.scores["base"])
    found = paired_difference(after, before)
    name = trainer.rewards.names[0] if len(trainer.rewards) == 1 else "the trained sum"
    text = f"On {found.prompts} evaluation prompts {name} went from {number(base.mean_total('base'))} to "
    text += f"{number(now.mean_total('adapter'))}: {number(found.delta, sign=True)}"
    if math.isnan(found.low):
        return f"{text}, on too few prompts for an interval."
    return f"{text}{interval(found.low, found.high)}, better on {percent(found.win_rate, 0)} of them."
