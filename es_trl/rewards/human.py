"""People as the reward: a voting page on this machine that shows two pictures of one prompt at a time."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import re
import secrets
import threading
import weakref
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from ..pictures import rgb
from .preferences import check_pairing, members_of_groups, pairs_within, share_won


if TYPE_CHECKING:
    from PIL import Image


logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("human_page.html")
CHOICES = {"left": 1.0, "right": 0.0, "tie": 0.5}
MAX_BODY_BYTES = 1000


class Human:
    """
    Share of comparisons that a picture wins, in [0, 1], by votes on a page at `http://127.0.0.1:<port>/<secret>/`.

    In a config, `human:8123` fixes the port of the page.

    The address is logged when the first comparisons wait. The page is worked with the keyboard: left and right arrow
    choose, space is a tie, backspace takes the last vote back. Which picture stands left is drawn by lot, so that a
    preference for one side favours nobody. Training waits for the votes; a group must be whole, so it needs a single
    process.

    Args:
        pairing (`str`, *optional*, defaults to `"neighbours"`):
            Who meets whom, see `es_trl.rewards.preferences`: one comparison per two pictures, or all with all.
        port (`int`, *optional*, defaults to `0`): port of the page; 0 takes a free one.
        timeout (`float`, *optional*): seconds after which a step goes on with the votes it has; a picture without any
            gets no score. By default it waits for as long as it takes.
    """

    groupwise = True
    asks_people = True
    __name__ = "human"

    def __init__(self, pairing: str = "neighbours", port: int = 0, timeout: float | None = None):
        check_pairing(pairing)
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout of the human reward must be above 0 seconds or None, not {timeout!r}")
        self.pairing, self.port, self.timeout = pairing, port, timeout
        self.ballot = Ballot()
        self._server: ThreadingHTTPServer | None = None
        self._secret = secrets.token_urlsafe(16)

    async def __call__(self, prompts, images, groups=None, **kwargs) -> list[float | None]:
        pairs = [pair for group in members_of_groups(prompts, groups) for pair in pairs_within(group, self.pairing)]
        if not pairs:
            return [None] * len(images)
        address = self.start()
        logger.warning("%d comparisons wait for votes at %s", len(pairs), address)
        complete = self.ballot.open(
            [Comparison(prompts[i], (images[i], images[j]), _swapped(n, prompts[i])) for n, (i, j) in enumerate(pairs)]
        )
        waited = 0.0
        while not complete.is_set() and (self.timeout is None or waited < self.timeout):
            await asyncio.sleep(0.05)
            waited += 0.05
        votes = self.ballot.close()
        return share_won(len(images), [(i, j, p) for (i, j), p in zip(pairs, votes, strict=True)])

    def start(self) -> str:
        """Start the page if it does not run yet. Returns its address."""
        if self._server is None:
            handler = type("Handler", (_Handler,), {"ballot": self.ballot, "secret": self._secret})
            self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
            self._server.daemon_threads = True
            threading.Thread(target=self._server.serve_forever, args=(0.05,), name="es_trl-human", daemon=True).start()
            self._finalizer = weakref.finalize(self, _stop, self._server)
        return f"http://127.0.0.1:{self._server.server_address[1]}/{self._secret}/"

    def stop(self) -> None:
        """Stop the page."""
        if self._server is not None:
            self._finalizer()
            self._server = None


@dataclass
class Comparison:
    """Two pictures of one prompt; with `swapped` the second stands left. `vote`: how far the first wins, or None."""

    prompt: str
    images: tuple[Image.Image, Image.Image]
    swapped: bool
    vote: float | None = None

    def shown(self, side: str) -> Image.Image:
        return self.images[(side == "right") != self.swapped]


@dataclass
class Ballot:
    """The comparisons that wait for votes; every access holds the lock."""

    comparisons: list[Comparison] = field(default_factory=list)
    round: int = 0
    complete: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, comparisons: list[Comparison]) -> threading.Event:
        """Put up a new round. Returns the event of its last vote."""
        with self.lock:
            self.comparisons, self.complete = comparisons, threading.Event()
            self.round += 1
            return self.complete

    def close(self) -> list[float | None]:
        """Take the round down. Returns its votes."""
        with self.lock:
            votes = [comparison.vote for comparison in self.comparisons]
            self.comparisons = []
            return votes

    def state(self) -> dict:
        """What the page shows."""
        with self.lock:
            done = [comparison.vote is not None for comparison in self.comparisons]
            index = done.index(False) if False in done else len(done)
            prompt = self.comparisons[index].prompt if index < len(done) else ""
            return {"round": self.round, "index": index, "total": len(done), "prompt": prompt}

    def vote(self, number: int, index: int, choice: str) -> bool:
        """Count a vote; False if it is for anything but what is open now. `"undo"` takes back vote `index - 1`."""
        with self.lock:
            votes = [comparison.vote for comparison in self.comparisons]
            current = votes.index(None) if None in votes else len(votes)
            if number != self.round or index != current or self.complete.is_set():
                return False
            if choice == "undo":
                if index == 0:
                    return False
                self.comparisons[index - 1].vote = None
                return True
            if choice not in CHOICES or index >= len(votes):
                return False
            win = CHOICES[choice]
            comparison = self.comparisons[index]
            comparison.vote = 1 - win if comparison.swapped else win
            if index == len(votes) - 1:
                self.complete.set()
            return True

    def picture(self, number: int, index: int, side: str) -> bytes | None:
        """PNG of one side, or None if that comparison is not there."""
        with self.lock:
            if number != self.round or not 0 <= index < len(self.comparisons):
                return None
            image = self.comparisons[index].shown(side)
        buffer = io.BytesIO()
        rgb(image).save(buffer, format="PNG")
        return buffer.getvalue()


class _Handler(BaseHTTPRequestHandler):
    """`GET /<secret>/`, `/state`, `/<round>/<index>/left|right.png`; `POST /<secret>/vote`."""

    ballot: Ballot
    secret: str
    timeout = 30

    def do_GET(self):
        path = self._inner_path()
        if path is None:
            return
        picture = re.fullmatch(r"(\d+)/(\d+)/(left|right)\.png", path)
        if path == "":
            nonce = secrets.token_urlsafe(12)
            page = PAGE.read_text(encoding="utf-8").replace("{nonce}", nonce)
            self._send(200, page.encode(), "text/html; charset=utf-8", nonce)
        elif path == "state":
            self._send(200, json.dumps(self.ballot.state()).encode(), "application/json")
        elif picture:
            content = self.ballot.picture(int(picture[1]), int(picture[2]), picture[3])
            self._send(200 if content else 404, content or b"", "image/png")
        else:
            self._send(404, b"", "text/plain")

    def do_POST(self):
        if self._inner_path() != "vote":
            return self._send(404, b"", "text/plain")
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 < length <= MAX_BODY_BYTES:
                raise ValueError("length")
            body = json.loads(self.rfile.read(length))
            number, index, choice = body["round"], body["index"], body["choice"]
        except (ValueError, KeyError, TypeError):
            return self._send(400, b"{}", "application/json")
        taken = self.ballot.vote(number, index, choice)
        return self._send(200 if taken else 409, json.dumps(self.ballot.state()).encode(), "application/json")

    def _inner_path(self) -> str | None:
        """The path after the secret; answers 404 and returns None without it, or if asked under another host name."""
        _, secret, *rest = self.path.split("?")[0].split("/", 2) + [""]
        host = self.headers.get("Host", "").rpartition(":")[0]  # a foreign page may point its own name at 127.0.0.1
        if host in ("127.0.0.1", "localhost") and secrets.compare_digest(secret.encode(), self.secret.encode()):
            return rest[0]
        self._send(404, b"", "text/plain")
        return None

    def _send(self, status: int, body: bytes, kind: str, nonce: str = "") -> None:
        inline = f"'nonce-{nonce}'" if nonce else "'none'"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header(
            "Content-Security-Policy",
            f"default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src {inline}; style-src {inline}; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        )
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args) -> None:
        logger.debug(format, *args)


def _swapped(index: int, prompt: str) -> bool:
    """By lot, and the same lot for the same comparison of a repeated run."""
    return bool(hashlib.blake2b(f"{index} {prompt}".encode(errors="replace")).digest()[0] & 1)


def _stop(server: ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()
