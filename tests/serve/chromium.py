"""A headless Chromium, driven by its DevTools protocol through two pipes: no further library, no port.

Messages are JSON, each ended by a zero byte (https://chromedevtools.github.io/devtools-protocol/).
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Chromium wants its pipes as descriptors 3 and 4.
BOOT = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"


def found() -> str | None:
    """Where Chromium is, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _high(descriptor: int) -> int:
    """A descriptor of the same pipe that is in nobody's way."""
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 20)
    os.close(descriptor)
    return high


class Browser:
    """One page of a headless Chromium; `problems` are what its console and network complained of."""

    def __init__(self, profile: Path, width: int = 1200, height: int = 900) -> None:
        path = found()
        assert path is not None
        ours_read, theirs_write = map(_high, os.pipe())
        theirs_read, ours_write = map(_high, os.pipe())
        flags = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
            *("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream", "--mute-audio"),
            *("--autoplay-policy=no-user-gesture-required", f"--user-data-dir={profile}"),
            f"--window-size={width},{height}",
        ]
        command = [sys.executable, "-c", BOOT, str(theirs_read), str(theirs_write), path, *flags, "about:blank"]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs_read, theirs_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_read)
        os.close(theirs_write)
        self._in, self._out, self._number, self._rest = ours_read, ours_write, 0, b""
        self.session: str | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.console: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        self.size(width, height)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser, and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self.session and not method.startswith("Target."):
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 30
        while True:
            got = self._message(deadline)
            if got.get("id") == self._number:
                assert "error" not in got, f"{method}: {got['error']}"
                result: dict[str, Any] = got["result"]
                return result
            self._event(got)

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message

    def _event(self, message: dict[str, Any]) -> None:
        name, held = message.get("method"), message.get("params", {})
        if name == "Network.requestWillBeSent":
            self.requests.append(held["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.problems.append(str(held["exceptionDetails"]))
        elif name == "Log.entryAdded" and held["entry"]["level"] == "error":
            self.problems.append(f"{held['entry']['text']} {held['entry'].get('url', '')}")
        elif name == "Runtime.consoleAPICalled":
            self.console.append(str(held["args"]))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        got = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def until(self, script: str, seconds: float = 15.0) -> Any:
        """Wait for an expression to become true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script}\n{self.problems}\n{self.run('document.body.innerText')}"
            time.sleep(0.03)
        return value

    def open(self, address: str) -> None:
        """Go to a page, and wait until its script knows the model."""
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && document.querySelector('#layer')?.options.length > 0")

    def choose(self, *paths: Path) -> None:
        """Choose files, as a user does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def key(self, name: str, code: int = 0, text: str = "") -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code, **extra)

    def click(self, selector: str, across: float = 0.5) -> None:
        """Click on an element, at a part of its width."""
        self._mouse(selector, across, "mousePressed", "mouseReleased")

    def hover(self, selector: str, across: float = 0.5) -> None:
        """Move the pointer over an element."""
        self._mouse(selector, across, "mouseMoved")

    def _mouse(self, selector: str, across: float, *kinds: str) -> None:
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return [b.left, b.top, b.width, b.height]; })()"
        )
        where = {"x": box[0] + across * box[2], "y": box[1] + box[3] / 2}
        for kind in kinds:
            pressed = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **where, **pressed)

    def size(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Another screen."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def picture(self, path: Path) -> None:
        """A PNG of the whole page."""
        got = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(got["data"]))

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        self.process.wait(10)
        os.close(self._in)
        os.close(self._out)
