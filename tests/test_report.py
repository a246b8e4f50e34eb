"""The report page: everything found is on it, nothing else acts in it, and a missing piece costs only itself."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image
from report_folders import HELD_OUT, PROMPTS, TRAINED, run_folder

from es_trl.cli import main
from es_trl.report import page as page_module
from es_trl.report import write_report
from es_trl.report.curves import TRAINING, VALIDATION, learning_curves, spent
from es_trl.report.folder import read_folder
from es_trl.report.headline import Claim, title
from es_trl.report.wording import number


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }} {% raw %} ${8*8}",
    "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621 \u202e reversed",
    "\U0001f408\u200d\u2b1b on the \U0001f319",
    "word " * 400,
    "]]> --> </style></script><b>",
]
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Elements with their attributes, the text outside of scripts, and whether every tag is closed."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split()).replace("\u00a0", " ")

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def opened(path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture
def without_png(monkeypatch):
    """Half of the time of a report; one test looks at the PNG files."""
    monkeypatch.setattr(page_module, "save_png", lambda draw, path: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = run_folder(tmp_path_factory.mktemp("report") / "run")
    return folder, write_report(folder)


def test_everything_that_was_found_is_on_the_page(finished):
    folder, path = finished
    page = opened(path)
    table = json.loads((folder / "eval.json").read_text())
    assert path == folder / "report" / "index.html"
    assert page.of("title") and "One step now outscores two" in page.text
    assert f"Judged by {HELD_OUT}, which training never saw" in page.text
    assert f"{100 * table['gap_closure'][HELD_OUT]:.0f} %" in page.text
    low, high = table["gap_closure_ci"][HELD_OUT]
    assert f"{100 * low:.0f} % to {100 * high:.0f} %" in page.text
    for entry in table["paired"]:
        assert number(entry["delta"], sign=True) in page.text
        assert f"{number(entry['ci_low'], True)} to {number(entry['ci_high'], True)}" in page.text
    for row in table["rows"]:
        for found in row["rewards"].values():
            assert number(found["mean"]) in page.text
    assert "Largest gains" in page.text and "Typical" in page.text and "Smallest gains" in page.text
    assert all(prompt in page.text for prompt in PROMPTS)
    assert "Food & Beverage" in page.text and "exploratory" in page.text
    assert "step 4" in page.text and "median" in page.text
    assert "es-trl train --config" in page.text and "sigma = 0.1" in page.text and "torch 2.14.1" in page.text
    assert len([1 for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]) == 2
    for name in ("learning_curve.png", "rewards.png"):
        with Image.open(path.parent / name) as image:
            assert min(image.size) > 200


def test_the_population_shows_the_prompts_of_its_group(finished):
    _, path = finished
    text = opened(path).text
    assert "step 4 a red cat; a red house" in text and "of one group, on the group's own prompts" in text


def test_worst_pairs_come_last_and_are_the_worst(finished):
    folder, path = finished
    pairs = json.loads((folder / "eval.json").read_text())["pictures"]
    captions = re.findall(r'<p class="prompt" dir="auto">(.*?)</p>', path.read_text(encoding="utf-8"))
    assert captions == [pair["prompt"] for pair in pairs]
    assert pairs[-1]["change"] == min(pair["change"] for pair in pairs)


def test_what_got_worse_is_called_a_loss(tmp_path, without_png):
    page = opened(write_report(run_folder(tmp_path / "run", gain=-1.0)))
    assert "Training made the scores worse" in page.text
    assert "Smallest losses" in page.text and "Largest losses" in page.text
    assert "smallest loss," in page.text and "largest loss," in page.text and "largest gain" not in page.text
    assert "Largest gains" not in page.text and "Smallest gains" not in page.text and "The gain is" not in page.text


def test_a_curve_stands_beside_a_level_of_its_own_prompts(tmp_path, without_png):
    """The base on the test prompts says nothing of a curve on others: where the run began, its start is the level."""
    folder = run_folder(tmp_path / "run")
    assert "base model on the test prompts" in opened(write_report(folder)).text
    state = json.loads((folder / "trainer_state.json").read_text())
    first = {f"eval_rewards/{name}/mean": -3.0 for name in (TRAINED, HELD_OUT)}
    state["log_history"].insert(0, {**first, "step": 0, "num_images": 0, "train_time": 0.0})
    (folder / "trainer_state.json").write_text(json.dumps(state))
    text = opened(write_report(folder)).text
    assert "before the first step, on the same prompts" in text and "base model on the test prompts" not in text


def test_a_slider_shows_the_base_on_the_left_and_the_adapter_on_the_right(finished):
    page = opened(finished[1])
    images = [a for a in page.of("img") if "data-row" in a]
    assert len(images) == 3 * len(PROMPTS)
    first = page.text.index("largest gain"), page.text.index("typical,"), page.text.index("smallest gain")
    assert first == tuple(sorted(first)) and "Chosen by rule" in page.text
    assert {a["class"] for a in images if a["data-row"] == "base@1"} == {"left"}
    assert {a["class"] for a in images if a["data-row"] == "adapter@1"} == {"right"}
    assert all(a["alt"] for a in page.of("img"))
    sliders = [a for a in page.of("input") if a["type"] == "range"]
    assert len(sliders) == len(PROMPTS) + 2, "one per pair, one for all, one for the film"
    assert all(a.get("aria-label") for a in sliders)
    shown = Image.open(io.BytesIO(base64.b64decode(images[0]["src"].split(",")[1])))
    assert shown.size == (16, 16)


def test_the_page_loads_nothing(finished):
    text = finished[1].read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            if attributes.get(name):
                assert re.match(r"data:|#", attributes[name]), (tag, name, attributes[name][:80])
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert {tag for tag, _ in page.tags} & {"iframe", "object", "embed", "base", "form"} == set()
    policy = next(a for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy["content"]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_texts_of_users_are_shown_and_do_nothing(tmp_path, without_png):
    folder = run_folder(tmp_path / "a<b>&'\"run", prompts=HOSTILE, note="</script><script>alert(2)</script>")
    evaluation = json.loads((folder / "eval.json").read_text())
    evaluation["exploratory"]["entries"][0]["value"] = HOSTILE[0]
    (folder / "eval.json").write_text(json.dumps(evaluation))
    for name in ("eval.json", "trainer_state.json", "es_config.json"):
        text = (folder / name).read_text().replace(TRAINED, "<script>alert(3)</script>$x_1$")
        (folder / name).write_text(text)
    page = opened(write_report(folder))
    assert len(page.of("script")) == 1 and len(page.of("style")) == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for prompt in HOSTILE:
        assert " ".join(prompt.split()) in page.text
    assert "49" not in page.text.split(HOSTILE[3])[0][-200:]
    alts = [a["alt"] for a in page.of("img") if "data-row" in a]
    assert any("<script>alert(1)</script>" in alt for alt in alts)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("eval.json", "There is no evaluation in this folder."),
        ("trainer_state.json", "there is no curve to draw"),
        ("images", "nothing to slide"),
        ("samples", "holds no pictures of a population"),
        ("scores.parquet", "Smallest gains"),
        ("env.json", "sigma = 0.1"),
        ("es_config.json", "Judged by"),
    ],
)
@pytest.mark.parametrize("damaged", [False, True])
def test_a_missing_or_damaged_piece_costs_only_itself(missing, sentence, damaged, tmp_path, without_png):
    folder = run_folder(tmp_path / "run")
    target = folder / missing
    if damaged and target.is_file():
        target.write_bytes(target.read_bytes()[:20] + b"\xff\x00{")
    elif damaged:
        for picture in target.rglob("*.jp*g"):
            picture.write_bytes(b"no picture")
    elif target.is_file():
        target.unlink()
    else:
        shutil.rmtree(target)
    page = opened(write_report(folder))
    assert sentence in page.text
    if missing not in ("eval.json", "es_config.json"):
        assert "One step now outscores two" in page.text


@pytest.mark.parametrize("part", ["rows", "paired", "gap_closure", "pictures", "exploratory", "protocol", "rewards"])
def test_a_part_of_another_shape_costs_only_itself(part, tmp_path, without_png):
    folder = run_folder(tmp_path / "run")
    evaluation = json.loads((folder / "eval.json").read_text())
    evaluation[part] = [{"name": 3}] if part == "rows" else ["?"]
    (folder / "eval.json").write_text(json.dumps(evaluation))
    page = opened(write_report(folder))
    assert "Learning curves" in page.text and "sigma = 0.1" in page.text


def test_an_empty_folder_has_a_page_and_no_folder_is_an_error(tmp_path):
    assert "A run without an evaluation" in opened(write_report(tmp_path)).text
    with pytest.raises(ValueError, match="is not a folder"):
        write_report(tmp_path / "nowhere")


def test_a_report_never_ends_a_run(finished, monkeypatch, caplog, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("no disk")

    monkeypatch.setattr(page_module, "render", broken)
    assert write_report(tmp_path) is None
    assert "could not be written" in caplog.text and "no disk" in caplog.text


def test_an_early_warning_stands_at_the_top(tmp_path, without_png):
    folder = run_folder(tmp_path / "run")
    assert "Early warning" not in opened(write_report(folder)).text
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"][-1]["eval_early_warning"] = 1.0
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert "Early warning at step 4: the trained reward rose" in opened(write_report(folder)).text


def test_a_run_that_was_killed_is_read_from_its_newest_checkpoint(tmp_path, without_png):
    folder = run_folder(tmp_path / "run")
    for step in (2, 10):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text('{"log_history": []}')
    for name in ("trainer_state.json", "es_config.json"):
        shutil.move(folder / name, folder / "checkpoint-10" / name)
    (folder / "eval.json").unlink()
    page = opened(write_report(folder))
    assert "sigma = 0.1" in page.text and "images drawn in training" in page.text
    assert "A run without an evaluation" in page.text


def test_the_same_folder_gives_the_same_bytes(finished):
    folder, path = finished
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    write_report(folder)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_pictures_outside_of_the_folder_stay_there(tmp_path, without_png):
    folder = run_folder(tmp_path / "run")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "secret.png")
    evaluation = json.loads((folder / "eval.json").read_text())
    for pair in evaluation["pictures"]:
        pair["files"] = dict.fromkeys(pair["files"], "../secret.png")
    (folder / "eval.json").write_text(json.dumps(evaluation))
    page = opened(write_report(folder))
    assert "nothing to slide" in page.text and not [a for a in page.of("img") if a.get("width") == "9"]


def test_large_pictures_are_made_smaller(tmp_path, without_png):
    folder = run_folder(tmp_path / "run")
    for path in (folder / "images").rglob("*.jpg"):
        Image.effect_noise((1024, 1024), 60).convert("RGB").save(path)
    page = write_report(folder)
    assert {a["width"] for a in opened(page).of("img") if "data-row" in a} == {"512"}
    assert page.stat().st_size < 12e6


def gap(value, low, high, base=1, target=2):
    return {"reward": "r", "value": value, "low": low, "high": high, "base_steps": base, "target_steps": target}


GAIN = {"ci_low": 0.1, "ci_high": 0.3, "win_rate": 0.64, "prompts": 40}


@pytest.mark.parametrize(
    ("found", "paired", "expected"),
    [
        (gap(1.2, 1.05, 1.4), GAIN, "One step now outscores two"),
        (gap(1.2, 1.05, 1.4, 2, 4), GAIN, "Two steps now outscore four"),
        (gap(1.0, 0.8, 1.3), GAIN, "One step now scores like two"),
        (gap(0.5, 0.3, 0.7), GAIN, "50 % of the way from one step to two"),
        (gap(0.1, -0.1, 0.3), GAIN, "No clear gain"),
        (gap(1.5, -0.1, 3.0), GAIN, "No clear gain"),
        (gap(-0.4, -0.6, -0.2), GAIN | {"ci_low": -0.2, "ci_high": -0.1}, "Training made the scores worse"),
        (None, GAIN, "Better on 64 % of the prompts"),
        (None, GAIN | {"ci_low": -0.1}, "No clear gain"),
        (None, GAIN | {"ci_low": -0.3, "ci_high": -0.1}, "Training made the scores worse"),
    ],
)
def test_the_title_claims_no_more_than_the_interval(found, paired, expected):
    claim = Claim("r", "", [paired], rises=found is not None)
    assert title(claim, [], [found] if found else []).replace("\u00a0", " ") == expected


def test_curves_know_what_was_spent(tmp_path):
    curves = learning_curves(read_folder(run_folder(tmp_path / "run")).history)
    mine = curves[(curves["name"] == HELD_OUT) & (curves["kind"] == VALIDATION)]
    assert mine["images"].tolist() == [16, 32] and mine["seconds"].tolist() == [60, 120]
    assert mine["value"].tolist() == [20.5, 21.0]
    assert len(curves[(curves["name"] == TRAINED) & (curves["kind"] == TRAINING)]) == 4


def test_logs_without_a_budget_in_every_line_are_filled_in():
    log = [
        {"step": 1, "eval_rewards/r/mean": 0.5},
        {"step": 2, "rewards/r/mean": 1.0, "step_time": 3.0, "num_images": 20},
        {"step": 3, "eval_rewards/r/mean": 1.5},
        {"step": 4, "rewards/r/mean": 2.0, "step_time": 5.0, "num_images": 40},
        {"step": 4, "eval_rewards/r/mean": 2.5},
    ]
    curves = learning_curves(log)
    evaluated = curves[curves["kind"] == VALIDATION]
    assert evaluated["images"].tolist() == [10, 30, 40]
    assert evaluated["seconds"].tolist() == [3, 11, 16]
    assert spent(log) == (40, 16)
    assert spent([]) == (None, None)


def test_the_command_line_writes_it_again(finished, capsys, tmp_path):
    folder, path = finished
    path.unlink()
    assert main(["report", str(folder)]) == 0
    assert path.is_file() and str(path) in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("es-trl report: ") and "is not a folder" in error
