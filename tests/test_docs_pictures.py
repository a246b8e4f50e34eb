"""Pictures and recipe texts of the docs: what is drawn fits, and what is said follows from the numbers beside it."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from es_trl.cli import load_config
from es_trl.evaluation.grids import font


ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"


def boxes_and_texts():
    root = ElementTree.parse(ROOT / "docs/images/how_it_works.svg").getroot()
    boxes = [[float(r.get(k, 0)) for k in ("x", "y", "width", "height")] for r in root.iter(f"{SVG}rect")]
    return root, boxes, [(t, "".join(t.itertext())) for t in root.iter(f"{SVG}text")]


def test_every_word_of_how_it_works_fits_its_box():
    _, boxes, texts = boxes_and_texts()
    for element, text in texts:
        x, y, size = (float(element.get(name)) for name in ("x", "y", "font-size"))
        width = font(100, bold=element.get("font-weight") == "bold").getlength(text) * size / 100
        left = x - width / 2 if element.get("text-anchor") == "middle" else x
        inside = [b for b in boxes if b[0] <= x <= b[0] + b[2] and b[1] <= y <= b[1] + b[3]]
        box = min(inside, key=lambda b: b[2] * b[3])
        assert box[0] + 4 <= left and left + width <= box[0] + box[2] - 4, f"{text!r} leaves its box"
        assert box[1] + size <= y <= box[1] + box[3] - 4, f"{text!r} leaves its box"


def test_how_it_works_draws_what_the_recipes_do_and_has_a_dark_mode():
    root, _, texts = boxes_and_texts()
    _, config = load_config(ROOT / "recipes/tiny_sana_sprint/es/config.yaml")
    assert config.prompts_per_member == 1 and config.population().groups > 1 and not config.antithetic
    said = " ".join(text for _, text in texts)
    assert "group 0" in said and "group 1" in said and "\u2212" not in said, "groups of independent members"
    assert "prefers-color-scheme: dark" in root.find(f"{SVG}style").text


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes/sana_sprint").glob("*/config.yaml")), ids=lambda p: p.parent.name
)
def test_the_large_recipe_promises_nothing_that_it_cannot_show(path):
    text = path.read_text()
    assert "Frechet" not in text, "there are no statistics of real pictures for it"
    assert not re.search(r"\b(an hour|hours|minutes a|perhaps)\b", text), "no time without a card"


def test_members_at_1024_pixels_take_no_more_than_the_recipe_does():
    readme = (ROOT / "recipes/sana_sprint/README.md").read_text()
    small, large = map(float, re.search(r"512 px / 1024 px \| ([\d.]+) / ([\d.]+)", readme).groups())
    text = (ROOT / "recipes/sana_sprint/es/config.yaml").read_text()
    members = int(re.search(r"1024, members_per_forward: (\d+)", text).group(1))
    recipe = yaml.safe_load(text)["members_per_forward"]
    assert members == int(recipe * small / large) and f"it to {members}:" in readme
    assert "`es/pair_snr` is there with `antithetic: true` only" in readme and "downloads about" in readme
