"""Rewards over HTTP against a real server on this machine, well-behaved and not."""

import asyncio
import base64
import gzip
import io
import json
import logging
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from es_trl.rewards import Remote, RewardSet, VlmJudge
from es_trl.rewards.endpoint import Endpoint, EndpointError
from es_trl.rewards.vlm_judge import first_token_share, rating


CANARY = "canary-7f3a91c2-token"
IMAGES = [Image.new("RGB", (size, 8), (size, 0, 0)) for size in range(1, 8)]
PROMPTS = [f"prompt {i}" for i in range(7)]


class Server:
    """`answer(request body, headers) -> (status, headers, bytes)`; the handler may also be told to misbehave."""

    def __init__(self, answer):
        self.requests, self.at_once, self.most_at_once = [], 0, 0
        self.lock, self.release = threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append((self.path, body, dict(self.headers)))
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    result = answer(self, body, len(server.requests))
                    if result is not None:
                        status, headers, content = result
                        self.send_response(status)
                        for name, value in {"Content-Length": str(len(content)), **headers}.items():
                            self.send_header(name, value)
                        self.end_headers()
                        self.wfile.write(content)
                except OSError:
                    pass  # the client has hung up, as some tests want
                finally:
                    with server.lock:
                        server.at_once -= 1

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/score"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        self.release.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("es_trl.rewards.endpoint.MAX_PAUSE_SECONDS", 0.01)


def as_json(data) -> tuple:
    return 200, {"Content-Type": "application/json"}, json.dumps(data).encode()


def widths(handler, body, number):
    return as_json({"scores": [Image.open(io.BytesIO(base64.b64decode(i))).width for i in body["images"]]})


def plain(content: bytes, status=200, **headers):
    return lambda *_: (status, headers, content)


# --- what is asked and answered ---


def test_scores_come_in_order_from_several_requests(serve):
    server = serve(widths)
    remote = Remote(server.url, batch_size=2, columns=("target",), concurrency=2)
    scores = RewardSet(remote)(PROMPTS, IMAGES, columns={"target": list(range(7)), "other": [0] * 7})
    assert scores[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    asked = sorted((body["prompts"], body["columns"]) for _, body, _ in server.requests)
    assert asked[0] == (["prompt 0", "prompt 1"], {"target": [0, 1]})
    assert [len(prompts) for prompts, _ in asked] == [2, 2, 2, 1]
    assert all(set(body) == {"prompts", "images", "columns"} for _, body, _ in server.requests)
    assert 1 <= server.most_at_once <= 2


def test_pixels_arrive_unchanged_and_null_is_no_score(serve):
    seen = []

    def answer(handler, body, number):
        seen.extend(Image.open(io.BytesIO(base64.b64decode(i))) for i in body["images"])
        return as_json([1.5, None])

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 5, 3), dtype=np.uint8))
    scores = RewardSet(f"remote:{serve(answer).url}")(["", "a"], [image, image])
    np.testing.assert_array_equal(scores[:, 0], [1.5, math.nan])
    np.testing.assert_array_equal(np.asarray(seen[0]), np.asarray(image))


def test_one_object_serves_two_event_loops(serve):
    remote = Remote(serve(widths).url)
    for _ in range(2):
        assert RewardSet(remote)(PROMPTS, IMAGES)[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert asyncio.run(remote(PROMPTS[:2], IMAGES[:2])) == [1, 2]


# --- servers that misbehave (F18) ---


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (plain(b"<html>gateway</html>"), "the reply is not JSON.*<html>gateway"),
        (plain(b"[1, NaN, 3, 4, 5, 6, 7]"), "NaN is no number of JSON"),
        (plain(b"[1, Infinity, 3, 4, 5, 6, 7]"), "Infinity is no number of JSON"),
        (plain(b"[1, 1e999, 3, 4, 5, 6, 7]"), "score 1 is no finite number: inf"),
        (plain(b"[1, true, 3, 4, 5, 6, 7]"), "score 1 is no finite number: True"),
        (plain(b'[1, "2", 3, 4, 5, 6, 7]'), "score 1 is no finite number: '2'"),
        (plain(b"[" * 100_000), "the reply is not JSON"),
        (plain(b"[1, 2]"), "asked for 7 scores, got 2"),
        (plain(b"[1]"), "asked for 7 scores, got 1"),
        (plain(b'{"score": 3}'), "must be a list or hold one under 'scores'"),
        (plain(b"3"), "must be a list or hold one"),
        (plain(b"\xff\xfe"), "the reply is not JSON"),
        (plain(b"[" + b"1," * 2_000_000 + b"1]"), "longer than max_reply_bytes=1000000"),
        (plain(gzip.compress(b"[1]" * 10), **{"Content-Encoding": "gzip"}), "compressed, which was not asked for"),
        (plain(b"", 302, Location="http://169.254.169.254/latest"), "a redirect .302., which is not followed"),
        (plain(b"", 307, Location="/score"), "a redirect .307."),
        (plain(b"no such page", 404), "status 404: 'no such page'"),
        (plain(b"who are you", 401), "status 401"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_useless_reply_is_an_error_at_once(serve, answer, message):
    server = serve(answer)
    with pytest.raises(
        RuntimeError, match=rf"'remote' failed at step 3 .*EndpointError.*127.0.0.1.*{message}"
    ) as error:
        RewardSet(f"remote:{server.url}")(PROMPTS, IMAGES, where="step 3")
    assert len(server.requests) == 1 and len(str(error.value)) < 600


def test_a_failure_that_may_pass_is_tried_again(serve, caplog):
    def answer(handler, body, number):
        if number == 1:
            return 503, {"Retry-After": "0.001"}, b"busy"
        if number == 2:
            handler.connection.close()  # no answer at all
            return None
        if number == 3:
            return 200, {"Content-Length": "500"}, b"[1, 2"  # and then the connection ends
        return widths(handler, body, number)

    server = serve(answer)
    with caplog.at_level(logging.WARNING):
        assert RewardSet(Remote(server.url))(PROMPTS, IMAGES)[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert len(server.requests) == 4
    assert sum("trying again in" in record.getMessage() for record in caplog.records) == 3


def test_retries_end_and_their_budget_too(serve):
    server = serve(plain(b"broken", 500))
    with pytest.raises(RuntimeError, match=r"status 500: 'broken' \(attempt 3\)"):
        RewardSet(Remote(server.url, retries=2))(PROMPTS, IMAGES)
    assert len(server.requests) == 3
    remote = Remote(server.url, batch_size=1, retries=5, retry_budget=4, concurrency=1)
    with pytest.raises(RuntimeError, match="the retry budget is used up"):
        RewardSet(remote)(PROMPTS, IMAGES)
    assert len(server.requests) == 3 + 5 and remote.endpoint.retry_budget == 0


@pytest.mark.parametrize("kind", ["hangs", "drips"])
def test_a_server_that_never_ends_costs_the_timeout_only(serve, kind):
    def answer(handler, body, number):
        if kind == "hangs":
            server.release.wait(20)
            return None
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        while not server.release.wait(0.02):
            handler.wfile.write(b" ")
            handler.wfile.flush()
        return None

    server = serve(answer)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no complete answer within 0.3 s \(attempt 2\)"):
        RewardSet(Remote(server.url, timeout=0.3, retries=1))(PROMPTS, IMAGES)
    assert time.monotonic() - started < 10


def test_nobody_listening(serve):
    server = serve(widths)
    server.stop()
    with pytest.raises(RuntimeError, match=r"ConnectError.*\(attempt 2\)"):
        RewardSet(Remote(server.url, retries=1))(PROMPTS, IMAGES)


def test_skipped_failures_give_no_score(serve, caplog):
    server = serve(lambda h, body, n: widths(h, body, n) if "prompt 2" not in body["prompts"] else (500, {}, b""))
    with caplog.at_level(logging.WARNING):
        scores = RewardSet(Remote(server.url, batch_size=2, retries=1, on_failure="skip"))(PROMPTS, IMAGES)
    np.testing.assert_array_equal(scores[:, 0], [1, 2, math.nan, math.nan, 5, 6, 7])
    assert any("2 pictures get no score" in record.getMessage() for record in caplog.records)


# --- where it may point, and secrets ---


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("http://example.com/x", {}, "example.com is not this machine: use https"),
        ("http://10.0.0.1/x", {}, "10.0.0.1 is not this machine: use https, or allow_http=True"),
        ("http://localhost.example.com/x", {}, "is not this machine"),
        ("http://[fd00::1]/x", {}, "is not this machine"),
        ("file:///etc/passwd", {}, "must start with https://"),
        ("https:///x", {}, "name a host"),
        (f"https://me:{CANARY}@example.com/", {}, "holds a user name or password"),
        (f"https://example.com/score?api_key={CANARY}", {}, r"holds a secret \(api_key=...\)"),
        ("https://example.com", {"retries": -1}, "retries of the endpoint must be an integer of at least 0"),
        ("https://example.com", {"timeout": 0}, "timeout of the endpoint must be a positive"),
        ("https://example.com", {"batch_size": 0}, "batch_size of the remote reward"),
        (
            "https://example.com",
            {"on_failure": "ignore"},
            "on_failure of the remote reward must be one of raise, skip",
        ),
    ],
)
def test_addresses_and_settings_that_cannot_work(url, options, message):
    with pytest.raises(ValueError, match=message) as error:
        Remote(url, **options)
    assert CANARY not in str(error.value)


def test_http_to_another_machine_only_when_asked_for(serve):
    """A second address of this machine stands for the other one; its name is what the server is asked by."""
    server = serve(plain(b"[1.0]"))
    port = server.http.server_address[1]
    assert asyncio.run(Endpoint(f"http://localhost:{port}/score", retries=0).ask({})) == [1.0]
    assert server.requests[0][2]["Host"] == f"localhost:{port}"
    with pytest.raises(ValueError, match="is not this machine"):
        Endpoint(f"http://0.0.0.0:{port}/score")
    assert asyncio.run(Endpoint(f"http://0.0.0.0:{port}/score", allow_http=True, retries=0).ask({})) == [1.0]


def test_the_token_is_sent_and_shown_nowhere(serve, monkeypatch, caplog):
    """Not even by a server that repeats it."""
    monkeypatch.setenv("ES_TRL_REMOTE_TOKEN", CANARY)

    def echo(handler, body, number):
        said = handler.headers["Authorization"].encode()
        return (500 if number < 3 else 403), {}, said

    server = serve(echo)
    rewards = RewardSet(f"remote:{server.url}")
    with caplog.at_level(logging.DEBUG), pytest.raises(RuntimeError, match="status 403: 'Bearer <token>'") as error:
        rewards(PROMPTS, IMAGES)
    assert [headers["Authorization"] for _, _, headers in server.requests] == [f"Bearer {CANARY}"] * 3
    chain, causes = error.value, []
    while chain is not None:
        causes.append(repr(chain))
        chain = chain.__cause__
    remote = rewards.functions()[0]
    for text in (
        caplog.text,
        *causes,
        repr(remote),
        repr(vars(remote)),
        repr(vars(remote.endpoint)),
        str(rewards.names),
    ):
        assert CANARY not in text
    monkeypatch.delenv("ES_TRL_REMOTE_TOKEN")
    with pytest.raises(RuntimeError):
        rewards(PROMPTS, IMAGES)
    assert "Authorization" not in server.requests[-1][2]


def test_the_token_does_not_travel_in_clear(monkeypatch):
    monkeypatch.setenv("ES_TRL_REMOTE_TOKEN", CANARY)
    endpoint = Endpoint("http://10.0.0.1/x", "ES_TRL_REMOTE_TOKEN", allow_http=True, retries=0)
    with pytest.raises(EndpointError, match="token of ES_TRL_REMOTE_TOKEN is not sent over http") as error:
        asyncio.run(endpoint.ask({}))
    assert CANARY not in str(error.value)


# --- vlm_judge ---


def chat(text, likely=None):
    """A reply of the chat interface; `likely`: token -> probability at the first position."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    if likely:
        top = [{"token": token, "logprob": math.log(p)} for token, p in likely.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": top}]}
    return as_json({"choices": [choice]})


def pictures_of(body) -> list[Image.Image]:
    content = body["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def test_yes_no_is_the_share_of_yes(serve):
    likely = {"Yes": 0.5, " yes": 0.1, "No": 0.15, "NO": 0.05, "Maybe": 0.2}
    server = serve(lambda *_: chat("Yes", likely))
    rewards = RewardSet(f"vlm_judge:org/a-vlm@{server.url.removesuffix('/score')}/v1")
    assert rewards(PROMPTS[:2], IMAGES[:2])[:, 0] == pytest.approx([0.75, 0.75])
    path, body, _ = server.requests[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"], body["logprobs"]) == ("org/a-vlm", 0, 1, True)
    asked = {
        (pictures_of(b)[0].width, b["messages"][0]["content"][-1]["text"].split('"')[1]) for _, b, _ in server.requests
    }
    assert asked == {(1, "prompt 0"), (2, "prompt 1")}


def test_yes_no_needs_probabilities_and_an_answer(serve):
    url = serve(lambda *_: chat("Yes")).url
    with pytest.raises(RuntimeError, match="no log-probabilities, which mode 'yes_no' needs: use mode 'score'"):
        RewardSet(VlmJudge("m", url))(PROMPTS[:1], IMAGES[:1])
    url = serve(lambda *_: chat("Hm", {"Hm": 0.9})).url
    assert np.isnan(RewardSet(VlmJudge("m", url))(PROMPTS[:1], IMAGES[:1])).all()
    url = serve(lambda *_: as_json({"error": "x"})).url
    with pytest.raises(RuntimeError, match="no chat interface"):
        RewardSet(VlmJudge("m", url))(PROMPTS[:1], IMAGES[:1])
    assert np.isnan(RewardSet(VlmJudge("m", url, on_failure="skip"))(PROMPTS[:1], IMAGES[:1])).all()


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 0.7), (" 10 ", 1.0), ("Score: 8.5 of 10", 0.85), ("0", 0.0), ("11", None), ("good", None), ("-3", None),
     ("7/10", 0.7), ("v2", None), ("", None)],
)  # fmt: skip
def test_rating_of_an_answer(text, value):
    assert rating(text) == value


def test_score_mode(serve):
    server = serve(lambda handler, body, number: chat(f"{pictures_of(body)[0].width}"))
    scores = RewardSet(VlmJudge("m", server.url, mode="score"))(PROMPTS, IMAGES)
    assert scores[:, 0] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


@pytest.mark.parametrize("probabilities", [True, False])
def test_pairwise_asks_both_orders_and_cancels_a_preference_for_one_place(serve, probabilities):
    """The judge prefers wide pictures, and otherwise the first one; alone, the latter must give exactly one half."""

    def answer(handler, body, number):
        a, b = (picture.width for picture in pictures_of(body))
        if not probabilities:
            return chat("1" if a >= b else "2")
        p = 0.9 if a > b else 0.7 if a == b else 0.2
        return chat("1", {"1": p, "2": 1 - p})

    images = [IMAGES[0], IMAGES[3], IMAGES[2], IMAGES[2]]
    server = serve(answer)
    judge = VlmJudge("m", server.url, mode="pairwise")
    scores = RewardSet(judge)(["a cat"] * 4, images)[:, 0]
    low = (0.2 + 0.1) / 2 if probabilities else 0.0
    assert scores == pytest.approx([low, 1 - low, 0.5, 0.5])
    assert len(server.requests) == 4
    everyone = RewardSet(VlmJudge("m", server.url, mode="pairwise", pairing="all"))(["a cat"] * 4, images)[:, 0]
    assert everyone[1] == pytest.approx(1 - low) and everyone[2] == everyone[3]
    assert len(server.requests) == 4 + 12
    assert np.isnan(RewardSet(judge)(PROMPTS[:2], IMAGES[:2])).all()  # nobody to compare with


def test_share_of_tokens():
    assert first_token_share({"logprobs": None}, "yes", "no") is None
    reply = json.loads(chat("x", {"\u2581Yes": 0.25, "No.": 0.25})[2])["choices"][0]
    assert first_token_share(reply, "yes", "no") == 0.5


def test_without_httpx2_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ImportError, match=r"needs httpx2: pip install 'es-trl\[remote\]'"):
        Endpoint("https://example.org/score")
