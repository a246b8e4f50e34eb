"""`prompts_per_member`: members in groups, each with prompts of its own."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_runs import redness, same, theta_of, tiny_config, tiny_trainer

from es_trl.es import NoiseBank, Population, compute_fitness, estimate
from es_trl.files import read_lines
from es_trl.replay import redraw_member, verify_run


RUN = {"population_size": 6, "prompts_per_step": 2, "prompts_per_member": 1, "members_per_forward": 2, "max_steps": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    calls = []

    def recording(prompts, images, answer, **_):
        calls.append((prompts, images, answer))
        return redness(images)

    folder = tmp_path_factory.mktemp("groups")
    colors = ["red", "blue", "green"]
    data = Dataset.from_dict({"prompt": [f"{color} apple" for color in colors], "answer": colors})
    trainer = tiny_trainer(
        folder, recording, train_dataset=data, save_strategy="steps", save_steps=1, sample_steps=2,
        num_sample_prompts=1, **RUN,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return folder, trainer, calls


def test_every_member_draws_and_is_scored_on_its_groups_prompts_only(run):
    folder, trainer, calls = run
    assert trainer.images_drawn == 12 and trainer.images_per_batch == 6
    for step in (0, 1):
        prompts = [prompt for call in calls[3 * step : 3 * step + 3] for prompt in call[0]]
        assert len(prompts) == 6 and len(set(prompts[:3])) == len(set(prompts[3:])) == 1 and prompts[0] != prompts[3]
    assert all(prompt == f"{answer} apple" for call in calls for prompt, answer in zip(call[0], call[2], strict=True))


@pytest.mark.parametrize("member", [1, 2, 3])
def test_any_member_is_drawn_again(run, member):
    folder, _, calls = run
    images, prompts, scores = redraw_member(folder, 1, member)
    seen = [pair for call in calls[3:6] for pair in zip(call[0], call[1], strict=True)]
    assert prompts == [seen[member][0]] and np.array_equal(np.asarray(images[0]), np.asarray(seen[member][1]))
    assert scores.tolist() == [redness(images)]


def test_the_strip_shows_what_was_scored(run):
    """Members of one group, on its prompt, around the theta of that step: the pictures that got the rewards."""
    folder, trainer, calls = run
    entry = next(entry for entry in read_lines(folder / "samples" / "metadata.jsonl") if "members" in entry)
    assert entry["step"] == 2 and entry["prompts"] == calls[3][0][:1]
    scored = [image for call in calls[3:6] for image in call[1]][:3]
    rewards = sorted((redness([image])[0] for image in scored), reverse=True)
    assert [member["reward"] for member in entry["members"]] == rewards
    tiles = np.asarray(Image.open(folder / "samples" / entry["tiles"]), dtype=float)
    best_first = sorted(scored, key=lambda image: -redness([image])[0])
    drawn = np.concatenate([np.asarray(image, dtype=float) for image in best_first])
    assert np.abs(tiles - drawn).mean() < 4, "but for what JPEG changes"


def test_the_journal_proves_the_adapter(run):
    assert verify_run(run[0]).proven


def test_a_resumed_run_is_the_same_bit_by_bit(run, tmp_path):
    folder, trainer, _ = run
    data = trainer.train_dataset

    def recording(prompts, images, answer, **_):
        return redness(images)

    again = tiny_trainer(tmp_path, recording, train_dataset=data, **RUN)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert same(theta_of(again), theta_of(trainer))


def test_one_group_is_the_run_without_groups(tmp_path):
    runs = []
    for prompts_per_member in (None, 2):
        trainer = tiny_trainer(tmp_path, **(RUN | {"prompts_per_member": prompts_per_member, "max_steps": 1}))
        trainer.train()
        runs.append(theta_of(trainer))
    assert same(*runs)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prompts_per_member": 3}, "prompts_per_member must divide prompts_per_step=2, got 3"),
        ({"prompts_per_member": 0}, "prompts_per_member must be a whole number of at least 1, got 0"),
        ({"population_size": 5}, "population_size must give each of the 2 groups .*got 5, use 4"),
        ({"antithetic": True}, "as many pairs, at least 2 members; got 6, use 4"),
    ],
)
def test_what_cannot_be_dealt_out_is_said_at_once(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **(RUN | fields))


def test_as_many_images_point_closer_to_the_gradient_when_each_has_a_member_of_its_own():
    """Why one would: on a linear reward with an offset per prompt, 64 images on 8 prompts, 40 steps."""
    torch.manual_seed(0)
    target, cosines = torch.randn(8, 6), {}
    for groups, size in ((1, 8), (8, 64)):
        population, bank = Population(size, antithetic=False, groups=groups), NoiseBank(0, {"w": (8, 6)})
        found = []
        for step in range(40):
            factors = bank.draw(step, range(size))["w"]
            rewards = (factors.dense() * target).sum(dim=(1, 2))
            offsets = 10 * torch.randn(groups, 1, 8 // groups)
            scores = (rewards.view(groups, -1, 1) + offsets).flatten(0, 1)
            fitness = compute_fitness(scores[..., None], population)
            ghat = estimate(factors, fitness.values, population)
            found.append(torch.cosine_similarity(ghat.flatten(), target.flatten(), dim=0))
        cosines[groups] = torch.stack(found).mean()
    assert cosines[8] > 1.7 * cosines[1] > 0


def test_a_reward_that_compares_may_be_the_only_one(tmp_path):
    """As votes of people are: all pictures of a group are scored at once, when all are drawn."""
    calls = []

    def reddest_of_its_group(images, groups, **_):
        calls.append(len(images))
        values = np.array(redness(images))
        best = {group: values[np.array(groups) == group].max() for group in set(groups)}
        return [float(value >= best[group]) for value, group in zip(values, groups, strict=True)]

    reddest_of_its_group.groupwise = True
    trainer = tiny_trainer(tmp_path, reddest_of_its_group, max_steps=2, population_size=8, members_per_forward=2)
    trainer.train()
    assert len(calls) == 2 and len(set(calls)) == 1, "all pictures of a step at once"
    logged = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert logged and all(0 < value <= 1 for value in logged), "the best of every group has 1"
