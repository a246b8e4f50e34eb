"""What the judge sees, checked on the shipped held-out CLIP and against scipy."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.linalg import sqrtm

from es_trl import assets
from es_trl.evaluation import Evaluation, EvaluationRow, Noise
from es_trl.evaluation.judge import ClipJudge, FrechetReference, diversity, load_judge, read_hard_negatives
from es_trl.rewards.clip_features import get_scorer


PROMPTS = ["a red cat", "two blue stars", "a yellow house on a pink background", "a red cat"]
NEGATIVES = [["a blue cat", "a red dog"], ["three blue stars"], [], ["a blue cat"]]


@pytest.fixture(scope="module")
def scorer():
    return get_scorer("tiny-clip-heldout")


def texts_as_pictures(scorer, prompts):
    """Pictures that a CLIP cannot tell from these captions: (P, 1, D)."""
    return scorer.text_features(list(prompts)).numpy()[:, None]


def test_right_pictures_are_found_and_beat_the_hard_negatives(scorer):
    scores = ClipJudge(scorer, NEGATIVES).prompt_scores(PROMPTS, texts_as_pictures(scorer, PROMPTS))
    assert scores["retrieval_accuracy"].tolist() == [[1.0]] * 4  # the caption that occurs twice is one caption
    np.testing.assert_array_equal(scores["hard_negative_accuracy"], [[1.0], [1.0], [np.nan], [1.0]])


def test_pictures_of_a_hard_negative_lose_to_it(scorer):
    shown = ["a red dog", "three blue stars", "two blue stars", "a red cat"]
    scores = ClipJudge(scorer, NEGATIVES).prompt_scores(PROMPTS, texts_as_pictures(scorer, shown))
    assert scores["retrieval_accuracy"][2:].tolist() == [[0.0], [1.0]]
    np.testing.assert_array_equal(scores["hard_negative_accuracy"], [[0.0], [0.0], [np.nan], [1.0]])


def test_diversity_is_the_mean_pairwise_distance():
    features = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    pairs = [1 - features[:, i] @ features[:, j].T for i in range(4) for j in range(i)]
    np.testing.assert_allclose(diversity(features), np.mean([np.diag(pair) for pair in pairs], axis=0), atol=1e-6)
    np.testing.assert_allclose(diversity(np.repeat(features[:, :1], 4, axis=1)), 0.0, atol=1e-6)


@pytest.mark.parametrize("pictures", [12, 200])
def test_frechet_distance_agrees_with_scipy(pictures):
    """With fewer pictures than dimensions too, where the root of the product of covariances is singular."""
    rng = np.random.default_rng(0)
    real = rng.normal(size=(500, 24)) @ rng.normal(size=(24, 24))
    drawn = rng.normal(size=(pictures, 24)) + 0.5
    reference = FrechetReference(real.mean(0), np.cov(real.T))
    cov, real_cov = np.cov(drawn.T), np.cov(real.T)
    expected = np.square(drawn.mean(0) - real.mean(0)).sum()
    expected += np.trace(cov + real_cov - 2 * sqrtm(cov @ real_cov).real)
    assert reference.distance(drawn[:, None]) == pytest.approx(100 * expected, rel=1e-5)


def test_frechet_distance_of_the_real_pictures_is_zero():
    real = np.random.default_rng(0).normal(size=(300, 16))
    assert FrechetReference(real.mean(0), np.cov(real.T)).distance(real[:, None]) == pytest.approx(0.0, abs=1e-4)


def test_frechet_resamples_are_joint_and_of_prompts():
    """Copies of a prompt's picture are drawn together, and two models are drawn on the same prompts."""
    rng = np.random.default_rng(0)
    reference = FrechetReference(np.zeros(8), np.eye(8))
    pictures = rng.normal(size=(40, 1, 8))
    draws = reference.resample(pictures, seed=3, resamples=50)
    copies = reference.resample(np.repeat(pictures, 3, axis=1), seed=3, resamples=50)
    assert np.corrcoef(draws, copies)[0, 1] > 0.99
    moved = reference.resample(pictures + 0.5, seed=3, resamples=50) - draws
    assert moved.std() < 0.8 * draws.std() + 0.8 * reference.resample(pictures, seed=4, resamples=50).std()
    assert (reference.resample(pictures, seed=3, resamples=50) == draws).all()


def test_frechet_interval_lies_around_the_distance(scorer):
    """A resample holds copies, so its distance is larger than the sample's: the interval is moved back."""
    rng = np.random.default_rng(0)
    dim = scorer.text_features(["a"]).shape[1]
    features = rng.normal(size=(60, 1, dim)).astype(np.float32)
    judge = ClipJudge(scorer, real_mean=np.zeros(dim), real_cov=np.eye(dim))
    row = EvaluationRow("base", adapter=False, num_inference_steps=1)
    result = Evaluation([row], ["r"], ["a"] * 60, Noise((0,)), 100, {})
    result.add_row(row, np.zeros((60, 1, 1)), features, judge)
    found = result.to_dict()["rows"][0]["judge"]["frechet_distance"]
    assert found["ci_low"] < found["mean"] < found["ci_high"]
    assert result.distances["base"][1].min() > found["mean"]


def test_judge_is_loaded_with_what_lies_beside_it(tmp_path, scorer):
    """Statistics of real pictures turn the Frechet distance on, a .jsonl file the hard negatives."""
    folder = shutil.copytree(assets.resolve("tiny-clip-heldout"), tmp_path / "clip")
    features = texts_as_pictures(scorer, PROMPTS)
    save_file(
        {"mean": features[:, 0].mean(0), "cov": np.cov(features[:, 0].T).astype(np.float32)},
        str(folder / "real_statistics.safetensors"),
    )
    (tmp_path / "negatives.jsonl").write_text('{"prompt": "a red cat", "hard_negatives": ["a blue cat"]}\n\n')
    judge = load_judge(str(folder), PROMPTS, hard_negatives=str(tmp_path / "negatives.jsonl"))
    assert judge.hard_negatives == [["a blue cat"], [], [], ["a blue cat"]]
    assert judge.real.distance(features) == pytest.approx(0.0, abs=1e-2)


def test_unknown_prompts_have_no_hard_negatives(scorer):
    judge = load_judge("tiny-clip-heldout", ["an astronaut riding a horse"])
    assert judge.hard_negatives is None
    scores = judge.prompt_scores(["an astronaut riding a horse"], texts_as_pictures(scorer, ["a red cat"]))
    assert list(scores) == ["retrieval_accuracy"]


def test_wrong_files_and_shapes_are_named(tmp_path, scorer):
    broken = tmp_path / "negatives.jsonl"
    broken.write_text('{"prompt": "a", "hard_negatives": ["b"]}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="line 2 of .*negatives.jsonl"):
        read_hard_negatives(broken)
    with pytest.raises(ValueError, match="7 dimensions"):
        ClipJudge(scorer, real_mean=np.zeros(7), real_cov=np.eye(7))
    with pytest.raises(ValueError, match="not finite"):
        FrechetReference(np.zeros(2), np.full((2, 2), np.nan))
