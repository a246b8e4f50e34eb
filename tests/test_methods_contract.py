"""What every method owes its user, in one table: a new method is one row."""

import dataclasses
import json
import math
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from diffusers import SanaSprintPipeline
from forks import fork_beside
from tiny_policies import tiny_policy
from tiny_runs import brightness, redness, same, theta_of
from transformers import TrainingArguments

from es_trl import assets
from es_trl.es import make_generator
from es_trl.trainer import METHODS as KNOWN
from es_trl.trainer import PolicyGradientTrainer, config_of


@dataclass
class Method:
    """A row: the method's name, the settings of a tiny run, and how many images that run draws per step."""

    name: str
    options: dict = field(default_factory=dict)
    images_per_step: int = 6


METHODS = [
    Method("grpo", {"num_iterations": 2, "beta": 0.01}),
    Method("ddpo", {"per_prompt_stat_tracking_min_count": 3}),
    Method("pref_grpo", {"pairwise_judge": "tiny-pickscore"}),
    Method("dpo", {"num_iterations": 2, "noise_draws": 1}),
]
METRICS = {
    "loss", "grad_norm", "learning_rate", "epoch", "step", "reward", "reward_std", "frac_reward_zero_std",
    "rewards/redness/mean", "rewards/redness/std", "rewards/brightness/mean", "rewards/brightness/std", "step_time",
    "images_per_second", "num_images", "memory/peak_gb",
}  # fmt: skip
TRAINERS_OWN = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
DOCS = Path(__file__).parents[1] / "docs"
CLOCK = ("time", "runtime", "per_second", "memory", "_gb")
STEPS = 4


def build(method, output_dir, **options):
    run = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "reward_weights": [1.0, 0.1]}
    return tiny_policy(output_dir, method.name, [counted, brightness], **(run | method.options | options))


def counted(prompts, images, **_):
    counted.images += len(images)
    return redness(images)


counted.__name__, counted.images = "redness", 0


def history(trainer):
    """All that was logged, without what a clock or the machine measured."""
    entries = [{k: v for k, v in e.items() if not any(word in k for word in CLOCK)} for e in trainer.state.log_history]
    return [entry for entry in entries if "train_loss" not in entry]


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.name)
def run(request, tmp_path_factory):
    """A finished run of the method: (row, trainer, theta before, number of images that the reward was shown)."""
    counted.images = 0
    trainer = build(request.param, tmp_path_factory.mktemp(request.param.name))
    before = theta_of(trainer)
    trainer.train()
    trainer.save_model()
    return request.param, trainer, before, counted.images


def test_every_method_has_a_row():
    assert {method.name for method in METHODS} >= set(KNOWN) - {"es"}


def test_it_trains_the_adapter_and_nothing_else(run):
    _, trainer, before, _ = run
    stock = SanaSprintPipeline.from_pretrained(assets.resolve("tiny-sana-sprint"), dtype=torch.float32)
    frozen = dict(stock.transformer.named_parameters())
    for name, parameter in trainer.adapter.denoiser.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")]), name
    for name, value in theta_of(trainer).items():
        assert value.dtype == torch.float32 and torch.isfinite(value).all()
        assert not torch.equal(value, before[name]), name


def test_its_budget_is_counted_in_images(run):
    method, trainer, _, shown = run
    assert trainer.images_drawn == STEPS * method.images_per_step == shown


def test_it_logs_the_agreed_metrics(run):
    method, trainer, _, _ = run
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    for entry in entries:
        assert METRICS <= entry.keys(), METRICS - entry.keys()
        assert all(math.isfinite(entry[name]) for name in METRICS)
        assert entry["num_images"] == entry["step"] * method.images_per_step
        assert entry["reward"] == pytest.approx(entry["rewards/redness/mean"] + 0.1 * entry["rewards/brightness/mean"])
        assert entry["grad_norm"] > 0


def test_its_page_names_the_metrics_it_logs_and_no_other(run):
    method, trainer, _, _ = run
    logged = {name for entry in trainer.state.log_history if "reward" in entry for name in entry}
    logged = {re.sub("redness|brightness", "<name>", name) for name in logged} - TRAINERS_OWN
    pages = [method.name] + ["policy_gradient"] * isinstance(trainer, PolicyGradientTrainer)
    texts = [(DOCS / f"{page}.md").read_text().partition("## Logged metrics")[2] for page in pages]
    lines = [line for text in texts for line in text.partition("\n## ")[0].splitlines()]
    rows = [line.split("|")[1] for line in lines if line.startswith("| `")]
    assert {name for row in rows for name in re.findall("`([^`]+)`", row)} - TRAINERS_OWN == logged


def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path):
    """From the checkpoint of its second step, in the middle of an epoch."""
    method, whole, _, _ = run
    shutil.copytree(Path(whole.args.output_dir, "checkpoint-2"), tmp_path / "checkpoint-2")
    resumed = build(method, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.images_drawn == STEPS * method.images_per_step
    assert same(theta_of(resumed), theta_of(whole))
    assert history(resumed) == history(whole)


def test_its_lora_loads_in_a_stock_pipeline_and_draws_the_same(run, tmp_path):
    _, trainer, _, _ = run
    folder = Path(shutil.copytree(trainer.args.output_dir, tmp_path / "run"))
    call = {"num_inference_steps": 1, "intermediate_timesteps": None, "height": 32, "width": 32, "guidance_scale": 2.0,
            "use_resolution_binning": False, "max_sequence_length": 16, "output_type": "pt"}  # fmt: skip
    prompts = ["a red apple", "two blue cats"]
    trained = trainer.pipe(prompt=prompts, generator=[make_generator(0, "t", i) for i in range(2)], **call).images
    stock = SanaSprintPipeline.from_pretrained(assets.resolve("tiny-sana-sprint"), dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    untrained = stock(prompt=prompts, generator=[make_generator(0, "t", i) for i in range(2)], **call).images
    stock.load_lora_weights(str(folder), use_safetensors=True)
    drawn = stock(prompt=prompts, generator=[make_generator(0, "t", i) for i in range(2)], **call).images
    torch.testing.assert_close(drawn, trained, atol=1e-5, rtol=0)
    assert (trained - untrained).abs().max() > 1e-3


def test_its_settings_and_its_card_are_in_the_run_folder(run):
    method, trainer, _, _ = run
    folder = Path(trainer.args.output_dir)
    assert f'"method": "{method.name}"' in (folder / "es_config.json").read_text()
    assert "lora" in (folder / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_setting_of_its_own_has_help_and_a_line_in_the_docstring(method):
    config_class = config_of(method.name)
    documented = "\n".join(base.__doc__ or "" for base in config_class.__mro__)
    inherited = {setting.name for setting in dataclasses.fields(TrainingArguments)}
    for setting in dataclasses.fields(config_class):
        if setting.name not in inherited:
            assert setting.metadata.get("help"), setting.name
            assert f"\n        {setting.name} (" in documented or f"\n    {setting.name} (" in documented, setting.name


# ---- a new method ----

CONFIG = '''
"""RandomWalkConfig: the settings of a walk without a reward."""

from dataclasses import dataclass, field

from .config import DiffusionConfig


@dataclass
class RandomWalkConfig(DiffusionConfig):
    r"""
    Settings of [`RandomWalkTrainer`].

    Args:
        stride (`float`, *optional*, defaults to `0.01`):
            Standard deviation of a step of each entry of theta.
    """

    stride: float = field(default=0.01, metadata={"help": "Standard deviation of a step."})
'''

TRAINER = '''
"""RandomWalkTrainer: a method that does nothing with its rewards."""

import torch

from ..es import make_generator
from ..hub.methods import Method, Paper
from .base import DiffusionTrainer
from .random_walk_config import RandomWalkConfig


class RandomWalkTrainer(DiffusionTrainer):
    """Walks at random."""

    config_class = RandomWalkConfig
    method_name = "random_walk"
    about = Method(
        "Walk", "a random walk", ("random-walk",), (Paper("0000.00001", "On Walking", "me1900walking", 1900, "Me"),)
    )

    def training_step(self, model, inputs, num_items_in_batch=None):
        step = self.state.global_step
        prompts = [row["prompt"] for row in inputs]
        generators = [make_generator(self.args.seed, "latents", step, j) for j in range(len(prompts))]
        images = self.adapter.generate(prompts, generators)
        scores = self.rewards(prompts, images, where=f"step {step}")
        for number, parameter in enumerate(self.adapter.theta.values()):
            noise = torch.randn(parameter.shape, generator=make_generator(self.args.seed, "noise", step, number))
            parameter.grad = self.args.stride * noise.to(parameter)
        self.add_metric("reward", scores.mean())
        return torch.tensor(-scores.mean(), dtype=torch.float32)
'''


def test_a_new_method_is_two_files_and_a_line(tmp_path):
    """What CONTRIBUTING names and nothing else; command, resume, settings, card, citation and page then know it."""
    root = Path(__file__).parents[1]
    package = Path(shutil.copytree(root / "es_trl", tmp_path / "es_trl", ignore=shutil.ignore_patterns("__pycache__")))
    shutil.copy(root / "VERSION", tmp_path)
    row = next(line for line in (root / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| method |"))
    for named in (
        "`es_trl/trainer/NAME.py`",
        "`NAME_config.py`",
        "one line of `METHODS` in `es_trl/trainer/__init__.py`",
    ):
        assert named in row
    (package / "trainer" / "random_walk_config.py").write_text(CONFIG)
    (package / "trainer" / "random_walk.py").write_text(TRAINER)
    table = package / "trainer" / "__init__.py"
    line = '    "random_walk": ("random_walk_config:RandomWalkConfig", "random_walk:RandomWalkTrainer"),\n'
    table.write_text(table.read_text().replace("METHODS = {\n", "METHODS = {\n" + line, 1))
    (tmp_path / "config.yaml").write_text(
        "method: random_walk\nmodel_name_or_path: tiny-sana-sprint\nreward_funcs: [jpeg_compressibility]\n"
        "dataset_name: tiny-train\nmax_train_prompts: 8\nprompts_per_step: 2\nmax_steps: 2\nstride: 0.5\n"
        "max_sequence_length: 16\nsample_steps: 0\nuse_cpu: true\nreport_to: none\nsave_steps: 1\n"
        f"test_dataset_name: tiny-train\nmax_test_prompts: 2\noutput_dir: {tmp_path / 'run'}\n"
    )
    code = (
        "from es_trl.cli.commands import main; assert main(['train', '--config', 'config.yaml']) == 0\n"
        "from es_trl import trainer; print(trainer.RandomWalkTrainer.__name__, trainer.METHODS['random_walk'][0])"
    )
    output = tmp_path / "output.log"
    assert fork_beside(tmp_path, code, output) == 0, output.read_text()
    assert output.read_text().splitlines()[-1] == "RandomWalkTrainer random_walk_config:RandomWalkConfig"
    settings = json.loads((tmp_path / "run" / "es_config.json").read_text())
    assert (settings["method"], settings["config"]["stride"], settings["about"]["settings"]) == (
        "random_walk", 0.5, ["stride"],
    )  # fmt: skip
    card = (tmp_path / "run" / "README.md").read_text()
    assert "[a random walk](https://huggingface.co/papers/0000.00001)" in card and "@article{me1900walking," in card
    assert "| `stride` | 0.5 |" in card and "- random-walk" in card
    assert "Walk" in (tmp_path / "run" / "report" / "index.html").read_text()
