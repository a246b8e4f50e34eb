"""Opens a report page in headless Chromium: pictures of it, and checks that a reader's browser has no complaint.

    apt-get install chromium && pip install websockets
    python tests/soak/report_screenshots.py outputs/demo/report/index.html --output_dir outputs/screens

On a phone-wide (390 px) and a desktop-wide (1440 px) window, light and dark: no error on the console, nothing asked of
the network, nothing wider than the window, and the first slider follows the keyboard, the mouse and a finger. Prints
JSON; the exit code is 1 when a check fails.
"""

import argparse
import base64
import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from websockets.sync.client import connect


WINDOWS = {"phone": (390, 844, True), "desktop": (1440, 900, False)}
OVERFLOW = "document.documentElement.scrollWidth > innerWidth"
SLIDER = "document.querySelector('.stage input')"


class Browser:
    """Chromium behind its DevTools protocol."""

    def __init__(self, socket):
        self.socket, self.ids, self.events = socket, itertools.count(1), []

    def call(self, method: str, **params):
        """Sends a command and returns its result; events that come first are kept."""
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=120))
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def value(self, expression: str):
        """Evaluates JavaScript."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def open(self, url: str, width: int, height: int, phone: bool, dark: bool):
        """Loads a page in a window and waits for it."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.value("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")

    def screenshot(self, path: Path, width: int, whole: bool = True):
        """Saves the whole page, or what the window shows, as PNG."""
        height = self.value("document.documentElement.scrollHeight") if whole else None
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1} if whole else None
        found = self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole, **({"clip": clip} if clip else {})
        )
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def chromium(binary: str):
    """A headless browser of its own, with a profile that is thrown away."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--disable-extensions", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            line = next(line for line in process.stderr if "DevTools listening on" in line)
            with connect(re.search(r"ws://\S+", line).group(), max_size=None) as root:
                browser = Browser(root)
                target = browser.call("Target.createTarget", url="about:blank")["targetId"]
            url = re.sub(r"/browser/.*", f"/page/{target}", re.search(r"ws://\S+", line).group())
            with connect(url, max_size=None) as page:
                browser = Browser(page)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    browser.call(f"{domain}.enable")
                yield browser
        finally:
            process.terminate()
            process.wait(timeout=30)


def complaints(events: list[dict]) -> list[str]:
    """Errors and warnings of the console, and every request that leaves the page."""
    found = []
    for event in events:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            found.append(json.dumps(params["exceptionDetails"])[:300])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            found.append(json.dumps(params["args"])[:300])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            found.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not re.match("file:|data:|about:", params["request"]["url"]):
            found.append(f"asks for {params['request']['url']}")
    return found


def try_slider(browser: Browser, phone: bool) -> dict[str, bool]:
    """Moves the first slider by keyboard, mouse and (on a phone) finger; each must move the picture too."""
    if not browser.value(f"!!{SLIDER}"):
        return {}
    browser.value(f"{SLIDER}.scrollIntoView({{block: 'center', behavior: 'instant'}}); {SLIDER}.focus()")
    state = f"[Number({SLIDER}.value), getComputedStyle({SLIDER}.parentNode).getPropertyValue('--at')]"
    key = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
    start = browser.value(state)
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, **key)
    after = browser.value(state)
    moved = {"keyboard": after[0] == start[0] + 1 and after[1] == f"{after[0]}%"}
    box = browser.value(f"(b => [b.left, b.top, b.width, b.height])({SLIDER}.getBoundingClientRect())")
    at = lambda share: {"x": box[0] + share * box[2], "y": box[1] + box[3] / 2}  # noqa: E731
    if phone:
        for kind, points in (
            ("touchStart", [at(0.5)]),
            ("touchMove", [at(0.35)]),
            ("touchMove", [at(0.2)]),
            ("touchEnd", []),
        ):
            browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
        moved["finger"] = abs(browser.value(state)[0] - 20) <= 1
    else:
        for kind, share in (("mousePressed", 0.5), ("mouseMoved", 0.65), ("mouseMoved", 0.8), ("mouseReleased", 0.8)):
            browser.call("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **at(share))
        moved["mouse"] = abs(browser.value(state)[0] - 80) <= 1
    return moved


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", help="index.html of a report")
    parser.add_argument("--output_dir", required=True, help="folder for the pictures")
    parser.add_argument("--chromium", default="chromium", help="the browser's program")
    arguments = parser.parse_args(argv)
    url = Path(arguments.page).resolve().as_uri()
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    results, fine = [], True
    with chromium(arguments.chromium) as browser:
        for (name, (width, height, phone)), dark in itertools.product(WINDOWS.items(), (False, True)):
            browser.events.clear()
            browser.open(url, width, height, phone, dark)
            scheme = "dark" if dark else "light"
            browser.screenshot(output / f"{name}-{scheme}.png", width)
            overflow = browser.value(OVERFLOW)
            moved = try_slider(browser, phone)
            browser.screenshot(output / f"{name}-{scheme}-slider.png", width, whole=False)
            before = browser.value("getComputedStyle(document.body).backgroundColor")
            browser.value("document.getElementById('theme').click()")
            toggled = browser.value("getComputedStyle(document.body).backgroundColor") != before
            browser.value("try { localStorage.clear() } catch {}")
            found = complaints(browser.events)
            fine = fine and not found and not overflow and toggled and all(moved.values())
            results.append(
                {"window": name, "theme": scheme, "complaints": found, "too_wide": overflow, "slider": moved,
                 "theme_button": toggled}
            )  # fmt: skip
    print(json.dumps({"page": arguments.page, "fine": fine, "checks": results}, indent=2))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
