"""The page in a real browser: no error, nothing loaded, never wider than the screen, in both themes.

Slow, and skipped where there is no Chromium. To look at the pages, name a folder for the pictures:

    MERGANSER_PICTURES=pictures pytest -m slow tests/report/test_in_browser.py
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from merganser.report import report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip
PICTURES = os.environ.get("MERGANSER_PICTURES")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


class Browser:
    """One page of a headless Chromium, driven over a pair of pipes (the DevTools protocol; no driver, no port)."""

    def __init__(self, profile: Path):
        assert CHROMIUM
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The protocol's pipes are the child's descriptors 3 and 4: first out of their way, then into place.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_read, to_write)]
        self._process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"], pass_fds=(3, 4),
            preexec_fn=lambda: [os.dup2(end, place) for place, end in enumerate(ends, start=3)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (to_read, to_write, *ends):
            os.close(end)
        self._buffer, self._count, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 16)
            if not part:
                raise EOFError("Chromium went away")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        data = json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while (answer := self._next()).get("id") != self._count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path: Path, width: int, theme: str) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )  # fmt: skip
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.events.clear()
        self.ask("Page.navigate", url=path.as_uri())
        while not self.seen("Page.loadEventFired"):
            self.events.append(self._next())

    def seen(self, *methods: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") in methods]

    def value(self, script: str) -> Any:
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

    def picture(self, path: Path) -> None:
        size = {"width": self.value("innerWidth"), "height": self.value("document.documentElement.scrollHeight")}
        clip = {"x": 0, "y": 0, "scale": 1, **size}
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        self._session = ""
        self.ask("Browser.close")
        self._process.wait(timeout=30)
        os.close(self._write)
        os.close(self._read)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def pages(make: Callable[..., Path]) -> dict[str, Path]:
    six, twenty = make("six"), make("twenty", tasks=20, seed=1, title="twenty tasks")
    negative, plain, two = make("negative", sign=-1.0, seed=2), make("plain", adapt=None, seed=3), make("two", tasks=2)
    long = "a_very_long_name_without_any_place_to_break_it_" * 3
    for file in (two / "scores.json", two / "diagnosis.json"):
        text = file.read_text().replace("digits", long).replace("task_arithmetic", long)
        file.write_text(text.replace("merganser demo", long))
    found = {folder.name: report(folder) for folder in (six, twenty, negative, plain, two)}
    return found | {"compared": report(six, negative, plain, to=six / "compared.html")}


def test_pages_behave_at_every_width_and_theme(make_run: Callable[..., Path], browser: Browser) -> None:
    for name, path in pages(make_run).items():
        for width in (1400, 420):
            for theme in ("light", "dark"):
                where = f"{name} at {width}, {theme}"
                browser.open(path, width, theme)
                if PICTURES:
                    browser.picture(Path(PICTURES) / f"{name}-{width}-{theme}.png")
                browser.value("document.querySelectorAll('details').forEach(part => { part.open = true; })")
                assert browser.value("document.documentElement.scrollWidth") <= width, where
                assert browser.value("matchMedia('(prefers-color-scheme: dark)').matches") == (theme == "dark")
                ground = browser.value("getComputedStyle(document.body).backgroundColor")
                assert ground == ("rgb(16, 21, 20)" if theme == "dark" else "rgb(250, 249, 246)"), where
                assert not browser.seen("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"), where
                asked = [event["request"]["url"] for event in browser.seen("Network.requestWillBeSent")]
                assert asked == [path.as_uri()], where


def test_touching_a_number_explains_it(make_run: Callable[..., Path], browser: Browser) -> None:
    browser.open(report(make_run()), 1400, "light")
    at = "document.querySelector('table.heat tbody tr:nth-child(1) td:nth-child(3)')"
    browser.value(f"{at}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    browser.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")  # scrolling is told
    place = browser.value(f"(box => [box.x + 5, box.y + 5])({at}.getBoundingClientRect())")
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    assert browser.value("document.getElementById('tip').textContent").startswith("row digits, column letters: ")
    assert browser.value("document.getElementById('tip').hidden") is False


def test_the_theme_can_be_chosen(make_run: Callable[..., Path], browser: Browser) -> None:
    browser.open(report(make_run(tasks=2)), 1400, "light")
    browser.value("document.getElementById('theme').click(); document.getElementById('theme').click()")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(16, 21, 20)"
