"""A page in Chromium, over its debugging pipe: what it asks for, what it complains about, how it looks."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
).split()


class Page:
    """One tab.

    Attributes:
        events: parameters of what it told so far, by name.
    """

    def __init__(self, commands, answers):
        self._commands, self._answers, self._number, self._session = commands, answers, 0, None
        self.events = defaultdict(list)
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Runtime", "Log", "Page"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        """Result of a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        self._commands.write(json.dumps(message | ({"sessionId": self._session} if self._session else {})) + "\0")
        self._commands.flush()
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        text = ""
        while not text.endswith("\0"):
            part = self._answers.read(1)
            assert part, "Chromium is gone"
            text += part
        message = json.loads(text[:-1])
        self.events[message.get("method")].append(message.get("params"))
        return message

    def open(self, url):
        """Load a page, all that it asks for included."""
        self("Page.navigate", url=url)
        while not self.events["Page.loadEventFired"]:
            self._next()

    @property
    def requests(self):
        """Addresses asked for so far, the page's own among them."""
        return [event["request"]["url"] for event in self.events["Network.requestWillBeSent"]]

    @property
    def complaints(self):
        """What stands in the console so far, errors and refusals among it."""
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for name in names for event in self.events[name]]

    def evaluate(self, expression):
        """Value of a JavaScript expression."""
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, path, **options):
        """Write a PNG of what is seen."""
        Path(path).write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png", **options)["data"]))


@contextmanager
def chromium(profile):
    """A Page in a browser of its own, whose profile is kept in the folder."""
    pipes = os.pipe(), os.pipe()
    to_read, to_write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (pipes[0][0], pipes[1][1]))  # 3 and 4 are free
    for fd in (pipes[0][0], pipes[1][1]):
        os.close(fd)
    command = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", CHROMIUM, f"--user-data-dir={profile}"]
    process = subprocess.Popen([*command, *FLAGS], pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL)
    os.close(to_read)
    os.close(to_write)
    with os.fdopen(pipes[0][1], "w") as commands, os.fdopen(pipes[1][0], encoding="utf-8") as answers:
        try:
            yield Page(commands, answers)
        finally:
            process.kill()
            process.wait()
