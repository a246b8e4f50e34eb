"""The model card: data in, a card out that the Hub reads, whose snippet runs, and on which user text does nothing."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from es_trl.hub import base_license, environment, md_escape, model_card
from es_trl.hub.escaping import redact_all
from es_trl.pipelines import CallSettings, PipelineAdapter, load_pipeline
from es_trl.trainer import METHODS, ESTrainer, config_of, trainer_of


HOSTILE = [
    "../../etc/x",
    "x" * 5000,
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "a\n---\nlicense: mit\n---\n# Owned",
    "{{1234567*7654321}} {% for x in y %} ${1234567*7654321} <%= 1234567*7654321 %>",
    "a ``` b `c` | d | [click](javascript:alert(1)) ![x](http://x.example/p.png)",
    "bell \x07 null \x00 right-to-left \u202e \u2028 end",
    "'single' \"double\" \\ back: - yes, &amp; # not a comment",
    "https://user:secret@host.example/x and hf_ABCDEFGHIJKLMNOPQRSTUVWX",
]

INFO = {
    "pipeline": "SanaSprintPipeline", "num_inference_steps": 1, "guidance_scale": 2.0, "height": 64, "width": 64,
    "use_resolution_binning": False, "max_sequence_length": None, "complex_human_instruction": None,
    "es_space": "lora", "lora_rank": 8, "lora_alpha": 8, "lora_target_modules": ["to_k", "to_q"],
}  # fmt: skip

CONFIG = {
    "method": "es", "about": ESTrainer.about.to_dict() | {"settings": ["sigma"]},
    "base_model": "tiny-sana-sprint", "reward_funcs": ["clip_text", "mine"],
    "reward_weights": [1.0, 0.5], "train_prompts": 512,
    "config": {"max_steps": 64, "sigma": 0.1, "dtype": "float32", "hub_token": "hf_" + "a" * 30},
}  # fmt: skip


def make_evaluation(gain=0.1, retrieval=(-0.02, -0.05, 0.01)):
    def row(name, steps, adapter, mean):
        found = {"mean": mean, "std": 0.1, "ci_low": mean - 0.01, "ci_high": mean + 0.01, "prompts": 64, "missing": 0}
        judged = {"retrieval_accuracy": found, "frechet_distance": {"mean": 1.5, "ci_low": 1.4, "ci_high": 1.6}}
        rewards = {"clip_text": found, "held_out": found}
        return {
            "name": name, "num_inference_steps": steps, "adapter": adapter, "adapter_scale": 1.0, "rewards": rewards,
            "judge": judged,
        }  # fmt: skip

    def paired(model, against, reward, delta):
        return {
            "row": model, "against": against, "reward": reward, "delta": delta, "ci_low": delta - 0.02,
            "ci_high": delta + 0.02, "win_rate": 0.75, "win_rate_ci_low": 0.6, "win_rate_ci_high": 0.86,
            "prompts": 64, "missing": 0,
        }  # fmt: skip

    delta, low, high = retrieval
    return {
        "rows": [
            row("base@1", 1, False, 0.5),
            row("adapter@1", 1, True, 0.5 + gain),
            row("base@2", 2, False, 0.58),
        ],
        "paired": [paired("adapter@1", "base@1", reward, gain) for reward in ("clip_text", "held_out")]
        + [paired("base@2", "base@1", "clip_text", 0.08)],
        "paired_judge": [
            {"row": "adapter@1", "against": "base@1", "metric": "retrieval_accuracy", "delta": delta, "ci_low": low,
             "ci_high": high},
            {"row": "adapter@1", "against": "base@1", "metric": "frechet_distance", "delta": 0.3, "ci_low": 0.1,
             "ci_high": 0.5},
        ],
        "gap_closure": {"clip_text": 1.25, "held_out": None},
        "gap_closure_ci": {"clip_text": [1.0, 1.5], "held_out": [None, None]},
        "gap_closure_rows": {"model": "adapter@1", "base": "base@1", "target": "base@2"},
        "protocol": {
            "prompts": 64, "prompts_sha256": "ab" * 32, "images_per_prompt": 1, "seed": 7, "resamples": 10000,
            "pipeline": INFO,
        },
    }  # fmt: skip


def make_card(**changed):
    arguments = {
        "adapter_info": INFO, "config": CONFIG, "evaluation": make_evaluation(), "env": environment(),
        "samples": [("a red cat", "samples/000001.jpg")], "base_model": "tiny-sana-sprint",
        "dataset_name": "someone/prompts", "duration_seconds": 190.0, "num_images": 16384,
    }  # fmt: skip
    return model_card(**(arguments | changed))


def code_free(card):
    return re.sub(r"```.*?```", "", card.text, flags=re.DOTALL)


def test_front_matter_is_what_the_hub_reads():
    card = make_card(repo_id="someone/tiny-es", base_model="org/base", picture="samples/before_after.jpg")
    data = ModelCard(str(card)).data.to_dict()
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
    assert data["base_model"] == "org/base" and data["datasets"] == "someone/prompts"
    tags = {"text-to-image", "diffusers", "lora", "es_trl", "evolution-strategies", "eggroll", "template:sd-lora"}
    assert tags <= set(data["tags"])
    assert data["widget"] == [{"text": "a red cat", "output": {"url": "samples/000001.jpg"}}]
    assert "instance_prompt" not in data and "license" not in data
    (index,) = data["model-index"]
    assert index["name"] == "tiny-es"
    metrics = {entry["name"]: entry for entry in index["results"][0]["metrics"]}
    assert metrics["clip_text, adapter@1"]["value"] == pytest.approx(0.6)
    assert metrics["clip_text, adapter@1"]["args"]["ci_low"] == pytest.approx(0.59)
    assert index["results"][0]["dataset"]["args"]["seed"] == 7


def test_body_tells_gain_loss_protocol_and_settings():
    text = make_card().text
    assert "**clip_text** 0.5000 to 0.6000: +0.1000 [0.0800, 0.1200], better on 75.0 % of the prompts" in text
    assert "1.25 [1.00, 1.50] of the gain that base@2 brings" in text
    assert "clip_text (trained)" in text and "held_out (held out)" in text
    assert "The Frechet distance to real pictures x 100 got worse: +0.3000 [0.1000, 0.5000]." in text
    assert "retrieval accuracy got worse" not in text  # its interval holds zero
    assert "| `sigma` | 0.1 |" in text and "**clip_text** x 1, **mine** x 0.5" in text
    assert "16,384 images" in text and "3.2 min" in text
    assert "seed 7" in text and "2511.16652" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_named_cited_and_tagged(method):
    config_class, trainer = config_of(method), trainer_of(method)
    papers, fields = trainer.about.papers, config_class.__dataclass_fields__
    about = trainer.about.to_dict() | {"settings": config_class.own_settings()}
    settings = {"num_generations": 8, "population_size": 64, "beta": 0.5, "seed": 3, "max_steps": 64}
    settings = {name: value for name, value in settings.items() if name in fields}
    card = make_card(config=CONFIG | {"method": method, "about": json.loads(json.dumps(about)), "config": settings})
    assert card.text.count("@article{") == len(papers) > 0 and "@software{es_trl," in card.text
    assert all(f"huggingface.co/papers/{paper.id}" in card.text and paper.citation in card.text for paper in papers)
    assert "author  = {{The es_trl contributors}}" in card.text
    for name, value in settings.items():
        assert f"| `{name}` | {value} |" in card.text
    assert set(trainer.about.tags) <= set(card.data.tags)


def test_the_page_of_the_run_on_a_tracker_is_linked():
    url = "https://wandb.ai/me/project/runs/abc"
    text = make_card(tracker_urls={"Weights & Biases": url, "odd": "https://x.example/a) <b>"}).text
    assert f"Curves and pictures of the run: [Weights &amp; Biases]({url})." in text and "x.example" not in text


def test_a_branch_and_a_dtype_are_in_the_snippet():
    config = CONFIG | {"config": {"dtype": "bfloat16"}}
    text = make_card(repo_id="me/tiny", revision="v2", config=config, base_model="org/base").text
    assert 'from_pretrained("org/base", dtype=torch.bfloat16)' in text and "torch_dtype" not in text
    assert 'load_lora_weights("me/tiny", revision="v2", use_safetensors=True)' in text


def test_a_gain_that_is_not_one_is_said():
    text = make_card(evaluation=make_evaluation(gain=0.01, retrieval=(-0.1, -0.2, -0.05))).text
    assert "clip_text is not clearly above the base's" in text
    assert "The retrieval accuracy got worse: -0.1000 [-0.2000, -0.0500]." in text


def test_without_evaluation_the_card_says_so():
    card = make_card(evaluation=None, samples=())
    assert "Nothing was measured" in card.text and "<Gallery" not in card.text
    assert "model-index" not in card.data.to_dict() and "widget" not in card.data.to_dict()


def test_results_of_another_adapter_are_left_out_and_the_card_says_so():
    evaluation = make_evaluation()
    evaluation["protocol"]["judged"] = {"adapter": "1" * 64}
    own = make_card(evaluation=evaluation, digest="1" * 64, picture="samples/before_after.jpg")
    assert "sha256 `" + "1" * 16 + "`" in own.text and "**clip_text** 0.5000 to 0.6000" in own.text
    other = make_card(evaluation=evaluation, digest="2" * 64, picture="samples/before_after.jpg")
    assert "Nothing was measured with this adapter. There are results of another one" in other.text
    assert "0.6000" not in str(other) and "before_after" not in other.text and other.data.eval_results is None
    assert "widget" not in other.data.to_dict()


def test_sample_sheets_stand_in_for_a_comparison_that_was_not_made():
    sheets = [("Before training", "samples/step-000000.jpg"), ("After step 4", "samples/step-000004.jpg")]
    text = make_card(evaluation=None, samples=(), sheets=sheets).text
    assert text.index("![Before training](samples/step-000000.jpg)") < text.index("![After step 4]")
    assert "step-000000" not in make_card(sheets=sheets, picture="samples/before_after.jpg").text


def test_licence_comes_from_the_base_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: nvidia\nlicense_link: L.txt\n---\nhello\n")
    assert base_license(str(tmp_path)) == {"license": "other", "license_name": "nvidia", "license_link": "L.txt"}
    card = make_card(base_model=str(tmp_path))
    assert card.data.license == "other" and card.data.license_name == "nvidia"
    assert "names the licence **nvidia**" in card.text
    unknown = make_card(base_model="org/never-downloaded")
    assert unknown.data.license is None and "was not known when this card was written" in unknown.text
    assert make_card(base_model="org/never-downloaded", license="mit").data.license == "mit"


READABLE_CARDS = [
    ("---\nlicense: mit\n---\n# caf\xe9\n".encode("latin-1"), {"license": "mit"}),
    (b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
    (b"---\nlicense: [mit, apache-2.0]\n---\n", {"license": ["mit", "apache-2.0"]}),
    (b"---\nlicense: 2.0\nlicense_link: [a, b]\n---\n", {"license": "2.0"}),
]
UNREADABLE_CARDS = [
    b"---\nlicense: [mit\n---\n", b"---\n- license\n- mit\n---\n", b"---\nlicense: {a: b}\n---\n",
    b"---\nlicense: [[mit]]\n---\n", b"---\nlicense: true\n---\n", b"---\n---\n", b"---\nlicense: mit",
    b"---\nlicense: \x00\n---\n", b"---\na: &a [*a]\nlicense: !!python/name:os.system\n---\n",
    b"\x00\xff\xfe", b"", b"---\n" + b"[" * 5000 + b"\n---\n",
]  # fmt: skip


@pytest.mark.parametrize(("content", "licence"), READABLE_CARDS + [(content, {}) for content in UNREADABLE_CARDS])
def test_whatever_a_base_models_card_holds_there_is_a_card(tmp_path, content, licence):
    (tmp_path / "README.md").write_bytes(content)
    assert base_license(str(tmp_path)) == licence
    card = make_card(base_model=str(tmp_path))
    assert ModelCard(str(card)).data.license == card.data.license == licence.get("license")
    names = licence.get("license", [])
    names = ", ".join([names] if isinstance(names, str) else names)
    expected = f"names the licence **{names}**" if names else "was not known when this card was written"
    assert expected in card.text


def test_folders_of_this_machine_stay_private(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    card = str(make_card(base_model=str(tmp_path / "my-model"), dataset_name=str(tmp_path / "prompts.txt")))
    assert str(tmp_path) not in card
    assert "my-model" in card and "prompts.txt" in card


def card_about(text):
    """A card with `text` in every place that a user may write."""
    evaluation = make_evaluation()
    for row in evaluation["rows"]:
        row["rewards"][text] = row["rewards"].pop("held_out")
    evaluation["paired"][1]["reward"] = text
    evaluation["gap_closure"] = {"clip_text": 1.25, text: None}
    evaluation["gap_closure_ci"] = {"clip_text": [1.0, 1.5], text: [None, None]}
    config = CONFIG | {"reward_funcs": ["clip_text", text], "config": {"optim_args": text}}
    samples = [(text, "samples/000001.jpg")]
    return make_card(samples=samples, config=config, evaluation=evaluation, base_model=text, dataset_name=text)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_changes_nothing(text):
    """The card has the same front matter keys, headings, tables and markup as one about a harmless text."""
    card, harmless = card_about(text), card_about("a red cat")
    again = ModelCard(str(card))

    block = str(card).split("---\n")[1]
    assert list(yaml.safe_load(block)) == list(harmless.data.to_dict())
    assert again.data.to_dict() == card.data.to_dict()
    assert again.data.tags == harmless.data.tags and again.data.license is None
    (widget,) = again.data.widget
    assert len(widget["text"]) <= 300 and "\n" not in widget["text"]

    body = code_free(card).replace("<Gallery />", "")
    assert "<" not in body and "{{" not in body and "{%" not in body and "9449772114007" not in body
    assert "](javascript" not in body and "![x](" not in body and "onerror=alert(1)>" not in body
    assert body.count("```") == 0 and body.count("`") == code_free(harmless).count("`")
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert len(headings) == len([line for line in code_free(harmless).splitlines() if line.startswith("#")])
    assert not any(line.startswith("---") for line in body.splitlines())
    assert not any(ord(letter) < 32 and letter != "\n" for letter in str(card)) and "\u202e" not in body
    assert "secret" not in str(card) and "hf_ABC" not in str(card)
    for table in re.findall(r"(?:^\|.*\n)+", body, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_escaped_text_is_shown_as_it_was():
    import html

    for text in ["a red cat, 5-6 cats; it's 50% & more", "snake_case stays readable", "a|b `c` *d* _e_ #f {g}"]:
        assert html.unescape(md_escape(text)) == text
    assert md_escape("snake_case of base@1") == "snake_case of base@1"
    assert len(md_escape("word " * 500)) <= 300


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.png", "samples/../../x.png", "https://x.example/a.png"])
def test_pictures_stay_below_the_card(path):
    with pytest.raises(ValueError, match="relative path"):
        make_card(samples=[("a cat", path)])


def test_tokens_in_settings_do_not_appear():
    card = str(make_card(adapter_info=INFO | {"negative_prompt": "hf_" + "b" * 30}))
    assert "negative_prompt" in card and "a" * 30 not in card and "b" * 30 not in card


def test_settings_lose_secrets_wherever_they_stand():
    token = "hf_" + "c" * 30
    data = {"a": [{"hub_token": "abc", "note": f"use {token}"}], "url": "https://me:pass@x.example/", "max_tokens": 7}
    assert redact_all(data) == {
        "a": [{"hub_token": "***", "note": "use hf_***"}], "url": "https://***@x.example/", "max_tokens": 7,
    }  # fmt: skip


def test_snippet_draws_what_the_adapter_draws(tmp_path, monkeypatch):
    """The published lines, run as they are beside the published files, in plain diffusers."""
    settings = CallSettings(num_inference_steps=1, guidance_scale=2.0)
    adapter = PipelineAdapter(load_pipeline("tiny-sana-sprint"), settings=settings)
    with torch.no_grad():
        for parameter in adapter.theta.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    adapter.save_lora(tmp_path)
    card = model_card(
        adapter.describe(), CONFIG, samples=[("{{7*7}}", "a.jpg"), ("a green frog", "b.jpg")],
        base_model="tiny-sana-sprint",
    )  # fmt: skip
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert "use_safetensors=True" in code and "a green frog" in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    (expected,) = adapter.generate(["a green frog"], [torch.Generator("cpu").manual_seed(0)])
    with adapter.adapter_disabled():
        (base,) = adapter.generate(["a green frog"], [torch.Generator("cpu").manual_seed(0)])
    drawn, expected, base = (np.asarray(i, np.int16) for i in (Image.open("image.png"), expected, base))
    assert np.abs(drawn - expected).max() <= 1
    assert np.abs(drawn - base).max() > 10


def test_environment_names_versions_and_nobody():
    import getpass
    import socket
    from pathlib import Path

    found = environment()
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["cpu_cores"] >= 1 and found["threads"] == torch.get_num_threads()
    text = json.dumps(found)
    for private in (socket.gethostname(), str(Path.home()), str(Path.cwd())):
        assert private not in text
    assert f'"{getpass.getuser()}"' not in text
