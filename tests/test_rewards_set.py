"""RewardSet: what a reward is given, what it may return, and what happens when it does something else."""

import asyncio
import functools
import math
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import sparse
from transformers import TrainerState

from es_trl.rewards import RewardSet


IMAGES = [Image.new("RGB", (size, 8)) for size in (1, 2, 3)]
PROMPTS = ["a cat", "a dog", "a frog"]


def width(images, prompts):
    return [image.width for image in images]


def returning(value):
    def reward(prompts, images, **kwargs):
        return value

    return reward


# --- what may be returned (F12, F15) ---


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.0, True],
        (1, 2, 1),
        np.array([1, 2, 1]),
        np.array([1, 2, 1], dtype=np.float16),
        np.array([1.0, 2.0, 1.0]),
        [np.float32(1), np.int64(2), np.bool_(True)],
        torch.tensor([1.0, 2.0, 1.0], requires_grad=True),
        torch.tensor([1, 2, 1]),
        torch.tensor([1.0, 2.0, 1.0], dtype=torch.bfloat16),
        [torch.tensor(1.0, requires_grad=True), torch.tensor(2), 1],
        np.ma.array([1, 2, 1]),
        pd.Series([1, 2, 1], index=[7, 8, 9]),
        pd.array([1, 2, 1], dtype="Int64"),
        pd.Index([1, 2, 1]),
    ],
    ids=str,
)
def test_accepted_results_become_float64(value):
    scores = RewardSet(returning(value))(PROMPTS, IMAGES)
    assert scores.dtype == np.float64
    assert scores.tolist() == [[1.0], [2.0], [1.0]]


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ([1.0, 2.0], "returned 2 of them"),
        ([1.0], "returned 1 of them"),
        ([], "returned 0 of them"),
        ([1.0] * 4, "returned 4 of them"),
        (np.ones(1), "returned 1 of them"),
        (1.5, "returned float 1.5"),
        (None, "returned NoneType None"),
        (np.float32(2), "returned float32"),
        (torch.tensor(2.0), r"returned an array of shape \(\)"),
        (np.ones((3, 1)), r"array of shape \(3, 1\)"),
        (torch.ones(1, 3), r"array of shape \(1, 3\)"),
        ([[1.0], [2.0], [3.0]], r"list \[1.0\] at index 0"),
        ([1.0, "2", 3.0], "str '2' at index 1"),
        (["a", "b", "c"], "str 'a' at index 0"),
        (np.array(["1", "2", "3"]), "'1'.* at index 0"),
        ("abc", "str 'abc'"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "dict"),
        ((x for x in (1, 2, 3)), "generator"),
        ([1.0, 2.0, 1j], "complex 1j at index 2"),
        ([torch.ones(2), 1.0, 1.0], r"array of shape \(2,\) at index 0"),
        (pd.DataFrame({"score": [1.0, 2.0, 3.0]}), r"a DataFrame of shape \(3, 1\)"),
        (sparse.coo_array(np.array([1.0, 0.0, 2.0])), r"a coo_array of shape \(3,\)"),
        (sparse.csr_matrix([[1.0, 0.0, 2.0]]), r"a csr_matrix of shape \(1, 3\)"),
        (torch.sparse_coo_tensor([[0]], [1.0], (3,)), "a Tensor that is no plain tensor .*dense"),
        (torch.ones(3, device="meta"), "a Tensor that is no plain tensor .*meta"),
        (np.array([1, 2, 3], dtype="m8[s]"), "timedelta64.* at index 0"),
        ([1.0, 10**400, 2.0], "a number beyond the range of floats at index 1"),
        (np.array([1.0, -(10**400), 2.0], dtype=object), "a number beyond the range of floats at index 1"),
        ((torch.ones(3), {}), "2 of them; a DDPO reward.*from_ddpo"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_results_are_errors_and_never_broadcast(value, got):
    with pytest.raises(ValueError, match=f"'reward' at step 4 must return .* per image, 3 here, but .*{got}"):
        RewardSet(returning(value))(PROMPTS, IMAGES, where="step 4")


def test_none_is_nan_and_non_finite_values_pass_through():
    rewards = RewardSet([returning([1.0, None, math.inf]), returning([math.nan, 2.0, -math.inf]), width], [1, 2, 3])
    scores = rewards(PROMPTS, IMAGES)
    np.testing.assert_array_equal(scores, [[1.0, math.nan, 1.0], [math.nan, 2.0, 2.0], [math.inf, -math.inf, 3.0]])
    assert np.isnan(rewards.total(scores)).all()


@pytest.mark.parametrize(
    "value",
    [
        np.ma.array([1.0, 7.0, 3.0], mask=[False, True, False]),
        np.ma.array([1, 7, 3], mask=[False, True, False]),
        [1.0, np.ma.masked, 3.0],
        pd.Series([1, None, 3], dtype="Int64"),
        pd.array([1, None, 3], dtype="Float64"),
        [1, pd.NA, 3],
    ],
    ids=repr,
)
def test_what_a_mask_hides_is_missing_and_not_nought(value):
    np.testing.assert_array_equal(RewardSet(returning(value))(PROMPTS, IMAGES)[:, 0], [1.0, math.nan, 3.0])


def test_total_is_the_weighted_sum():
    rewards = RewardSet([returning([1, 2, 3]), returning([10, None, 30])], weights=[2.0, -0.5])
    scores = rewards(PROMPTS, IMAGES)
    np.testing.assert_array_equal(rewards.total(scores), [-3.0, math.nan, -9.0])
    np.testing.assert_array_equal(rewards.total(scores[None]), [[-3.0, math.nan, -9.0]])
    assert RewardSet([width, width]).weights.tolist() == [1.0, 1.0]


def test_no_images_give_no_rows():
    assert RewardSet([width, width])([], []).shape == (0, 2)


# --- what a reward is given ---


def test_each_function_is_given_the_keywords_it_takes():
    seen, extra, metrics = {}, {}, {}

    def everything(prompts, images, trainer_state, log_extra, log_metric, **columns):
        seen.update(columns, state=trainer_state)
        log_extra("category", columns["category"])
        log_metric("mean_width", 2.0)
        return [0.0] * len(images)

    def one_column(images, *, target, threshold=0.5):
        return [t - threshold for t in target]

    class Judge:
        def __call__(self, prompts, images):
            return [len(prompt) for prompt in prompts]

    scores = RewardSet([everything, one_column, Judge()])(
        PROMPTS,
        IMAGES,
        columns={"category": ["x", "y", "z"], "target": [1, 2, 3], "prompt": PROMPTS},
        trainer_state="state",
        log_extra=extra.__setitem__,
        log_metric=metrics.__setitem__,
    )
    assert scores[:, 1].tolist() == [0.5, 1.5, 2.5]
    assert scores[:, 2].tolist() == [5, 5, 6]
    assert seen == {"category": ["x", "y", "z"], "target": [1, 2, 3], "state": "state"}
    assert (extra, metrics) == ({"category": ["x", "y", "z"]}, {"mean_width": 2.0})


def paints(images, prompts, target, tags, state, trainer_state, **_):
    for image in images:
        image.paste("white", (0, 0, *image.size))
    prompts.clear()
    target.reverse()
    for tag in tags:
        tag.append("x")
    for entry in state:
        entry["deep"]["list"].append(1)
    trainer_state.global_step += 1
    return [0.0] * len(images)


async def paints_later(images, prompts, target, tags, state, trainer_state, **_):
    return paints(images, prompts, target, tags, state, trainer_state)


class Paints:
    def __call__(self, images, **columns):
        return paints(images, **columns)


@pytest.mark.parametrize(
    "first",
    [paints, paints_later, Paints(), functools.partial(paints)],
    ids=["function", "async", "object", "partial"],
)
def test_what_a_reward_does_to_what_it_gets_stays_with_it(first):
    """Pictures, columns and what is in them are those that were drawn, for the next reward and for the caller."""
    seen = []

    def after(images, prompts, target, tags, state, trainer_state, **_):
        seen.append([images[0].getpixel((0, 0)), prompts, target, tags, state, trainer_state.global_step])
        return [0.0] * len(images)

    images = [Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")]
    columns = {"target": [1, 2], "tags": [["a"], ["b"]], "state": [{"deep": {"list": []}}, {"deep": {"list": []}}]}
    right = [(255, 0, 0), ["p", "q"], [1, 2], [["a"], ["b"]], [{"deep": {"list": []}}] * 2, 7]
    rewards, state = RewardSet([first, after]), TrainerState(global_step=7)
    for _ in range(2):
        rewards(["p", "q"], images, columns, trainer_state=state)
    assert seen == [right, right]
    assert [images[0].getpixel((0, 0)), ["p", "q"], *columns.values(), state.global_step] == right


def test_another_attempt_gets_the_picture_that_was_drawn():
    seen = []

    def once(images):
        seen.append(images[0].getpixel((0, 0)))
        images[0].paste("white", (0, 0, 4, 4))
        if len(seen) == 1:
            raise OSError("once")
        return [1.0]

    RewardSet(once, retries=1)(["p"], [Image.new("RGB", (4, 4), "red")])
    assert seen == [(255, 0, 0)] * 2


def test_half_an_emoji_in_log_extra_is_shown_as_its_escape():
    extra = {}

    def reward(images, log_extra):
        log_extra("answer", ["fine \U0001f600", "cut \ud83d", 3])
        return [0, 0, 0]

    RewardSet(reward)(PROMPTS, IMAGES, log_extra=extra.__setitem__)
    assert extra == {"answer": ["fine \U0001f600", "cut \\ud83d", 3]}


def test_log_functions_may_be_called_when_nobody_listens():
    def reward(images, log_extra, log_metric, **kwargs):
        log_extra("column", [1, 2, 3])
        log_metric("name", 1.0)
        return [0, 0, 0]

    assert RewardSet(reward)(PROMPTS, IMAGES).shape == (3, 1)


def test_a_missing_argument_is_named():
    def reward(images, targets):
        return [0.0] * len(images)

    with pytest.raises(ValueError, match="'reward' needs an argument 'targets'.*did you mean 'target'.*Given are"):
        RewardSet(reward)(PROMPTS, IMAGES, columns={"target": [1, 2, 3]})

    def positional(images, /, prompts):
        return [0.0] * len(images)

    with pytest.raises(ValueError, match="must take 'images' as a keyword"):
        RewardSet(positional)(PROMPTS, IMAGES)


def test_one_function_cannot_spoil_the_lists_of_the_next():
    def rude(images, prompts, **kwargs):
        prompts.clear()
        images.reverse()
        return [0, 0, 0]

    prompts = list(PROMPTS)
    assert RewardSet([rude, width])(prompts, IMAGES)[:, 1].tolist() == [1, 2, 3]
    assert prompts == PROMPTS


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"target": [1, 2]}, "column 'target' has 2 values for 3 images"),
        ({"images": [1, 2, 3]}, "column 'images' has the name of a reward argument"),
    ],
)
def test_bad_columns_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        RewardSet(width)(PROMPTS, IMAGES, columns=columns)


def test_one_prompt_per_image_is_required():
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        RewardSet(width)(PROMPTS[:2], IMAGES)


def test_names_are_unique():
    class Judge:
        def __call__(self, prompts, images):
            return [0] * len(images)

    partial = functools.partial(width, prompts=None)
    rewards = RewardSet([width, "jpeg_compressibility", width, Judge(), partial, lambda images: [0] * len(images)])
    assert rewards.names == ["width", "jpeg_compressibility", "width_2", "Judge", "width_3", "lambda"]
    assert rewards(PROMPTS, IMAGES)[:, 4].tolist() == [1, 2, 3]


# --- exceptions (F16) ---


def test_a_raising_reward_says_which_where_and_for_what():
    def broken(prompts, images):
        raise KeyError("score")

    prompt = "a very long prompt " * 30
    with pytest.raises(RuntimeError) as error:
        RewardSet([width, broken])([prompt] * 3, IMAGES, where="step 12, member 3")
    assert isinstance(error.value.__cause__, KeyError)
    message = str(error.value)
    assert "'broken' failed at step 12, member 3 (first prompt of 3: 'a very long prompt" in message
    assert "KeyError: 'score'" in message
    assert len(message) < 250


@pytest.mark.parametrize("asynchronous", [False, True])
def test_retries_only_when_asked_for(asynchronous, caplog):
    attempts = []

    def flaky(prompts, images):
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionError("refused")
        return [1, 2, 3]

    async def async_flaky(prompts, images):
        return flaky(prompts, images)

    func = async_flaky if asynchronous else flaky
    with pytest.raises(RuntimeError, match="refused") as error:
        RewardSet(func)(PROMPTS, IMAGES)
    assert len(attempts) == 1 and isinstance(error.value.__cause__, ConnectionError)
    attempts.clear()
    with pytest.raises(RuntimeError, match="after 2 attempts"):
        RewardSet(func, retries=1)(PROMPTS, IMAGES)
    attempts.clear()
    caplog.clear()
    assert RewardSet(func, retries=5)(PROMPTS, IMAGES)[:, 0].tolist() == [1, 2, 3]
    assert len(attempts) == 3
    assert len(caplog.records) == 2


def test_a_wrong_result_is_not_retried():
    calls = []

    def short(prompts, images):
        calls.append(1)
        return [1.0]

    with pytest.raises(ValueError, match="1 of them"):
        RewardSet(short, retries=3)(PROMPTS, IMAGES)
    assert len(calls) == 1


# --- async ---


async def slow_width(images, **kwargs):
    await asyncio.sleep(0.05)
    return [image.width for image in images]


def test_async_rewards_run_at_the_same_time_in_one_loop():
    loops, messages = [], {}

    def talking_to(mine, other):
        async def reward(prompts, images):
            """Ends only if the other one is running too."""
            loops.append(asyncio.get_running_loop())
            messages.setdefault(mine, asyncio.Event()).set()
            await asyncio.wait_for(messages.setdefault(other, asyncio.Event()).wait(), timeout=20)
            return [7, 8, 9]

        return reward

    rewards = RewardSet([talking_to("a", "b"), width, talking_to("b", "a")])
    for _ in range(2):
        assert rewards(PROMPTS, IMAGES).tolist() == [[7, 1, 7], [8, 2, 8], [9, 3, 9]]
    assert len(loops) == 4 and len(set(loops)) == 1


def test_async_rewards_work_inside_a_running_loop():
    async def notebook_cell():
        return RewardSet(slow_width)(PROMPTS, IMAGES)

    assert asyncio.run(notebook_cell())[:, 0].tolist() == [1, 2, 3]


def test_async_call_method_and_plain_function_returning_a_coroutine():
    class Server:
        async def __call__(self, prompts, images):
            return await slow_width(images)

    scores = RewardSet([Server(), lambda images, **kwargs: slow_width(images)])(PROMPTS, IMAGES)
    assert scores.tolist() == [[1, 1], [2, 2], [3, 3]]


def test_async_failure_names_the_function_and_stops_the_others():
    cancelled = threading.Event()

    async def broken(prompts, images):
        raise TimeoutError("no answer")

    async def patient(prompts, images):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [0, 0, 0]

    with pytest.raises(RuntimeError, match="'broken' failed at step 3 .*no answer"):
        RewardSet([patient, broken])(PROMPTS, IMAGES, where="step 3")
    assert cancelled.wait(timeout=20)


# --- the settings ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "reward_weights has 1 values, but there are 2 reward_funcs"),
        ({"weights": [1.0, 2.0, 3.0]}, "reward_weights has 3 values"),
        ({"weights": 2.0}, "reward_weights must be a list"),
        ({"weights": [1.0, "2"]}, "reward_weights must be finite numbers, not '2'"),
        ({"weights": [1.0, math.nan]}, "reward_weights must be finite numbers"),
        ({"retries": -1}, "reward_retries must be an integer"),
        ({"retries": 1.5}, "reward_retries must be an integer"),
        ({"dtype": "fp8"}, "dtype 'fp8'"),
    ],
)
def test_wrong_settings_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        RewardSet(["pickscore", width], **options)


@pytest.mark.parametrize("funcs", [[], None, 3, [3], [int], [None]])
def test_reward_funcs_must_be_names_or_functions(funcs):
    with pytest.raises(ValueError, match="reward_funcs"):
        RewardSet(funcs)
