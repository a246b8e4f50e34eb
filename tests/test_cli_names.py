"""One line with the nearest name for what is not known; help that fits a screen; columns and signatures."""

import inspect
import json

import pytest

import es_trl
from es_trl import ESConfig, ESTrainer
from es_trl.cli import main
from es_trl.cli.options import SHOWN
from es_trl.data import load_prompts
from es_trl.trainer import METHODS, config_of, trainer_of


RUN = ["--model_name_or_path", "tiny-sana-sprint", "--reward_funcs", "jpeg_compressibility", "--dataset_name",
       "tiny-train", "--output_dir", "nowhere"]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "unknown command 'trian'. Did you mean 'es-trl train'?"),
        (["evl"], "Did you mean 'es-trl eval'?"),
        (["train"], "nothing says what to train: give --config FILE"),
        (["train", *RUN, "--popsize", "8"], "there is no option --popsize. Did you mean '--population_size'?"),
        (["train", *RUN, "--num-generations", "8"], "Did you mean '--population_size'?"),
        (["train", *RUN, "--max_step=8"], "there is no option --max_step. Did you mean '--max_steps'?"),
        (["train", *RUN, "--max_steps", "ten"], "invalid int value: 'ten'"),
        (["eval", "--promts", "x"], "there is no option --promts. Did you mean '--prompts'?"),
        (["train", *RUN, "--reward_funcs", "jpeg_compressibility,jpg_incompressibility"], "'jpeg_incompressibility'"),
        (["train", "--model_name_or_path", "tiny-sana-sprnt", *RUN[2:]], "no model 'tiny-sana-sprnt'. Did you mean"),
    ],
)
def test_what_is_not_known_is_one_line_with_the_nearest_name(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and error.count("\n") == 0 and error.startswith("es-trl")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda: ESConfig("x", num_generations=8), "ESConfig has no argument 'num_generations'. .*'population_size'"),
        (lambda: ESConfig("x", sigmas=1), "ESConfig has no argument 'sigmas'. Did you mean 'sigma'"),
        (lambda: ESTrainer("m", "r", processing_class=None), "no argument 'processing_class'. Leave it out"),
        (lambda: ESTrainer("m", rewards="r"), "ESTrainer has no argument 'rewards'. Did you mean 'reward_funcs'"),
        (lambda: es_trl.GRPOTrainer("m", "r", traindataset=[]), "GRPOTrainer has no .*'train_dataset'"),
    ],
)
def test_a_wrong_argument_names_the_nearest_one(wrong, expected):
    with pytest.raises(TypeError, match=expected):
        wrong()


@pytest.mark.parametrize("method", METHODS)
def test_the_signature_of_a_trainer_has_its_arguments(method):
    parameters = inspect.signature(trainer_of(method)).parameters
    assert list(parameters) == [
        "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "callbacks", "optimizers", "peft_config",
        "quantization_config",
    ]  # fmt: skip
    assert "output_dir" in inspect.signature(config_of(method)).parameters


@pytest.mark.parametrize("method", METHODS)
def test_help_fits_a_screen_or_two_and_help_all_has_everything(method, capsys):
    assert main(["train", "--help", "--method", method]) == 0
    short = capsys.readouterr().out.split("\n")
    assert main(["train", "--help-all", "--method", method]) == 0
    everything = capsys.readouterr().out
    assert len(short) <= 100 and max(map(len, short)) <= 119
    config_class = config_of(method)
    for name in config_class.__dataclass_fields__:
        if config_class.__dataclass_fields__[name].init:
            assert f"  --{name} " in everything or f"  --{name}\n" in everything
    for name in vars(config_class)["__annotations__"]:
        assert any(line.startswith(f"  --{name} ") for line in short), "a method's own settings are in the short help"


def test_the_short_help_names_only_what_there_is(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for names in SHOWN.values():
        for name in names:
            assert f"  --{name} " in text


def test_a_csv_with_another_column_names_the_options_that_exist(tmp_path, capsys):
    path = tmp_path / "prompts.csv"
    path.write_text("text,category\na red cat,animal\n")
    with pytest.raises(ValueError, match="dataset_prompt_column .eval_dataset_prompt_column, test_dataset_prompt"):
        load_prompts(str(path))
    assert main(["train", "--help-all"]) == 0
    known = capsys.readouterr().out
    assert all(f"--{name}_prompt_column " in known for name in ("dataset", "eval_dataset", "test_dataset"))


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs")])
@pytest.mark.parametrize("line", ["a cat{}animal", "a cat, two dogs{}animals"])
def test_a_csv_with_other_separators_is_named_as_such(mark, name, line, tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text(f"prompt{mark}category\n{line.format(mark)}\n")
    with pytest.raises(ValueError, match=f"has {name} between its columns, not commas"):
        load_prompts(str(path))


def test_reward_check_takes_columns(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "def score(images, weight, colour, **_):\n    return [w * len(c) for w, c in zip(weight, colour)]\n"
    )
    words = ["reward", "check", f"{file}:score", "--json", "--column", "weight=2.5", "--column", "colour=red"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["max"] == 7.5


def test_an_adapter_is_evaluated_on_a_column_of_another_name(tmp_path, capsys):
    path = tmp_path / "prompts.csv"
    path.write_text("text\n" + "".join(f"{n} red cats\n" for n in ("one", "two", "three")))
    words = ["eval", "--model", "tiny-sana-sprint", "--prompts", str(path), "--rewards", "jpeg_compressibility",
             "--prompt_column", "text", "--output_dir", str(tmp_path / "out"), "--steps", "1", "--use_cpu", "true",
             "--max_sequence_length", "16", "--save_images", "0"]  # fmt: skip
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["protocol"]["prompts"] == 3
    assert "| jpeg_compressibility" in shown and "| base, 1 step" in shown, "the table is printed"


@pytest.mark.parametrize(("name", "value"), [("", None), ("A=B", 1), ("A\0", "x"), ("A", "\0")])
def test_what_no_environment_variable_can_be_is_refused(name, value, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"env": {name: value}, "dataset_name": "tiny-train"}))
    assert main(["train", "--config", str(config)]) == 2
    assert f"env has {name!r}: {value!r}, which no environment variable can be" in capsys.readouterr().err
