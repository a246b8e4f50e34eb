"""The voting page, driven over HTTP as a browser would."""

import contextlib
import io
import json
import math
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from es_trl import ESConfig, ESTrainer
from es_trl.evaluation import evaluate
from es_trl.rewards import Human, RewardSet
from es_trl.rewards.preferences import pairs_within, share_won
from recipes.benchmarks.toy_pipeline import toy_pipeline


IMAGES = [Image.new("RGB", (size, 8), (size * 40, 0, 0)) for size in range(1, 7)]
PROMPTS = ["<b>a cat</b>"] * 4 + ["a dog"] * 2
GROUPS = [0, 0, 0, 0, 1, 1]


class Voter:
    """Score in a thread; meanwhile speak to the page."""

    def __init__(self, human, prompts=PROMPTS, images=IMAGES, groups=GROUPS):
        self.human, self.base, self.scores = human, human.start(), None
        rewards = RewardSet(human)

        def score():
            self.scores = rewards(prompts, images, groups=groups)[:, 0].tolist()

        self.thread = threading.Thread(target=score, daemon=True)
        self.thread.start()

    def get(self, path, **headers):
        with urllib.request.urlopen(urllib.request.Request(self.base + path, headers=headers), timeout=10) as reply:
            return reply.read(), reply.headers

    def state(self):
        return json.loads(self.get("state")[0])

    def wait(self):
        for _ in range(1000):
            if self.state()["total"]:
                return self.state()
            time.sleep(0.01)
        raise AssertionError("no comparison came up")

    def vote(self, choice, **changes):
        state = self.state()
        body = json.dumps({"round": state["round"], "index": state["index"], "choice": choice} | changes).encode()
        with urllib.request.urlopen(urllib.request.Request(self.base + "vote", data=body), timeout=10) as reply:
            return json.loads(reply.read())

    def widths(self):
        state = self.state()
        names = [f"{state['round']}/{state['index']}/{side}.png" for side in ("left", "right")]
        return [Image.open(io.BytesIO(self.get(name)[0])).width for name in names]

    def result(self):
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()
        return self.scores


def refused(call, *args, **kwargs) -> int:
    with pytest.raises(urllib.error.HTTPError) as error:
        call(*args, **kwargs)
    error.value.close()
    return error.value.code


@pytest.fixture
def human():
    human = Human()
    yield human
    human.stop()


def test_votes_become_win_rates_whichever_side_a_picture_stands(human):
    """The wider picture wins, but for the pair 3 and 4, a tie."""
    voter = Voter(human)
    assert voter.wait() == {"round": 1, "index": 0, "total": 3, "prompt": "<b>a cat</b>"}
    seen = []
    while (state := voter.state())["index"] < state["total"]:
        left, right = voter.widths()
        seen.append({left, right})
        voter.vote("tie" if {left, right} == {3, 4} else "left" if left > right else "right")
        if state["index"] == 2:
            break
    assert seen == [{1, 2}, {3, 4}, {5, 6}]
    assert voter.result() == [0, 1, 0.5, 0.5, 0, 1]


def test_a_vote_is_taken_back_and_a_stale_one_refused(human):
    voter = Voter(human, PROMPTS[:4], IMAGES[:4], GROUPS[:4])
    voter.wait()
    assert refused(voter.vote, "undo") == 409
    left, right = voter.widths()
    voter.vote("left" if left > right else "right")  # right, then wrong
    assert voter.vote("undo")["index"] == 0
    voter.vote("left" if left < right else "right")
    assert refused(voter.vote, "left", index=0) == 409  # a double click
    assert refused(voter.vote, "left", round=7) == 409
    assert refused(voter.vote, "best") == 409
    voter.vote("tie")
    assert voter.result() == [1, 0, 0.5, 0.5]


def test_a_second_round_comes_up_on_the_same_page(human):
    for number in (1, 2):
        voter = Voter(human, PROMPTS[:2], IMAGES[:2], GROUPS[:2])
        assert voter.wait()["round"] == number
        left, right = voter.widths()
        voter.vote("left" if left > right else "right")
        assert voter.result() == [0, 1]


def test_after_the_timeout_the_votes_so_far_count():
    human = Human(timeout=0.6)
    voter = Voter(human)
    voter.wait()
    left, right = voter.widths()
    voter.vote("left" if left > right else "right")
    np.testing.assert_array_equal(voter.result(), [0, 1, math.nan, math.nan, math.nan, math.nan])
    human.stop()


def test_only_the_secret_and_this_machine_open_the_page(human):
    voter = Voter(human, PROMPTS[:2], IMAGES[:2], GROUPS[:2])
    voter.wait()
    page, headers = voter.get("")
    assert (
        b"<script nonce=" in page and b"{nonce}" not in page and b"http" not in page.replace(b"http://www.w3.org", b"")
    )
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
    nonce = page.split(b'<script nonce="')[1].split(b'"')[0].decode()
    assert f"script-src 'nonce-{nonce}'" in headers["Content-Security-Policy"]
    root = voter.base.rstrip("/").rpartition("/")[0]
    secret = voter.base.rstrip("/").rpartition("/")[2]
    assert len(secret) > 20
    for url in (f"{root}/", f"{root}/state", f"{root}/{secret[:-1]}x/state", f"{root}/../state"):
        assert refused(urllib.request.urlopen, url, timeout=10) == 404
    assert refused(voter.get, "state", Host="evil.example:80") == 404
    for path in ("9/0/left.png", "1/9/left.png", "1/0/middle.png", "../human.py", "vote"):
        assert refused(voter.get, path) == 404
    assert human._server.server_address[0] == "127.0.0.1"
    huge = urllib.request.Request(voter.base + "vote", data=b"x" * 5000)
    assert refused(urllib.request.urlopen, huge, timeout=10) == 400
    voter.vote("tie")
    voter.result()


def test_a_run_from_votes_alone_asks_in_training_and_never_in_an_evaluation(human, tmp_path, caplog):
    """Two pictures of one model side by side say nothing about it."""

    def left_always():
        while not done.is_set():
            with contextlib.suppress(OSError):  # the page closes behind the last vote
                state = json.loads(urllib.request.urlopen(base + "state", timeout=10).read())
                if state["index"] < state["total"]:
                    body = json.dumps({"round": state["round"], "index": state["index"], "choice": "left"}).encode()
                    urllib.request.urlopen(urllib.request.Request(base + "vote", data=body), timeout=10).close()
                    votes.append(state["total"])
            time.sleep(0.01)

    base, votes, done = human.start(), [], threading.Event()
    voter = threading.Thread(target=left_always, daemon=True)
    voter.start()
    config = ESConfig(output_dir=str(tmp_path), max_steps=2, population_size=8, prompts_per_step=2, use_cpu=True,
                      report_to="none", sample_steps=0, eval_strategy="steps", eval_steps=1, eval_images_per_prompt=2,
                      eval_reward_funcs=["jpeg_compressibility"], lora_target_modules=["to_q"])  # fmt: skip
    trainer = ESTrainer(toy_pipeline(), human, config, train_dataset=["a cat", "a dog"], eval_dataset=["a fox"])
    trainer.train()
    done.set()
    voter.join(timeout=10)
    images = trainer.images_drawn
    assert len(votes) == images // 2 and not voter.is_alive()
    assert "human scored no prompt of the evaluation: people are asked in training only" in caplog.text
    with pytest.raises(ValueError, match="human asks people.* says nothing about the model"):
        evaluate(toy_pipeline(), ["a fox"], human, images_per_prompt=2)


def test_a_picture_alone_asks_nobody(human):
    assert np.isnan(RewardSet(human)(["a cat", "a dog"], IMAGES[:2])).all()
    assert human._server is None


@pytest.mark.parametrize(
    ("group", "pairing", "pairs"),
    [
        ([4, 7, 8, 9], "neighbours", [(4, 7), (8, 9)]),
        ([4, 7, 8], "neighbours", [(4, 7), (8, 4)]),
        ([4, 7, 8], "all", [(4, 7), (4, 8), (7, 8)]),
        ([4], "all", []),
        ([4], "neighbours", []),
    ],
)
def test_who_meets_whom(group, pairing, pairs):
    assert pairs_within(group, pairing) == pairs


def test_win_rates():
    assert share_won(4, [(0, 1, 1.0), (0, 2, 0.5), (2, 1, 0.25)]) == [0.75, 0.375, 0.375, None]
    with pytest.raises(ValueError, match="pairing must be one of neighbours, all"):
        Human(pairing="some")
    with pytest.raises(ValueError, match="timeout of the human reward"):
        Human(timeout=0)
