"""A result belongs to the adapter that it judged: page, card and push show nothing of another one."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_runs import PROMPTS, redness, tiny_trainer

from es_trl.evaluation import first_look
from es_trl.hub import adapter_digest, drawn_with
from es_trl.hub.publishing import collect
from es_trl.report import write_report


CLAIM = "higher than the base model on"


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run with its comparison, saved."""
    folder = tmp_path_factory.mktemp("judged")
    trainer = tiny_trainer(folder, redness, max_steps=2)
    trainer.train()
    trainer.compare_with_base(PROMPTS * 2, num_pictures=2)
    trainer.save_model()
    return folder, trainer


def test_memory_file_table_and_pictures_name_one_adapter(judged):
    folder, trainer = judged
    digest = adapter_digest(folder)
    assert digest == trainer.adapter.lora_digest()
    assert json.loads((folder / "eval.json").read_text())["protocol"]["judged"] == {"adapter": digest}
    for name in ("before_after.jpg", "adapter-000.jpg", "adapter-001.jpg"):
        assert drawn_with(folder / "samples" / name, digest)
        assert not drawn_with(folder / "samples" / name, "0" * 64)


def test_the_cards_gallery_has_the_prompts_of_the_rule(judged):
    folder, trainer = judged
    pairs = first_look(json.loads((folder / "eval.json").read_text())["pictures"], 2)
    assert [pair["kind"] for pair in pairs] == ["best", "worst"]
    assert [prompt for prompt, _ in trainer.results.gallery] == [pair["prompt"] for pair in pairs]
    drawn, shown = Image.open(folder / pairs[1]["files"]["adapter@1"]), Image.open(folder / "samples/adapter-001.jpg")
    assert np.abs(np.asarray(shown.resize(drawn.size), float) - np.asarray(drawn, float)).mean() < 4


def test_what_belongs_to_the_adapter_is_shown_and_published(judged, tmp_path):
    folder, _ = judged
    assert CLAIM in write_report(folder).read_text()
    assert {"eval.json", "samples/before_after.jpg", "samples/adapter-000.jpg"} <= set(collect(folder, tmp_path))


def test_page_card_and_push_refuse_the_results_of_an_earlier_run(judged, tmp_path, caplog):
    folder = tmp_path / "used"
    shutil.copytree(judged[0], folder)
    trainer = tiny_trainer(folder, redness, max_steps=1, seed=5)
    trainer.train()
    trainer.save_model()
    if not (folder / "eval.json").exists():  # moved aside by the new run; put back what a careless hand could leave
        shutil.copyfile(judged[0] / "eval.json", folder / "eval.json")
        shutil.copytree(judged[0] / "samples", folder / "samples", dirs_exist_ok=True)
    page = write_report(folder).read_text()
    assert "judged another adapter" in page and CLAIM not in page and "data-rows" not in page
    card = (folder / "README.md").read_text()
    assert "Nothing was measured" in card and "before_after.jpg" not in card and "model-index" not in card
    published = collect(folder, tmp_path / "clean")
    assert "pytorch_lora_weights.safetensors" in published
    assert not [name for name in published if name == "eval.json" or "adapter-" in name or "before" in name]
    assert "belongs to another adapter" in caplog.text


def test_a_card_written_after_more_training_says_nothing_was_measured(judged, tmp_path):
    trainer = tiny_trainer(tmp_path, redness, max_steps=1)
    trainer.train()
    trainer.compare_with_base(PROMPTS, num_pictures=2)
    for value in trainer.adapter.theta.values():
        value.data.add_(0.01)
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "Nothing was measured" in card and "before_after.jpg" not in card and "<Gallery />" not in card


def test_a_picture_without_a_stamp_is_nobodys(judged, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    digest = adapter_digest(judged[0])
    assert not drawn_with(tmp_path / "plain.jpg", digest) and not drawn_with(tmp_path / "broken.jpg", digest)
    assert adapter_digest(tmp_path) is None


def test_typical_prompts_are_drawn_at_several_strengths_and_one_is_the_adapter_as_trained(judged):
    folder, trainer = judged
    table = json.loads((folder / "eval.json").read_text())
    entry = table["strengths"]
    assert list(entry["files"]) == ["0", "0.25", "0.5", "0.75", "1", "1.25", "1.5"] and 1 <= len(entry["prompts"]) <= 4
    sheets = {name: np.asarray(Image.open(folder / path)).astype(int) for name, path in entry["files"].items()}
    first = [pair for pair in table["pictures"] if pair["reward"] == table["pictures"][0]["reward"]]
    chosen = [pair for pair in first if pair["kind"] == "typical"][:4]
    assert [pair["prompt"] for pair in chosen] == entry["prompts"]
    for strength, row in (("0", "base@1"), ("1", "adapter@1")):
        for i, pair in enumerate(chosen):
            picture = np.asarray(Image.open(folder / pair["files"][row])).astype(int)
            tile = sheets[strength][:, i * picture.shape[1] : (i + 1) * picture.shape[1]]
            assert np.abs(tile - picture).mean() < 3, "the same picture, but for JPEG"
    page = write_report(folder).read_text()
    assert "LoRA strength" in page and page.count("Sample pictures at strength") == 7
    assert trainer.results.comparison["strengths"] == entry
