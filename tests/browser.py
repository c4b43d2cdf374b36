"""Chromium without a window, driven over its DevTools protocol by pipes; nothing but the standard library."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-extensions", "--disable-component-update", "--remote-debugging-pipe",
]  # fmt: skip


def binary():
    """Path of the browser, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser. `events` are those since the last :meth:`open`.

    Raises:
        RuntimeError, OSError: it ended. TimeoutError: it said nothing.
    """

    def __init__(self, profile, patience=60.0):
        self.patience, self.events, self._number, self._rest = patience, [], 0, b""
        theirs, self._to = os.pipe()
        self._from, other = os.pipe()
        # The browser reads commands from descriptor 3 and writes to 4.
        high = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (theirs, other)]
        start = f"import os, sys; os.dup2({high[0]}, 3); os.dup2({high[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-S", "-c", start, binary(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=high, **silent)
        for number in (theirs, other, *high):
            os.close(number)
        self.session = None
        try:
            self._attach()
        except Exception:
            self.close()
            raise

    def _attach(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method, **params):
        """The result of a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == message["id"])
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _until(self, wanted):
        """Reads messages up to the first that is wanted."""
        end = time.monotonic() + self.patience
        while True:
            while b"\0" in self._rest:
                text, self._rest = self._rest.split(b"\0", 1)
                found = json.loads(text)
                if "method" in found:
                    self.events.append(found)
                if wanted(found):
                    return found
            if not select.select([self._from], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError(f"the browser said nothing for {self.patience} s")
            part = os.read(self._from, 1 << 16)
            if not part:
                raise RuntimeError("the browser has ended")
            self._rest += part

    def open(self, path):
        """Load a file."""
        self.events.clear()
        loader = self.call("Page.navigate", url=path.as_uri())["loaderId"]

        def loaded(event):
            found = event.get("params", {})
            return event.get("method") == "Page.lifecycleEvent" and (found["loaderId"], found["name"]) == (
                loader,
                "load",
            )

        if not any(map(loaded, self.events)):
            self._until(loaded)

    def ask(self, expression):
        """Value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def media(self, width=1280, scheme="light", medium=""):
        """Width of the page, colour scheme, and medium (`print`)."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=medium, features=features)

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._to)
        os.close(self._from)
