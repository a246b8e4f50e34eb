"""One writer to a folder: a lock that outlives no process, also across machines that share a disk."""

import json
import logging
import os
import socket
import threading
from pathlib import Path
from typing import Any

import psutil


logger = logging.getLogger(__name__)

BEAT_SECONDS = 20.0
STALE_SECONDS = 120.0  # without a beat; only asked of locks of another machine, whose processes cannot be seen


def this_process() -> dict[str, Any]:
    """What tells this process from all others, for a file that others read: host, number, and when it started."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "process": psutil.Process().create_time()}


def lives(entry: dict[str, Any]) -> bool:
    """Whether the process of an entry ([`this_process`]) runs on this machine."""
    try:
        # A number is given out again, and in a container the run before this one may have had our own.
        started = psutil.Process(entry["pid"]).create_time()
        return entry["host"] == socket.gethostname() and abs(started - float(entry["process"])) < 2
    except (psutil.Error, LookupError, TypeError, ValueError):
        return False


class FolderInUse(ValueError):
    """Another run, or another evaluation, writes into the folder."""


class FolderLock:
    """
    The file `run.lock`, of an evaluation `eval.lock`, which names the process that writes into a folder. One of a
    process that is gone, on this machine, or that shows no sign of life for two minutes, on another, is taken over.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str = "run.lock"):
        self.path = Path(folder, name)
        self._depth = 0
        self._ended, self._beats = threading.Event(), threading.Thread()

    def check(self) -> None:
        """Raises `FolderInUse` while somebody else writes into the folder."""
        holder = self._holder()
        if self._depth == 0 and holder is not None and self._is_alive(holder):
            known = {"pid", "host"} <= holder.keys()
            who = f"process {holder['pid']} on {holder['host']}" if known else "another process"
            raise FolderInUse(
                f"output_dir={str(self.path.parent)!r} is in use: {who} writes into it. Give another output_dir, or "
                f"end that process; if there is none, delete {self.path}."
            )

    def __enter__(self) -> "FolderLock":
        if self._depth == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take()
            self._ended = threading.Event()
            self._beats = threading.Thread(target=self._beat, args=(self._ended,), name="es_trl-lock", daemon=True)
            self._beats.start()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._ended.set()
            self._beats.join(timeout=5)  # a disk that hangs keeps nobody
            self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        for _ in range(3):
            self.check()
            if self.path.exists():
                stale = self.path.with_name(f"{self.path.name}-stale-{os.getpid()}")
                try:
                    os.rename(self.path, stale)  # of several that see a stale lock one can move it away
                except FileNotFoundError:
                    continue
                logger.warning("Taking over %s, whose process is gone.", self.path)
                stale.unlink()
            try:
                with open(self.path, "x", encoding="utf-8") as file:
                    file.write(json.dumps(this_process()) + "\n")
                return
            except FileExistsError:
                continue
        raise FolderInUse(f"output_dir={str(self.path.parent)!r} is being taken by another process at this moment.")

    def _holder(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError):  # being written, or torn: its time decides
            found = None
        return found if isinstance(found, dict) else {}

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == socket.gethostname() and isinstance(holder.get("pid"), int):
            return lives(holder)
        return self._age() < STALE_SECONDS

    def _age(self) -> float:
        """Seconds since the last beat by the clock of the disk, which may not be this machine's."""
        probe = self.path.with_name(f"{self.path.name}-now-{os.getpid()}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return STALE_SECONDS
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError as error:
                logger.debug("No beat: %s", error)
