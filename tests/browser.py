"""Headless Chromium driven by its DevTools protocol over a pipe: what a person with mouse or keyboard does to a page.

Debian's `chromium` is enough; nothing listens on a port and nothing is installed.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ABSENT = "no chromium on this machine (Debian: apt-get install chromium)"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--disable-dev-shm-usage",
    "--force-color-profile=srgb", "--font-render-hinting=none",
)  # fmt: skip
KEYS = {"Enter": (13, "\r"), " ": (32, " "), "Tab": (9, ""), "Escape": (27, ""), "Backspace": (8, "")}
ARROWS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35}
PATIENCE = 60.0


class Browser:
    """One browser with one page at a time. `log`: messages of the console and uncaught errors; `requests`: addresses
    that the page asked for, its own first. A context: the browser ends with it."""

    def __init__(self) -> None:
        assert PROGRAM is not None, ABSENT
        self.log: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-")
        inward, outward = os.pipe(), os.pipe()
        # the browser reads commands from descriptor 3 and answers on 4; high numbers first, so that none is overwritten
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 60) for fd in (inward[0], outward[1])]
        words = [PROGRAM, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        line = f'exec "$0" "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
        quiet: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(["bash", "-c", line, *words], pass_fds=theirs, start_new_session=True, **quiet)
        for fd in (inward[0], outward[1], *theirs):
            os.close(fd)
        self._to, self._from, self._left, self._count = inward[1], outward[0], b"", 0
        self._session = ""

    def __enter__(self) -> Browser:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *about: object) -> None:
        self._session = ""
        with contextlib.suppress(Exception):
            self._call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        with contextlib.suppress(OSError):
            self._profile.cleanup()

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False, phone: bool = False) -> None:
        """Load a file as a window of this size shows it."""
        self.log.clear()
        self.requests.clear()
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", media="", features=scheme)
        self._call("Page.navigate", url=page.as_uri())
        self.until("document.readyState === 'complete' && location.protocol === 'file:'")

    def print_media(self) -> None:
        """Show the page that is open as it is printed, until the next one is opened."""
        self._call("Emulation.setEmulatedMedia", media="print")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page, a promise's outcome included. Raises RuntimeError if it throws."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:800])
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until this holds in the page."""
        end = time.monotonic() + PATIENCE
        while not self.js(f"Boolean({expression})"):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {expression}")
            time.sleep(0.02)

    def click(self, element: str) -> None:
        """Press the mouse in the middle of what this expression gives, scrolled into view."""
        x, y = self.hover(element)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, element: str) -> tuple[float, float]:
        """Move the pointer there; returns where that is."""
        x, y = self.js(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center', inline: 'center'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def press(self, *keys: str, shift: bool = False) -> None:
        """Press keys one after the other; a text of several letters that names no key is typed."""
        for key in keys:
            if key in KEYS or key in ARROWS:
                code, text = KEYS.get(key, (ARROWS.get(key, 0), ""))
                about: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
                self._call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
                self._call("Input.dispatchKeyEvent", type="keyUp", **about)
            else:
                self._call("Input.insertText", text=key)

    def shot(self) -> bytes:
        """PNG of what the window shows."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def _call(self, method: str, **parameters: Any) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._to, content) :]
        end = time.monotonic() + PATIENCE
        while True:
            answer = self._next(end, method)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _next(self, end: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._from], [], [], max(end - time.monotonic(), 0))
            part = os.read(self._from, 1 << 16) if ready else b""
            if not part:
                raise TimeoutError(f"the browser did not answer {method}")
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        about = event.get("params", {})
        if event.get("method") == "Runtime.consoleAPICalled":
            self.log.append(f"{about['type']}: {[a.get('value') for a in about['args']]}")
        elif event.get("method") == "Runtime.exceptionThrown":
            self.log.append(f"uncaught: {json.dumps(about['exceptionDetails'])[:500]}")
        elif event.get("method") == "Log.entryAdded":
            self.log.append(f"{about['entry']['level']}: {about['entry']['text']}")
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"].partition(",")[0])
