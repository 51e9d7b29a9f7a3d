"""The files that `pdm run figures` writes: figures for Markdown pages, and the book's colours."""

from . import layers, style_sheet, token_path


def drawn() -> dict[str, str]:
    """The text of each file, by its path in the repository."""
    return {
        "docs/figures/layers.svg": layers.draw(),
        "docs/figures/token_path.svg": token_path.draw(),
        "book/theme/colours.css": style_sheet.colours(),
    }
