"""`--method`: one command for every method, and one sentence for a name or a key that is of another one."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from forks import fork_beside

from es_trl.cli import load_config, main, parse
from es_trl.cli.keys import config_keys
from es_trl.trainer import METHODS, ESConfig, config_of


ROOT = Path(__file__).resolve().parent.parent
FILE = """
model_name_or_path: tiny-sana-sprint
reward_funcs: [jpeg_compressibility]
dataset_name: tiny-train
max_train_prompts: 8
prompts_per_step: 2
max_steps: 1
max_sequence_length: 16
sample_steps: 0
use_cpu: true
report_to: none
"""


def config_file(folder: Path, lines: str = "") -> str:
    path = folder / "config.yaml"
    path.write_text(FILE + f"output_dir: {folder / 'run'}\n" + lines)
    return str(path)


@pytest.mark.parametrize("method", METHODS)
def test_method_of_the_file_or_of_the_command_line(method, tmp_path):
    for lines, options in ((f"method: {method}\n", ()), ("", ("--method", method)), ("", (f"--method={method}",))):
        arguments, config = load_config(config_file(tmp_path, lines), overrides=options)
        assert arguments.method == method
        assert type(config) is config_of(method)


def test_es_is_the_default_and_the_command_line_comes_first(tmp_path):
    assert load_config(config_file(tmp_path))[0].method == "es"
    assert load_config(config_file(tmp_path, "method: es\n"), overrides=("--method", "dpo"))[0].method == "dpo"
    arguments, config = parse(config_of("dpo"), ["--config", config_file(tmp_path)])
    assert (arguments.method, type(config).__name__) == ("dpo", "DiffusionDPOConfig"), "that of the recipe script"


def test_a_run_of_another_method(tmp_path):
    options = ["--method", "dpo", "--num_generations", "2", "--noise_draws", "1", "--save_strategy", "no"]
    assert main(["train", "--config", config_file(tmp_path), *options]) == 0
    ran = json.loads((tmp_path / "run" / "es_config.json").read_text())
    assert (ran["method"], ran["config"]["num_generations"]) == ("dpo", 2)
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("method: gprod\n", ["method", "gprod", "es, ", "dpo"]),
        ("method: dp\n", ["Did you mean 'dpo'?"]),
        ("method: [es, dpo]\n", ["method must be one of", "['es', 'dpo']"]),
        ("method: dpo\npopulation_size: 8\n", ["population_size", "belongs to method es", "this is dpo"]),
        ("beta: 3\n", ["beta", "dpo", "this is es"]),
        ("method: dpo\nnum_generation: 8\n", ["Did you mean 'num_generations'?"]),
        ("method: dpo\nnum_generations: 1\n", ["num_generations must be a whole number of at least 2"]),
    ],
)
def test_what_cannot_work_is_one_sentence(lines, words, tmp_path, capsys):
    assert main(["train", "--config", config_file(tmp_path, lines)]) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
    assert error.startswith("es-trl train: ") and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_no_text(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: \xff\xfe\n")
    for path in (tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ValueError, match="cannot be read as text"):
            load_config(str(path))


def test_a_recipe_script_refuses_the_file_of_another_method(tmp_path):
    with pytest.raises(ValueError, match="method is 'dpo', but this script trains 'es'.*recipes/dpo_sana.py"):
        parse(ESConfig, ["--config", config_file(tmp_path, "method: dpo\n")])


# ---- the recipes ----

# What makes a comparison fair: every method draws as many images of the same prompts, in the same way, for the same
# rewards. Where its LoRA sits and how large it is are its own business.
BUDGET = (
    "model_name_or_path", "dtype", "guidance_scale", "height", "width", "max_sequence_length", "num_inference_steps",
    "dataset_name", "max_train_prompts", "eval_dataset_name", "max_eval_prompts", "test_dataset_name",
    "test_images_per_prompt", "reward_funcs", "reward_weights", "eval_reward_funcs", "judge", "seed", "eval_seed",
    "eval_images_per_prompt", "release_text_encoder",
)  # fmt: skip


def recipes(model: str) -> dict[str, tuple]:
    return {method: load_config(ROOT / "recipes" / model / method / "config.yaml") for method in METHODS}


@pytest.mark.parametrize("model", ["sana_sprint", "tiny_sana_sprint"])
def test_recipes_share_one_budget(model):
    budgets = {}
    for method, (arguments, config) in recipes(model).items():
        assert arguments.method == method
        budget = {name: getattr(arguments, name, getattr(config, name, None)) for name in BUDGET}
        es = method == "es"
        per_step = (config.population_size if es else config.num_generations) * (
            config.images_per_member if es else config.prompts_per_step
        )
        budget["images"] = per_step * config.max_steps * config.gradient_accumulation_steps
        budgets[method] = budget
    differ = [
        f"{method}: {name} is {value!r}, es has {budgets['es'][name]!r}"
        for method, budget in budgets.items()
        for name, value in budget.items()
        if value != budgets["es"][name]
    ]
    assert differ == []


@pytest.mark.parametrize("model", ["sana_sprint", "tiny_sana_sprint"])
def test_recipes_write_to_folders_of_their_own(model):
    folders = [config.output_dir for _, config in recipes(model).values()]
    assert len(set(folders)) == len(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_recipe_script(method):
    """A script of a few lines that trains its method, and whose text names files that exist."""
    path = ROOT / "recipes" / f"{method}_sana.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    config, trainer = (name.partition(":")[2] for name in METHODS[method])
    imported = [name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert {config, trainer} <= set(imported)
    for word in ast.get_docstring(tree).split():
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file(), word
    files = [ROOT / "recipes" / model / method / "config.yaml" for model in ("sana_sprint", "tiny_sana_sprint")]
    assert all(yaml.safe_load(file.read_text()).get("method", "es") == method for file in files)


@pytest.mark.parametrize("method", METHODS)
def test_keys_are_known_without_an_import(method):
    assert config_keys(method) == {field.name for field in fields(config_of(method)) if field.init}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Did you mean 'es-trl train'?"),
        (["train", "--config", "typo.yaml"], "unknown key 'population_siez'. Did you mean 'population_size'?"),
        (["train", "--config", "broken.yaml"], "is not valid YAML"),
        (["train", "--config", "missing.yaml"], "There is no config file 'missing.yaml'"),
        (
            ["train", "--config", "good.yaml", "--popsize", "4"],
            "no option --popsize. Did you mean '--population_size'?",
        ),
        (["train", "--method", "gpro"], "Did you mean 'grpo'?"),
        (["dry-run", "--config", "typo.yaml"], "unknown key 'population_siez'. Did you mean 'population_size'?"),
        (["eval", "--adaptre", "runs/a"], "there is no option --adaptre. Did you mean '--adapter'?"),
        (["eval", "--config", "typo.yaml"], "unknown key 'population_siez'."),
        (["report", "--folow", "."], "unrecognized arguments: --folow"),
        (["compare", "a", "--output_dir", "b", "--x"], "unrecognized arguments: --x"),
        (["verify", "."], "there is no journal.jsonl in '.'"),
        (["show", ".", "--step", "1", "--member", "0"], "there is no journal.jsonl in '.'"),
    ],
)
def test_a_slip_is_answered_before_anything_heavy_is_imported(tmp_path, arguments, message):
    (tmp_path / "typo.yaml").write_text("population_siez: 4\n")
    (tmp_path / "good.yaml").write_text("population_size: 4\n")
    (tmp_path / "broken.yaml").write_text("population_size: [4\n")
    code = (
        "import sys; from es_trl.cli.commands import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"  # argparse leaves by itself
        "heavy = {'torch', 'transformers', 'diffusers', 'peft', 'trl', 'datasets', 'numpy'} & set(sys.modules)\n"
        "print(code, sorted(heavy))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert message in done.stderr and done.stdout == "2 []\n", done.stderr


# Of this project's dependencies, those that `transformers.training_args` does without, and the Trainer itself.
NOT_OF_TRAINING_ARGUMENTS = ("diffusers", "datasets", "matplotlib", "open_clip", "pandas", "pyarrow", "trl", "wandb",
                             "transformers.trainer")  # fmt: skip


def test_a_config_imports_no_more_than_the_settings_that_it_is_made_of(tmp_path):
    """ESConfig is a TrainingArguments, which brings torch; neither diffusers nor data sets come along."""
    code = f"""
import sys
gone = {NOT_OF_TRAINING_ARGUMENTS}
for name in list(sys.modules):
    if name in gone or name.partition(".")[0] in gone:
        del sys.modules[name]
before = set(sys.modules)
from es_trl import ESConfig
added = {{name.partition(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
rooms = {{f"es_trl.{{room}}" for room in ("data", "evaluation", "report", "pipelines.adapter")}}
print(sorted(added), sorted(rooms & set(sys.modules)))
"""
    assert fork_beside(ROOT, code, tmp_path / "output") == 0, (tmp_path / "output").read_text()
    assert (tmp_path / "output").read_text().endswith("['es_trl'] []\n"), (tmp_path / "output").read_text()


def test_columns_of_other_lists_and_the_port_of_the_live_page_are_settings(tmp_path):
    text = "eval_dataset_prompt_column: caption\ntest_dataset_prompt_column: text\nlive_port: 8123\n"
    arguments, _ = load_config(config_file(tmp_path, text))
    assert (arguments.eval_dataset_prompt_column, arguments.test_dataset_prompt_column) == ("caption", "text")
    assert arguments.live_port == 8123
