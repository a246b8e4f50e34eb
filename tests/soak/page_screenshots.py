"""Works the voting page and the Gradio demo in headless Chromium, checks them, and takes pictures.

    apt-get install chromium && pip install gradio websockets
    python tests/soak/page_screenshots.py --output_dir outputs/screens voting
    python tests/soak/page_screenshots.py --output_dir outputs/screens space outputs/demo

On a phone-wide (390 px) and a desktop-wide (1440 px) window: no error on the console, no request to another machine,
nothing wider than the window; votes by key, click and finger arrive; the demo draws when it is opened and again with
another seed. Prints JSON; the exit code is 1 when a check fails.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import torch
from report_screenshots import OVERFLOW, WINDOWS, Browser, chromium, complaints

from es_trl.assets import resolve
from es_trl.pipelines import CallSettings, PipelineAdapter, load_pipeline
from es_trl.rewards import Human, RewardSet


PROMPTS = [
    "four red trees",
    "a yellow house on a pink background, seen from far away on a <b>rainy</b> evening & night",
]
KEYS = {
    "ArrowLeft": {"code": "ArrowLeft", "windowsVirtualKeyCode": 37},
    "ArrowRight": {"code": "ArrowRight", "windowsVirtualKeyCode": 39},
    "Backspace": {"code": "Backspace", "windowsVirtualKeyCode": 8},
    " ": {"code": "Space", "windowsVirtualKeyCode": 32, "text": " "},
}
DRAWN = "[...document.querySelectorAll('img')].filter(i => i.src.includes('/file=') && i.naturalWidth).map(i => i.src)"
NEW_SEED = "[...document.querySelectorAll('button')].find(b => b.innerText.trim() === 'New seed').click()"


def until(browser: Browser, condition: str, seconds: float = 60.0) -> None:
    """Waits until JavaScript says true."""
    for _ in range(int(seconds * 10)):
        if browser.value(condition):
            return
        time.sleep(0.1)
    raise TimeoutError(f"waited {seconds:g} s for {condition}")


def press(browser: Browser, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, **KEYS[key])


def touch(browser: Browser, selector: str, phone: bool) -> None:
    """Clicks, or on a phone taps, the middle of an element."""
    box = f"document.querySelector('{selector}').getBoundingClientRect()"
    x, y = browser.value(f"(b => [b.left + b.width / 2, b.top + b.height / 2])({box})")
    if phone:
        browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        return
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, x=x, y=y)


def strangers(browser: Browser, address: str) -> list[str]:
    """Complaints of the console, and requests to anything but the page's own server."""
    home = f"asks for {urlsplit(address).scheme}://{urlsplit(address).netloc}/"
    return [line for line in complaints(browser.events) if not line.startswith((home, "asks for blob:"))]


class Scoring(threading.Thread):
    """Asks for the scores of eight pictures, four comparisons, and waits for the votes."""

    def __init__(self, human: Human, prompts: list[str], pictures: list):
        super().__init__(daemon=True)
        self.rewards, self.prompts, self.pictures, self.scores = RewardSet(human), prompts, pictures, None
        self.start()

    def run(self):
        self.scores = self.rewards(self.prompts, self.pictures)[:, 0].tolist()


def voting(browser: Browser, output: Path) -> list[dict]:
    """A round per window: votes by key and by click or finger, a tie, and one that is taken back."""
    pipe = PipelineAdapter(load_pipeline(resolve("tiny-sana-sprint")), settings=CallSettings(num_inference_steps=1))
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    pictures = pipe.generate(prompts, [torch.Generator("cpu").manual_seed(i) for i in range(8)])
    human, results = Human(), []
    address = human.start()
    at = "state && state.total ? state.index : -1"
    for (name, (width, height, phone)), dark in itertools.product(WINDOWS.items(), (False, True)):
        picture = f"voting-{name}-{'dark' if dark else 'light'}"
        browser.events.clear()
        browser.open(address, width, height, phone, dark)
        until(browser, "document.body.innerText.includes('Nothing to compare')")
        browser.screenshot(output / f"{picture}-waiting.png", width, whole=False)
        scoring = Scoring(human, prompts, pictures)
        until(browser, "['left', 'right'].every(side => document.getElementById(side).naturalWidth)")
        browser.screenshot(output / f"{picture}.png", width, whole=False)
        too_wide = browser.value(OVERFLOW)
        for index, act in enumerate(
            (
                lambda: press(browser, "ArrowLeft"),
                lambda: press(browser, "Backspace"),
                lambda: press(browser, "ArrowRight"),
                lambda phone=phone: touch(browser, "[data-choice=left]", phone),
                lambda: press(browser, " "),
                lambda phone=phone: touch(browser, "[data-choice=right]", phone),
            )
        ):
            until(browser, f"({at}) === {(0, 1, 0, 1, 2, 3)[index]}")
            if index == 4:  # a long prompt with markup in it
                until(browser, "['left', 'right'].every(side => document.getElementById(side).naturalWidth)")
                browser.screenshot(output / f"{picture}-long.png", width, whole=False)
                too_wide |= browser.value(OVERFLOW)
                markup = browser.value("!!document.querySelector('h1 b')")
            act()
        scoring.join(timeout=30)
        found = strangers(browser, address)
        right = sorted(scoring.scores or []) == [0, 0, 0, 0.5, 0.5, 1, 1, 1]
        results.append({"page": "voting", "window": name, "dark": dark, "complaints": found, "too_wide": too_wide,
                        "markup_of_a_prompt_acts": markup, "votes_arrived": right,
                        "fine": right and not (found or too_wide or markup)})  # fmt: skip
    human.stop()
    return results


@contextlib.contextmanager
def demo(adapter: str):
    """The Gradio page as its README starts it. Yields the address."""
    app = Path(__file__).resolve().parents[2] / "recipes" / "space" / "app.py"
    port = "7869"
    environment = os.environ | {"GRADIO_SERVER_PORT": port, "GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen([sys.executable, str(app), adapter], env=environment)
    address = f"http://127.0.0.1:{port}/"

    try:
        for _ in range(1800):
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
                break
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def space(browser: Browser, output: Path, adapter: str) -> list[dict]:
    """Opens the demo, waits for its two pictures, asks for another seed, and compares."""
    results = []
    with demo(adapter) as address:
        for name, (width, height, phone) in WINDOWS.items():
            browser.events.clear()
            browser.open(address, width, height, phone, dark=False)
            until(browser, f"{DRAWN}.length >= 2", 400)
            first = json.dumps(browser.value(DRAWN))
            time.sleep(1)
            too_wide = browser.value(OVERFLOW)
            browser.screenshot(output / f"space-{name}.png", width)
            browser.value(NEW_SEED)
            until(browser, f"{DRAWN}.length >= 2 && !{DRAWN}.some(source => {first}.includes(source))", 400)
            found = strangers(browser, address)
            results.append({"page": "space", "window": name, "complaints": found, "too_wide": too_wide,
                            "fine": not (found or too_wide)})  # fmt: skip
    return results


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=["voting", "space"])
    parser.add_argument("adapter", nargs="?", help="for the space: a run folder or Hub id")
    parser.add_argument("--output_dir", required=True, help="folder for the pictures")
    parser.add_argument("--chromium", default="chromium", help="the browser's program")
    arguments = parser.parse_args(argv)
    if arguments.page == "space" and not arguments.adapter:
        parser.error("name the adapter that the space shows")
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with chromium(arguments.chromium) as browser:
        results = voting(browser, output) if arguments.page == "voting" else space(browser, output, arguments.adapter)
    print(json.dumps(results, indent=2))
    return 0 if all(result["fine"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
