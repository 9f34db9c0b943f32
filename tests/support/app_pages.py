"""The page of `reccomp-hf app` in a process of its own, and browsers that visit it."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paths import INSTALLED

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 120  # seconds that a busy machine may take


@contextlib.contextmanager
def served(*arguments: str, script: Path | None = None, folder: Path, **environment: str) -> Iterator[str]:
    """The address of a page while a process of its own serves it; a script takes the place of `reccomp-hf app`."""
    command = [str(script)] if script else ["-m", "reccomp_hf", "app", *arguments, "--port", "0"]
    variables = {"PYTHONPATH": str(INSTALLED), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, "-u", *command],
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stdout], daemon=True)
    reader.start()
    try:
        yield _address(process, lines)
    finally:
        process.terminate()
        assert process.wait(60) == 0
        reader.join(10)
        process.stdout.close()


def _address(process: Any, lines: queue.Queue[str]) -> str:
    """The address that the process prints."""
    said, end = "", time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(queue.Empty):
            said += lines.get(timeout=0.2)
        if found := re.search(r"is at (http://\S+) ", said):
            return found[1]
        if process.poll() is not None and lines.empty():
            break
    raise AssertionError(f"no page was opened: {said}")


class Visitor:
    """A browser's tab with the page; it notes requests that leave for another host, and errors of the console.

    Args:
        browser: Playwright's browser.
        url: The address of the page.
        width: Pixels of the screen.
        scheme: `"light"` or `"dark"`.
    """

    def __init__(self, browser: Any, url: str, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 860}, color_scheme=scheme)
        self.context.set_default_timeout(60_000)
        self.tab = self.context.new_page()
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        self.tab.on("request", lambda request: self._note(request.url, url))
        self.tab.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.goto(url)
        self.tab.wait_for_selector("#rc-ask")

    def _note(self, address: str, url: str) -> None:
        if not address.startswith((url, "data:", "blob:")):
            self.elsewhere.append(address)

    def example(self, number: int = 0) -> None:
        """Click an example and wait for its answer."""
        button = self.tab.locator("#rc-examples button").nth(number)
        text = button.inner_text()
        button.click()
        self.wait_for_status(text)

    def ask(self, text: str) -> None:
        """Type a question, press the button and wait for the answer."""
        self.tab.locator("#rc-question textarea").fill(text)
        self.tab.locator("#rc-ask").click()
        self.wait_for_status(text)

    def wait_for_status(self, text: str) -> None:
        """Wait until the line below the question contains a text."""
        self.tab.locator("#rc-status").get_by_text(text).first.wait_for()

    def upload(self, path: Path) -> None:
        """Choose a file."""
        self.tab.locator("#rc-picture input[type=file]").first.set_input_files(str(path))

    def choose(self, letter: str, label: str) -> None:
        """Choose an entry of a column's menu."""
        self.tab.locator(f"#rc-menu-{letter} input").click()
        self.tab.get_by_role("option", name=label, exact=True).click()

    def answer(self, letter: str) -> str:
        """The answer of a column."""
        return self.tab.locator(f"#rc-panel-{letter} .rc-answer").inner_text()

    def tokens(self, letter: str) -> int:
        """The visual tokens that a column read."""
        words = self.tab.locator(f"#rc-panel-{letter} .rc-cost strong").first.inner_text()
        return int(words.replace(",", ""))

    def wait_for_tokens(self, letter: str, count: int) -> None:
        """Wait until a column read so many visual tokens."""
        self.tab.locator(f"#rc-panel-{letter} .rc-cost strong").first.get_by_text(f"{count:,}", exact=True).wait_for()
