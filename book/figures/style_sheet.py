"""Writes the book's light and dark colours as CSS variables, taken from the live page's style sheet."""

from .palette import Palette, palettes

LIGHT = "html:not(.js), .light, .rust"
DARK = ".navy, .coal, .ayu"

# mdBook's variables, each with the colour of the live page that it takes.
THEME = {
    "bg": "paper",
    "fg": "ink",
    "sidebar-bg": "track",
    "sidebar-fg": "ink",
    "sidebar-non-existant": "soft",
    "sidebar-active": "accent",
    "sidebar-spacer": "line",
    "sidebar-header-border-color": "accent",
    "icons": "soft",
    "icons-hover": "ink",
    "links": "accent",
    "inline-code-color": "ink",
    "theme-popup-bg": "panel",
    "theme-popup-border": "line",
    "theme-hover": "track",
    "quote-bg": "track",
    "quote-border": "line",
    "table-border-color": "line",
    "table-header-bg": "track",
    "table-alternate-bg": "cell",
    "searchbar-border-color": "line",
    "searchbar-bg": "panel",
    "searchbar-fg": "ink",
    "searchbar-shadow-color": "line",
    "searchresults-header-fg": "soft",
    "searchresults-border-color": "line",
    "searchresults-li-bg": "track",
    "search-mark-bg": "flash-copied",
}


def colours() -> str:
    """The style sheet `book/theme/colours.css`."""
    light, dark = palettes()
    return "\n".join(
        [
            "/* Written by `pdm run figures` from the live page's style sheet. */",
            _theme(LIGHT, "light", light),
            _theme(DARK, "dark", dark),
            "@media print {",
            _theme(":root, html", "light", light),
            "}",
            "",
        ]
    )


def _theme(selector: str, scheme: str, palette: Palette) -> str:
    plain = [f"  --{name}: {value};" for name, value in palette.plain.items()]
    tints = [
        f"  --{hue}-{role}: {value};"
        for hue, tint in palette.tints.items()
        for role, value in tint._asdict().items()
    ]
    theme = [f"  --{name}: {palette.plain[source]};" for name, source in THEME.items()]
    return "\n".join([f"{selector} {{", f"  --color-scheme: {scheme};", *plain, *tints, *theme, "}"])
