"""The protocol draws with the shipped pipeline; a table must not depend on how the work was split."""

import json
import threading

import numpy as np
import pytest
import torch

from es_trl.evaluation import ClipJudge, EvaluationRow, Noise, draw_images, evaluate
from es_trl.pipelines import CallSettings, PipelineAdapter, load_pipeline
from es_trl.rewards import RewardSet
from es_trl.rewards.clip_features import get_scorer


PROMPTS = [
    "a red cat",
    "two blue stars",
    "a green frog left of a pink dog",
    "a yellow house on a pink background",
    "three purple cakes",
    "a white star",
    "two red frogs",
    "a pink house",
]


def make_adapter():
    """The shipped pipeline with an adapter that visibly changes its pictures."""
    settings = CallSettings(num_inference_steps=1, guidance_scale=2.0)
    adapter = PipelineAdapter(load_pipeline("tiny-sana-sprint"), settings=settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.theta.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapter


def make_judge(prompts):
    scorer = get_scorer("tiny-clip-heldout")
    dim = scorer.text_features(["a"]).shape[1]
    return ClipJudge(scorer, [["a blue fish"]] * len(prompts), np.zeros(dim), np.eye(dim) / dim)


@pytest.fixture(scope="module")
def adapter():
    return make_adapter()


@pytest.fixture(scope="module")
def rewards():
    return RewardSet(["tiny-pickscore", "jpeg_compressibility"]).load()


@pytest.fixture(scope="module")
def result(adapter, rewards):
    judge = make_judge(PROMPTS)
    return evaluate(adapter, PROMPTS, rewards, images_per_prompt=2, judge=judge, n_keep=3, resamples=500)


def pixels(images):
    return np.array([[np.asarray(image, np.int16) for image in row] for row in images])


def test_table_has_the_promised_fields(result, tmp_path):
    with open(result.save(tmp_path / "run" / "eval.json"), encoding="utf-8") as file:
        table = json.load(file)
    rows = {row["name"]: row for row in table["rows"]}
    assert [(name, row["num_inference_steps"], row["adapter"]) for name, row in rows.items()] == [
        ("base@1", 1, False),
        ("adapter@1", 1, True),
        ("base@2", 2, False),
    ]
    for row in rows.values():
        for found in row["rewards"].values():
            assert found["ci_low"] <= found["mean"] <= found["ci_high"] and found["std"] > 0
    pairs = [(entry["row"], entry["against"]) for entry in table["paired"] if entry["reward"] == "tiny-pickscore"]
    assert pairs == [("adapter@1", "base@1"), ("base@2", "base@1"), ("adapter@1", "base@2")]
    for entry in table["paired"]:
        means = [rows[entry[side]]["rewards"][entry["reward"]]["mean"] for side in ("row", "against")]
        assert entry["delta"] == pytest.approx(means[0] - means[1])
        assert entry["ci_low"] <= entry["delta"] <= entry["ci_high"] and 0 <= entry["win_rate"] <= 1
    base, model, target = (rows[name]["rewards"]["tiny-pickscore"]["mean"] for name in rows)
    assert table["gap_closure"]["tiny-pickscore"] == pytest.approx((model - base) / (target - base))
    assert len(table["gap_closure_ci"]["tiny-pickscore"]) == 2
    assert table["protocol"]["prompts"] == len(PROMPTS) and table["protocol"]["pipeline"]["height"] == 64
    metrics = {"retrieval_accuracy", "hard_negative_accuracy", "diversity", "frechet_distance"}
    assert {entry["metric"] for entry in table["paired_judge"]} == metrics
    for row in rows.values():
        assert set(row["judge"]) == metrics
        for found in row["judge"].values():
            assert found["ci_low"] <= found["mean"] <= found["ci_high"]


def test_in_double_precision_not_a_bit_depends_on_the_batch_size():
    def table(batch_size):
        settings = CallSettings(num_inference_steps=1, guidance_scale=2.0)
        call = {"settings": settings, "dtype": "float64", "batch_size": batch_size, "steps": [1], "resamples": 100}
        return evaluate("tiny-sana-sprint", PROMPTS, ["tiny-pickscore", "tiny-clip-heldout"], **call)

    one, five = table(1), table(5)
    assert np.array_equal(pixels(one.images["base@1"]), pixels(five.images["base@1"]))
    assert np.array_equal(one.of("base@1", "tiny-pickscore"), five.of("base@1", "tiny-pickscore"))
    assert one.to_dict()["rows"] == five.to_dict()["rows"]


def test_batch_size_does_not_matter(adapter, rewards, result):
    again = evaluate(adapter, PROMPTS, rewards, images_per_prompt=2, batch_size=3, n_keep=3)
    for row in ("base@1", "adapter@1", "base@2"):
        np.testing.assert_allclose(again.scores[row], result.scores[row], atol=2e-3)
        assert np.abs(pixels(again.images[row]) - pixels(result.images[row])).max() <= 1


@pytest.mark.parametrize("count, processes", [(5, 2), (2, 3)])
def test_process_count_does_not_matter(adapter, rewards, result, count, processes):
    """Threads stand for processes and share only what they gather; with 2 prompts, one of three has nothing to do."""
    adapters = [adapter] + [make_adapter() for _ in range(processes - 1)]
    barrier, slots, found = threading.Barrier(processes, timeout=120), [None] * processes, [None] * processes

    def run(index):
        def gather(part):
            slots[index] = part
            barrier.wait()
            joined = np.concatenate(slots)
            barrier.wait()
            return joined

        judge = make_judge(PROMPTS[:count])
        found[index] = evaluate(
            adapters[index], PROMPTS[:count], rewards, images_per_prompt=2, judge=judge, n_keep=3, resamples=500,
            process_index=index, num_processes=processes, gather=gather,
        )  # fmt: skip

    threads = [threading.Thread(target=run, args=(index,)) for index in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        for row in ("base@1", "adapter@1", "base@2"):
            np.testing.assert_allclose(one.scores[row], result.scores[row][:count], atol=2e-3)
            expected = pixels(result.images[row])[:count]
            assert np.abs(pixels(one.images[row]) - expected).max() <= 1
    assert found[0].to_dict() == found[-1].to_dict()


def test_rows_share_their_noise_and_differ_by_their_weights(adapter, rewards):
    rows = [
        EvaluationRow("base", adapter=False),
        EvaluationRow("off", adapter_scale=0.0),
        EvaluationRow("half", adapter_scale=0.5),
        EvaluationRow("full"),
    ]
    images = {name: pixels(kept) for name, kept in evaluate(adapter, PROMPTS[:2], rewards, rows).images.items()}
    assert np.abs(images["off"] - images["base"]).max() <= 1
    change = {name: np.abs(images[name] - images["base"]).mean() for name in ("half", "full")}
    assert 0 < change["half"] < change["full"]


def test_a_picture_can_be_drawn_again(adapter, result):
    """It depends on its own key, not on the other prompts or on what was drawn before."""
    row = EvaluationRow("adapter@1", num_inference_steps=1)
    ((keys, images),) = draw_images(adapter, PROMPTS, row, [(2, 1)])
    assert keys == [(2, 1)]
    assert np.abs(np.asarray(images[0], np.int16) - pixels(result.images["adapter@1"])[2, 1]).max() <= 1


def test_different_seed_draws_different_pictures(adapter, rewards, result):
    other = evaluate(adapter, PROMPTS[:1], rewards, [EvaluationRow("base@1", adapter=False)], seed=1)
    assert np.abs(pixels(other.images["base@1"])[0, 0] - pixels(result.images["base@1"])[0, 0]).mean() > 1


def test_seeds_add_images_and_tries_go_on_behind_them():
    """Two seeds are the images of each; tries of best-of-N come in rounds behind, and no image is used twice."""

    def state(noise, prompt, image):
        return noise.generator(prompt, image).initial_seed()

    both, first, second = Noise((0, 5), 2), Noise((0,), 2), Noise((5,), 2)
    assert both.images_per_prompt == 4
    of_both = [state(both, 3, image) for image in range(12)]
    assert of_both[:4] == [state(first, 3, 0), state(first, 3, 1), state(second, 3, 0), state(second, 3, 1)]
    assert of_both[4:6] == [state(first, 3, 2), state(first, 3, 3)]
    assert len(set(of_both)) == 12
    assert [state(Noise((0,)), 3, image) for image in range(4)] == [state(first, 3, image) for image in range(4)]


def test_missing_scores_are_counted_and_columns_stay_aligned(adapter):
    def by_answer(prompts, images, answer):
        assert [PROMPTS.index(prompt) for prompt in prompts] == answer
        return [None if number == 3 else float(number) for number in answer]

    found = evaluate(
        adapter, PROMPTS, RewardSet(by_answer), [EvaluationRow("base", adapter=False), EvaluationRow("adapter")],
        batch_size=2, columns={"answer": list(range(8))},
    )  # fmt: skip
    table = found.to_dict()
    summary = table["rows"][0]["rewards"]["by_answer"]
    assert summary["mean"] == pytest.approx((28 - 3) / 7)
    assert (summary["prompts"], summary["missing"]) == (7, 1)
    assert (table["paired"][0]["prompts"], table["paired"][0]["missing"]) == (7, 1)
    assert found.mean("base", "by_answer") == summary["mean"]


def test_nothing_scored_is_null_in_the_table(adapter, tmp_path):
    found = evaluate(adapter, PROMPTS[:2], RewardSet(lambda prompts, images: [None] * len(images)))
    with open(found.save(tmp_path / "eval.json"), encoding="utf-8") as file:
        table = json.load(file)
    (found,) = table["rows"][0]["rewards"].values()
    assert found["mean"] is None and table["gap_closure"] == {}


def test_a_failing_reward_says_where(adapter):
    def fails(prompts, images):
        raise OSError("the server is gone")

    with pytest.raises(RuntimeError, match=r"evaluation of base@1, prompts 2 to 3"):
        scored = RewardSet(lambda prompts, images: fails(prompts, images) if prompts[0] == PROMPTS[2] else [1.0, 1.0])
        evaluate(adapter, PROMPTS[:4], scored, batch_size=2)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["a cat", None]}, "row 1 is NoneType"),
        ({"rows": [EvaluationRow("a"), EvaluationRow("a")]}, "each its own name"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"columns": {"answer": [1]}}, "column 'answer' has 1 values for 8 prompts"),
        ({"num_processes": 2}, "give gather"),
        ({"process_index": 1}, "process_index is 1"),
    ],
)
def test_wrong_input_is_named(adapter, rewards, changed, message):
    with pytest.raises(ValueError, match=message):
        evaluate(**({"model": adapter, "prompts": PROMPTS, "rewards": rewards} | changed))


def test_a_judge_loaded_for_other_prompts_is_refused(adapter, rewards):
    with pytest.raises(ValueError, match="load the judge with the prompts"):
        evaluate(adapter, PROMPTS, rewards, judge=make_judge(PROMPTS[:2]))
