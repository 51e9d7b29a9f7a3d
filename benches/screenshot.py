"""What does the live page look like? A picture of it under load: blocks shared, and a sequence preempted.

Starts `tiny-llm serve --demo`, opens its page in the system's Chromium by Playwright, sends a question,
presses "Load it", and waits until somebody has given way.
"""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUESTION = "What is the capital of France?"
PATIENCE = 60_000  # ms for anything that is waited for
TAGS = ("dt", "dd:not(.second)")  # of a figure's name, and of its value


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server with the demo's pool, on a port that nobody else has."""
    command = [sys.executable, "-m", "tiny_llm_cli", "serve", "--demo", "--port", "0"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdout=quiet, stderr=subprocess.PIPE, text=True, env=os.environ.copy()
    ) as server:
        try:
            assert server.stderr is not None
            found = (re.search(r"Listening on (http://\S+)", line) for line in server.stderr)
            match = next(filter(None, found), None)
            if match is None:
                sys.exit("the server has not started")
            yield match[1]
        finally:
            server.kill()


def take(browser: Any, url: str, file: Path, *, dark: bool, size: tuple[int, int]) -> dict[str, str]:
    """Load the pool, and write the picture once a sequence has given way; the figures that are in it."""
    width, height = size
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.wait_for_selector("body[data-live='live']")
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    page.wait_for_selector("#send:visible")
    page.check("#pace input[value='5']")  # slow enough to catch it
    page.click("#load")
    page.wait_for_selector("#log [data-kind='preempted']")
    page.wait_for_selector("#grid .cell.shared")
    page.check("#pace input[value='0']")
    page.screenshot(path=file, animations="disabled")
    names, values = ([*map(str.strip, page.locator(f"#figures {tag}").all_text_contents())] for tag in TAGS)
    return dict(zip(names, values, strict=True))


def main() -> None:
    """Write the file that the command line names."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("file", type=Path, metavar="FILE.png")
    options.add_argument("--json", action="store_true", help="print the figures in the picture as JSON")
    options.add_argument("--dark", action="store_true", help="in the dark scheme")
    options.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(1280, 800),
        metavar=("WIDTH", "HEIGHT"),
        help="(default: 1280 800)",
    )
    args = options.parse_args()
    if args.file.suffix != ".png":
        options.error(f"{args.file}: a name that ends in .png")
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        options.error(f"there is no browser: none of {', '.join(BROWSERS)}")
    try:
        sync_playwright = importlib.import_module("playwright.sync_api").sync_playwright
    except ModuleNotFoundError:
        options.error("there is no playwright: pdm sync -G browser")
    with serving() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        figures = take(browser, url, args.file, dark=args.dark, size=(args.size[0], args.size[1]))
        browser.close()
    result = {"benchmark": "screenshot", "file": str(args.file), "figures": figures}
    text = "\n".join([str(args.file), *(f"  {name:16} {value}" for name, value in figures.items())])
    harness.show(result, as_json=args.json, text=text)


if __name__ == "__main__":
    main()
