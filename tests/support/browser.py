"""Drive headless Chromium through its pipe, without a driver program."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
TIMEOUT_S = 60.0
BLANK = "about:blank"


class Browser:
    """One tab of a headless Chromium.

    Args:
        folder: folder for its profile.
        options: further options of Chromium.

    Attributes:
        messages: texts that the console of the page got, and errors of its scripts and of its content security policy.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        to_browser, ours = os.pipe()
        theirs, from_browser = os.pipe()[::-1]
        wanted = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        wanted += ["--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={folder}", *options, BLANK]
        self._in, self._out, self._text = ours, from_browser, b""
        shell = f'exec {CHROMIUM} "$@" 3<&{to_browser} 4>&{theirs}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *wanted],
            pass_fds=(to_browser, theirs),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(theirs)
        self._number, self.messages, self._session = 0, [], ""
        target = self.call("Target.createTarget", url=BLANK)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Send a command, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._in, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            reply = self._next(deadline)
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]
            self._note(reply)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._text:
            ready, _, _ = select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser gives no answer"
            piece = os.read(self._out, 1 << 20)
            assert piece, "the browser has ended"
            self._text += piece
        text, self._text = self._text.split(b"\0", 1)
        return json.loads(text)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(params["exceptionDetails"]))

    def open(self, url: str) -> None:
        """Load a page and wait for its end."""
        self.call("Page.navigate", url=url)
        loaded = "document.readyState === 'complete'"
        self.wait(loaded if url == BLANK else f"{loaded} && location.href !== '{BLANK}'")

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            value = self.run(f"(() => {{ try {{ return {script} }} catch (e) {{ return false }} }})()")
            if value:
                return value
            assert time.monotonic() < deadline, f"{script}: {self.run('document.body.innerText')}"
            time.sleep(0.05)

    def text(self) -> str:
        """Return the visible text of the page."""
        return self.run("document.body.innerText")

    def resize(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Set the size of the page in CSS pixels, and its color scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser and its profile."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Start headless Chromium, or skip the test without Chromium."""
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    started = Browser(tmp_path_factory.mktemp("chromium"), "--ignore-certificate-errors")
    yield started
    started.close()


@pytest.fixture
def page(browser):
    """Give a tab of headless Chromium without messages, and empty it afterwards."""
    browser.resize(1100)
    yield browser
    browser.open(BLANK)
    browser.messages.clear()
