"""What does the live page look like? A still picture or an animation of it under load.

Starts `tiny-llm serve --demo`, opens its page in the system's Chromium by Playwright, asks a question and
presses "Load it". FILE.png shows the moment when a sequence has been preempted. FILE.gif shows a round of the
load, 4 steps of the engine a frame. GitHub lets its readers pause a GIF, but no other animation.
"""

import argparse
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUESTION = "What is the capital of France?"
TIMEOUT = 60_000  # ms for each step of the script
TAGS = ("dt", "dd:not(.second)")  # of a figure's name, and of its value
SIZES = {".png": (1280, 800), ".gif": (1000, 680)}  # default sizes of the window
STEPS_PER_FRAME = 4
PAGE_MS_PER_STEP = 200  # the load shows 5 steps a second
FRAME_MS = 150
HOLD_MS = 1500  # of the first and the last frame
MAX_FRAMES = 120
SCALES = {".png": 1, ".gif": 1.5}  # pixels of the picture per pixel of the page
NUM_COLOURS = 255  # one of a GIF's 256 is left for pixels that have not changed


@contextmanager
def serving() -> Iterator[str]:
    """Run a server with the demo's pool on a free port; yields its address."""
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
                sys.exit("the server did not start")
            yield match[1]
        finally:
            server.kill()


def ask(page: Any, url: str) -> None:
    """Open the page, and wait for the answer to a question."""
    page.set_default_timeout(TIMEOUT)
    page.goto(url)
    page.wait_for_selector("body[data-live='live']")
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    page.wait_for_selector("#chat-figures:has-text('tokens')")
    page.wait_for_selector("#send:visible")


def take_still(page: Any, url: str, file: Path) -> None:
    """Load the pool, and write a picture once a sequence has been preempted."""
    ask(page, url)
    page.click("#load")
    page.wait_for_selector("#log [data-kind='preempted']")
    page.wait_for_selector("#grid .cell.shared")
    page.check("#pace input[value='0']")
    page.screenshot(path=file, animations="disabled")


def record(page: Any, url: str, file: Path) -> None:
    """Write an animation of one round of the load. The page's clock only runs between two frames."""
    page.clock.install()
    ask(page, url)
    page.clock.pause_at(page.evaluate("Date.now() / 1000 + 1"))
    frames = [page.screenshot(animations="disabled")]
    pending: list[str] = []
    page.on("request", lambda request: pending.append(request.url))
    for end in ("requestfinished", "requestfailed"):  # the page hangs up after an answer's last event
        page.on(end, lambda request: pending.remove(request.url))
    page.click("#load")
    page.wait_for_timeout(1000)
    while pending:  # the engine runs at full speed; the page replays its steps
        page.wait_for_timeout(200)
    while len(frames) < MAX_FRAMES:
        page.clock.run_for(STEPS_PER_FRAME * PAGE_MS_PER_STEP)
        if not page.inner_text("#behind"):
            break
        frames.append(page.screenshot(animations="disabled"))
    write_gif(file, frames)


def write_gif(file: Path, screenshots: Sequence[bytes]) -> None:
    """Encode screenshots as an endless GIF. Its frames share one palette: unchanged pixels take no space."""
    image = importlib.import_module("PIL.Image")
    frames = [image.open(io.BytesIO(data)).convert("RGB") for data in screenshots]
    width, height = frames[0].size
    samples = frames[:: max(1, len(frames) // 6)]
    mosaic = image.new("RGB", (width, height * len(samples)))
    for row, frame in enumerate(samples):
        mosaic.paste(frame, (0, height * row))
    palette = image.new("P", (1, 1))
    counted = sorted(mosaic.getcolors(mosaic.width * mosaic.height), reverse=True)
    palette.putpalette([part for _, colour in counted[:NUM_COLOURS] for part in colour])
    first, *others = (frame.quantize(palette=palette, dither=image.Dither.NONE) for frame in frames)
    durations = [HOLD_MS, *[FRAME_MS] * (len(others) - 1), HOLD_MS]
    first.save(file, save_all=True, append_images=others, duration=durations, loop=0)


def figures_of(page: Any) -> dict[str, str]:
    """The figures above the pool, by name."""
    names, values = ([*map(str.strip, page.locator(f"#figures {tag}").all_text_contents())] for tag in TAGS)
    return dict(zip(names, values, strict=True))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="pdm run bench screenshot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("file", type=Path, metavar="FILE", help="a name that ends in .png or .gif")
    options.add_argument("--json", action="store_true", help="print the figures in the picture as JSON")
    options.add_argument("--dark", action="store_true", help="use the dark colour scheme")
    options.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("WIDTH", "HEIGHT"),
        help="of the window (default: 1280 800 for .png, 1000 680 for .gif)",
    )
    return options


def main() -> None:
    """Write the picture that the command line names."""
    options = parser()
    args = options.parse_args()
    if args.file.suffix not in SIZES:
        options.error(f"{args.file}: the name must end in .png or .gif")
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        options.error(f"no browser found: install one of {', '.join(BROWSERS)}")
    try:
        sync_playwright = importlib.import_module("playwright.sync_api").sync_playwright
    except ModuleNotFoundError:
        options.error("Playwright is not installed: pdm sync -G browser")
    width, height = args.size or SIZES[args.file.suffix]
    with serving() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        scheme = "dark" if args.dark else "light"
        page = browser.new_page(
            viewport={"width": width, "height": height},
            device_scale_factor=SCALES[args.file.suffix],
            color_scheme=scheme,
        )
        (record if args.file.suffix == ".gif" else take_still)(page, url, args.file)
        figures = figures_of(page)
        browser.close()
    result = {"benchmark": "screenshot", "file": str(args.file), "figures": figures}
    text = "\n".join([str(args.file), *(f"  {name:16} {value}" for name, value in figures.items())])
    harness.show(result, as_json=args.json, text=text)


if __name__ == "__main__":
    main()
