"""`pdm run bench screenshot`: how screenshots become an animation, and what is committed for the README."""

import importlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest

image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
BENCHES = Path(__file__).parents[1] / "benches"


@pytest.fixture
def screenshot(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHES))
    yield importlib.import_module("screenshot")
    for name in ("screenshot", "harness"):
        sys.modules.pop(name, None)


def picture(background: tuple[int, int, int], square: tuple[int, int, int], left: int) -> bytes:
    """A PNG file: a square of 20 pixels on a background."""
    frame = image.new("RGB", (120, 80), background)
    frame.paste(square, (left, 30, left + 20, 50))
    file = io.BytesIO()
    frame.save(file, "PNG")
    return file.getvalue()


def test_an_animation_repeats_its_frames_in_their_exact_colours(screenshot: Any, tmp_path: Path) -> None:
    paper, blue = (250, 249, 246), (37, 96, 159)
    file = tmp_path / "a.gif"
    screenshot.write_gif(file, [picture(paper, blue, left) for left in (0, 30, 60)])
    with image.open(file) as animation:
        assert (animation.n_frames, animation.info["loop"]) == (3, 0)  # 0: endless
        for index, left in enumerate((0, 30, 60)):
            animation.seek(index)
            frame = animation.convert("RGB")
            assert frame.getpixel((left + 10, 40)) == blue
            assert frame.getpixel(((left + 60) % 120, 40)) == paper
            assert animation.info["duration"] == (150 if index == 1 else 1500)


@pytest.mark.parametrize("name", ["live_page.gif", "live_page_dark.gif"])
def test_the_animations_of_the_readme_are_short_and_small(name: str) -> None:
    file = BENCHES / name
    assert file.stat().st_size < 1_500_000
    durations = []
    with image.open(file) as animation:
        assert animation.info["loop"] == 0
        for index in range(animation.n_frames):
            animation.seek(index)
            durations.append(animation.info["duration"])
    assert 8_000 <= sum(durations) <= 15_000  # ms


def test_a_file_of_another_kind_is_refused(
    screenshot: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["screenshot", "page.webp"])
    with pytest.raises(SystemExit):
        screenshot.main()
    assert "page.webp: the name must end in .png or .gif" in capsys.readouterr().err
