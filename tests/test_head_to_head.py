"""The head to head is fair by construction, resumes, and its tables say what the runs found."""

import argparse
import contextlib
import copy
import sys
import types

import numpy as np
import pytest
import torch
import yaml
from test_benchmarks import FOLDER, load

from es_trl.pipelines.parameterisation import TrigFlow
from es_trl.rewards import RewardSet
from es_trl.trainer import METHODS, config_of


sys.path.insert(0, str(FOLDER))  # as when the script is run
head_to_head, tables = load("head_to_head"), load("head_to_head_tables")
sys.path.remove(str(FOLDER))
SETTINGS = head_to_head.read_settings(FOLDER / "head_to_head.yaml")


def plan(done=(), size="quick"):
    return head_to_head.Plan(SETTINGS, SETTINGS[size], {row["name"]: row for row in done})


def result(job: dict, reward: float = 1.0) -> dict:
    """What a finished run writes: the adapter above the base by `reward`."""
    scores = dict.fromkeys(head_to_head.SCORERS, 0.0) | {"hard_negative_accuracy": 0.5, "diversity": 0.2}
    better = {name: value + reward for name, value in scores.items()}
    table = {f"base@{n}": scores for n in (1, 2)} | {f"adapter@{n}": better for n in (1, 2)}
    if job["stage"] == "base":
        table = {"base@1": scores} | dict.fromkeys(tables.SEARCHES, better)
    spent = {"images": job["budget_images"], "cpu_seconds": 20.0, "training_megabytes": 900}
    return job | spent | {"table": table}


def test_every_method_gets_the_same(tmp_path):
    """As many trials of settings that exist, the same adapter and prompts per trial, budgets without a remainder."""
    assert set(SETTINGS["methods"]) == set(METHODS)
    for method, entry in SETTINGS["methods"].items():
        assert len(entry["trials"]) == SETTINGS["full"]["trials"], method
        for number, trial in enumerate(entry["trials"]):
            settings = SETTINGS["shared"] | entry["speed"] | entry.get("fixed", {}) | trial
            config = config_of(method)(output_dir=str(tmp_path), **settings)
            assert not set(SETTINGS["shared"]) & (set(trial) | set(entry.get("fixed", {}))), (
                "what is shared is not changed"
            )
            for size in [size for size in ("full", "quick") if number < SETTINGS[size]["trials"]]:
                for budget in ("trial_images", "images"):
                    left = SETTINGS[size][budget] % head_to_head.images_per_step(config)
                    assert left == 0, (method, trial, budget)
    for reward in SETTINGS["rewards"].values():
        RewardSet(reward)


def test_the_plan_follows_what_was_found():
    stages = plan().stages()
    tuning = next(stages)
    assert len(tuning) == len(METHODS) * SETTINGS["quick"]["trials"]
    assert {job["prompts"] for job in tuning} == {"tiny-validation"}
    done = [result(job, reward=job["trial"] if job["method"] == "dpo" else -job["trial"]) for job in tuning]
    plan_after = plan(done)
    assert plan_after.best_trial("dpo") == SETTINGS["quick"]["trials"] - 1 and plan_after.best_trial("es") == 0
    stages = plan_after.stages()
    next(stages)
    final = next(stages)
    chosen = SETTINGS["methods"]["dpo"]["trials"][plan_after.best_trial("dpo")]
    assert all(chosen.items() <= job["settings"].items() for job in final if job["method"] == "dpo")
    assert {job["prompts"] for job in final} == {"tiny-test"}
    assert {job["seed"] for job in final if job["stage"] == "images"}.isdisjoint({job["seed"] for job in tuning})
    assert len({job["name"] for job in tuning + final}) == len(tuning) + len(final)
    plan_after.done |= {job["name"]: result(job) for job in final}
    for job in next(stages):
        assert job["budget_images"] == SETTINGS["quick"]["images"] / 20 * SETTINGS["quick"]["seconds"]


def test_stages_and_methods_can_be_chosen(monkeypatch):
    """Other budgets, other objectives at the best trial, and the rules of others, with settings that exist."""
    monkeypatch.syspath_prepend(str(FOLDER))
    done = {f"tune-{m}-{n}": result(job, job["trial"]) for m in METHODS for n, job in enumerate(tuned(m))}
    everything = head_to_head.Plan(SETTINGS, SETTINGS["full"], done, ["budgets", "objectives", "opponents"])
    tuning, budgets, objectives, opponents = everything.stages()
    assert all(head_to_head.is_done(job, done) for job in tuning)
    assert {job["budget_images"] for job in budgets} == set(SETTINGS["budgets"]["es"])
    assert {job["reward_funcs"] if isinstance(job["reward_funcs"], str) else None for job in objectives} == {
        "margin:tiny-pickscore",
        None,
    }
    assert {job["method"] for job in opponents} == set(SETTINGS["opponents"])
    for job in budgets + objectives + opponents:
        config = head_to_head.classes_of(job.get("of", job["method"]))[0](output_dir="unused", **job["settings"])
        assert job["budget_images"] >= head_to_head.images_per_step(config)
        RewardSet(job["reward_funcs"])
    only = head_to_head.Plan(SETTINGS, SETTINGS["full"], {}, ["untuned"], ["grpo"])
    assert {job["method"] for jobs in only.stages() for job in jobs} == {"grpo"}
    names = [job["name"] for job in budgets + objectives + opponents]
    assert len(set(names)) == len(names)


def tuned(method: str) -> list[dict]:
    jobs = next(head_to_head.Plan(SETTINGS, SETTINGS["full"], {}, ["tune"], [method]).stages())
    return sorted(jobs, key=lambda job: job["trial"])


def test_finished_runs_are_skipped_and_killed_ones_redone(tmp_path, monkeypatch, capsys):
    started = []

    def execute(job, output):
        started.append(job["name"])
        if len(started) == 7:
            return None
        folder = output / "runs" / job["name"]
        folder.mkdir(parents=True, exist_ok=True)
        row = result(job)
        head_to_head.write_per_prompt(
            {r: {k: np.full((4, 1), v) for k, v in of.items()} for r, of in row["table"].items()}, folder
        )
        return row

    monkeypatch.setattr(head_to_head, "execute", execute)
    args = argparse.Namespace(
        settings=str(FOLDER / "head_to_head.yaml"), quick=True, output=tmp_path, jobs=1, stage=[], methods=None
    )
    assert head_to_head.everything(args) == 1, "a run failed"
    failed = started[6]
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"name": "cut off by a ki')
    assert head_to_head.everything(args) == 0
    assert sorted(name for name in set(started) if started.count(name) > 1) == [failed]
    finished = len(started)
    assert head_to_head.everything(args) == 0
    assert len(started) == finished, "nothing is left to do"
    changed = copy.deepcopy(SETTINGS) | {"opponents": "head_to_head_opponents.yaml"}
    changed["methods"]["es"]["trials"][0]["travel"] = 0.3
    args.settings = str(tmp_path / "changed.yaml")
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    assert head_to_head.everything(args) == 0
    redone = [
        "tune-es-0",
        *(f"images-{name}-es-0" for name in list(SETTINGS["rewards"])[: SETTINGS["quick"]["rewards"]]),
    ]
    assert started[finished:] == [*redone, f"seconds-{next(iter(SETTINGS['rewards']))}-es-0"], "what was changed, only"
    names = [row["name"] for row in head_to_head.read(tmp_path / "results.jsonl")]
    assert len(names) == len(set(names)) == finished - 1
    args.stage, args.methods = ["opponents"], None
    changed["quick"]["opponents"] = 2
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    assert head_to_head.everything(args) == 0
    text = tables.tables(tmp_path)
    assert all(f"| {name} | 1 | 512 |" in text.split(tables.TITLES["opponents"])[1] for name in SETTINGS["opponents"])
    titles = [line.split(", trained")[0].strip("# ") for line in text.splitlines() if ", trained on" in line]
    rewards = SETTINGS["quick"]["rewards"]
    images, seconds, untuned = (tables.TITLES[stage] for stage in ("images", "seconds", "untuned"))
    assert titles == [images] * rewards + [seconds] + [untuned] * rewards + [tables.TITLES["opponents"]]
    first = [line.split()[1] for line in text.split("### ")[1].splitlines() if line.startswith("| ")]
    assert [word for word in first if word in METHODS][: len(METHODS)] == list(METHODS), "also those that ran again"
    for method in METHODS:
        assert f"| {method} | 1 | 512 | 20 | 900 | +1.000 | +1.000" in text, "equal differences have no interval"
    assert "base, best of 8" in text and "### Trials" in text


def test_intervals_are_over_seeds_and_prompts_and_methods_are_compared_on_the_same_prompts():
    generator = np.random.default_rng(1)
    prompts = generator.normal(size=400)

    def runs(method, gains):
        return [
            {"method": method, "per_prompt": {"base@1": {"r": prompts}, "adapter@1": {"r": prompts + gain}}}
            for gain in gains
        ]

    one = runs("es", [generator.normal(0.3, 1, 400)])
    mean, low, high = numbers(tables.cell(one, "adapter@1", "r"))
    assert low < mean < high and high - low == pytest.approx(4 * 400**-0.5, rel=0.2)
    apart = runs("es", [-0.7, 0.3, 1.3])
    _, low, high = numbers(tables.cell(apart, "adapter@1", "r"))
    assert high - low > 1, "seeds that disagree widen it"
    noise = generator.normal(0, 0.01, 400)
    ahead = numbers(tables.cell(runs("es", [2 + noise]), "adapter@1", "r", runs("dpo", [1]), "adapter@1"))
    assert ahead == pytest.approx([1, 1, 1], abs=0.005), "what the prompts do to both does not enter"


def numbers(cell: str) -> list[float]:
    return [float(word.strip("[],")) for word in cell.split()]


def test_noisy_reward_is_right_on_average():
    """The noise belongs to the picture, so the same one scores the same, and it averages out."""
    noisy = load("noisy_reward")
    from PIL import Image

    images = [Image.new("RGB", (8, 8), (value % 256, value // 256, 7)) for value in range(500)]
    noise = np.array([noisy.noise_of(image) for image in images])
    assert abs(noise.mean()) < 0.15 and noise.std() == pytest.approx(1, abs=0.1)
    assert noisy.noise_of(images[3].copy()) == noise[3]
    scores = noisy.noisy_pickscore(["a cat"] * 2, images[:2])
    exact = RewardSet("tiny-pickscore")(["a cat"] * 2, images[:2])[:, 0]
    assert scores == pytest.approx(list(exact + noisy.NOISE * noise[:2]), rel=1e-4)


def test_noise_search_keeps_the_best_picture_seen(monkeypatch):
    """As many scores as calls, never a worse picture than before, and the same again with the same seed."""
    monkeypatch.syspath_prepend(str(FOLDER))
    from noise_search import search_noise

    from es_trl.pipelines import CallSettings, PipelineAdapter, load_pipeline

    settings = CallSettings(guidance_scale=2.0, max_sequence_length=16, num_inference_steps=1)
    adapter = PipelineAdapter(load_pipeline("tiny-sana-sprint", torch.float32), settings=settings)
    prompts, calls = ["a red apple", "two blue cats"], []

    def score(texts, images):
        calls.append(len(images))
        return [float(np.asarray(image).mean()) for image in images]

    found = search_noise(adapter, prompts, score, (1, 3, 8), seed=5, candidates=2)
    assert calls == [2] * 8
    scores = np.array([[np.asarray(image).mean() for image in found[n]] for n in (1, 3, 8)])
    assert (np.diff(scores, axis=0) >= 0).all() and (scores[2] > scores[0]).all()
    again = search_noise(adapter, prompts, score, (8,), seed=5, candidates=2)[8]
    assert not np.array_equal(np.asarray(again[0]), np.asarray(found[1][0]))


def test_nft_pulls_towards_good_pictures_and_away_from_bad_ones(monkeypatch):
    """On policy the gradient of the loss in v is 2 b sin t (2 r - 1) (x0 - x0(v)) / (n w) (arXiv 2509.16117)."""
    monkeypatch.syspath_prepend(str(FOLDER))
    nft = load("nft")
    assert nft.optimality(np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]]))[1].tolist() == [0.5] * 3
    assert nft.optimality(np.array([[0.0, 2.0]])).tolist() == [[0.4, 0.6]]
    generator = torch.Generator().manual_seed(0)
    x0, noise, start = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(3))
    levels, good, b = torch.tensor([0.5, 0.8, 1.0]), torch.tensor([0.9, 0.5, 0.1]), 0.3
    v = start.clone().requires_grad_()
    passing = types.SimpleNamespace(
        args=types.SimpleNamespace(guidance_strength=b),
        adapter=types.SimpleNamespace(adapter_disabled=contextlib.nullcontext),
        forward=types.SimpleNamespace(enabled=contextlib.nullcontext),
        denoising=types.SimpleNamespace(
            kind=TrigFlow(1.0),
            predict=lambda *_: v,
            noised=lambda z, eps, s: TrigFlow(1.0).noised(z, eps, s[:, None, None, None]),
        ),
    )
    nft.NFTTrainer._loss(passing, x0, noise, levels, [""] * 3, good).sum().backward()
    t = torch.atan2(levels, 1 - levels)[:, None, None, None]
    miss = t.cos() * (t.cos() * x0 + t.sin() * noise) - t.sin() * start - x0
    weight = miss.abs().mean(dim=(1, 2, 3), keepdim=True)
    expected = -2 * b * t.sin() * (2 * good[:, None, None, None] - 1) * miss / (x0[0].numel() * weight)
    torch.testing.assert_close(v.grad, expected)
