"""The light and dark colours of the figures: those of the live page, read from its style sheet.

Colours are written as sRGB hex values, because some SVG viewers do not support `oklch`.
"""

import re
from math import cos, radians, sin
from pathlib import Path
from typing import NamedTuple

STYLE_SHEET = Path(__file__).parents[2] / "src" / "tiny_llm_server" / "page" / "style.css"
HUES = {"blue": 250, "orange": 40, "teal": 190, "green": 130, "violet": 280, "rose": 340}  # .h0 .. .h5 there


class Tint(NamedTuple):
    """Three colours of one hue: an area, its border, and the text on it."""

    fill: str
    edge: str
    ink: str


class Palette(NamedTuple):
    """The page's colours in one colour scheme: `plain` by CSS variable, `tints` by hue."""

    plain: dict[str, str]
    tints: dict[str, Tint]


def palettes() -> tuple[Palette, Palette]:
    """Return the light and the dark palette; the dark one inherits the colours that it does not change."""
    light_rule, dark_rule = re.findall(r":root \{(.*?)\}", STYLE_SHEET.read_text(encoding="utf-8"), re.S)[:2]
    light = _variables(light_rule)
    return _palette(light), _palette(light | _variables(dark_rule))


def _variables(rule: str) -> dict[str, str]:
    """Return the custom properties (`--name: value;`) of a CSS rule by name."""
    return dict(re.findall(r"--([\w-]+):\s*([^;]+);", rule))


def _palette(variables: dict[str, str]) -> Palette:
    plain = {name: value for name, value in variables.items() if value.startswith("#")}
    return Palette(plain, {name: _tint(variables, hue) for name, hue in HUES.items()})


def _tint(variables: dict[str, str], hue: float) -> Tint:
    def colour(role: str) -> str:
        return oklch_to_hex(float(variables[f"{role}-l"]), float(variables[f"{role}-c"]), hue)

    return Tint(colour("fill"), colour("edge"), colour("ink"))


def oklch_to_hex(lightness: float, chroma: float, hue: float) -> str:
    """Convert CSS's `oklch(lightness chroma hue)`, hue in degrees, to `#rrggbb`, clipped to sRGB.

    >>> oklch_to_hex(1.0, 0.0, 0.0)
    '#ffffff'

    Source: Ottosson, "A perceptual color space for image processing" (2020).
    """
    a, b = chroma * cos(radians(hue)), chroma * sin(radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    return "#" + "".join(f"{round(255 * _gamma(min(1.0, max(0.0, value)))):02x}" for value in linear)


def _gamma(value: float) -> float:
    """Gamma-encode a linear sRGB component from 0 to 1."""
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
