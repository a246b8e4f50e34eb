"""The page of a run while it trains: served on this machine only, from what is on disk, with a stop button."""

import logging
import os
import secrets
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from . import curves, wording
from .folder import Folder, read_folder
from .page import context, curve_charts, part
from .rendering import render


logger = logging.getLogger(__name__)

WATCHED = ("trainer_state.json", "samples/metadata.jsonl", "eval.json", "running.json")
HOST = "127.0.0.1"


class LivePage:
    """
    Serves the page of a run folder on the loopback interface, at an address that only who is told it knows.

    ```python
    page = LivePage("outputs/demo").start()
    print(page.url)  # over ssh: ssh -L PORT:127.0.0.1:PORT host, then the same address
    ```

    Args:
        folder (`str`): The run folder; it may still be empty.
        port (`int`, *optional*, defaults to 0): 0 takes a free one.
        running (`Callable`): Says of a folder what trains there, as [`~es_trl.run.live.running`].

    Raises:
        OSError: The port is taken.
    """

    def __init__(self, folder: str | os.PathLike, port: int = 0, running=lambda folder: None):
        self.folder, self.running = Path(folder), running
        self.token = secrets.token_urlsafe(16)
        self._lock, self._known = threading.Lock(), ("", b"")
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                answer = page.answer(self.path) if self.known_host() else None
                self.reply(*(answer or (404, "text/plain", b"not here")))

            def do_POST(self):
                done = self.known_host() and self.path == f"/{page.token}/stop" and page.stop()
                self.reply(200 if done else 404, "text/plain", b"stopping" if done else b"nothing to stop")

            def known_host(self) -> bool:
                """Not asked under another name: a foreign page may point its own at 127.0.0.1."""
                return self.headers.get("Host", "").rpartition(":")[0] in (HOST, "localhost")

            def reply(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)),
                           "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
                           "X-Content-Type-Options": "nosniff"}  # fmt: skip
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer((HOST, port), Handler)
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server.server_address[1]}/{self.token}/"

    def start(self) -> "LivePage":
        """Serves from a thread of its own; returns itself."""
        threading.Thread(target=self.server.serve_forever, name="es_trl live page", daemon=True).start()
        return self

    def close(self) -> None:
        """Stops serving."""
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str) -> tuple[int, str, bytes] | None:
        """Status, type and body for a path; `None` for what is not here."""
        if path == f"/{self.token}/version":
            return 200, "text/plain", self.version().encode()
        if path != f"/{self.token}/":
            return None
        version = self.version()
        with self._lock:
            if self._known[0] != version:
                try:
                    self._known = version, self.page().encode()
                except Exception as error:  # a page never ends a run; the next log makes it anew
                    logger.warning("The live page could not be made: %s", error, exc_info=True)
                    return 500, "text/plain", f"The page could not be made: {error}".encode()
            return 200, "text/html", self._known[1]

    def version(self) -> str:
        """Changes when the page does."""
        times = [(self.folder / name).stat().st_mtime_ns if (self.folder / name).is_file() else 0 for name in WATCHED]
        return "-".join(map(str, [*times, int(self.running(self.folder) is not None)]))

    def page(self) -> str:
        """The page as it is now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = read_folder(self.folder)
        entry = self.running(self.folder)
        if not folder.config and entry is not None:  # the run's own file comes with its first checkpoint
            folder.config = entry.get("run") or {}
        learned = part(lambda: curves.learning_curves(folder.history), curves.learning_curves([]))
        found = context(folder, learned, part(lambda: curve_charts(folder, learned), []))
        return render("run.html.j2", **found | live_context(folder, entry))

    def stop(self) -> bool:
        """Does what Ctrl-C does: the run ends at its next micro-batch, with a checkpoint. False where none trains."""
        entry = self.running(self.folder)
        if entry is None:
            return False
        os.kill(entry["pid"], signal.SIGINT)
        logger.info("the run in %s was asked to stop from its page", self.folder)
        return True


def live_context(folder: Folder, entry: dict[str, Any] | None) -> dict[str, Any]:
    """What the page says of a run that trains (`entry`, from `running.json`), or has just ended."""
    images, seconds = curves.spent(folder.history)
    step = max((line["step"] for line in folder.history), default=0)
    live: dict[str, Any] = {"running": entry is not None, "step": step, "images": images, "seconds": seconds}
    if entry is None:
        return {"live": live}
    live["max_steps"] = entry["max_steps"]
    done = step - entry["first_step"]
    log = folder.file("trainer_state.json")
    if done > 0 and log is not None:
        each = max(0.0, log.stat().st_mtime - entry["started"]) / done
        live["left"] = each * (entry["max_steps"] - step)
    rewards = [line["reward"] for line in folder.history if isinstance(line.get("reward"), int | float)]
    sentences = []
    if len(rewards) > 1:
        change = wording.signed(rewards[-1] - rewards[0])
        sentences.append(
            f"The trained reward of the last batches is {wording.number(rewards[-1])}, {change} since the first ones."
        )
    title = f"Step {step} of {entry['max_steps']}" if step else "The first step is being drawn"
    return {"live": live, "head": {"title": title, "lede": sentences or ["Nothing has been logged yet."], "gaps": []}}
