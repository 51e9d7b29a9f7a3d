"""Puts interactive figures into a chapter: custom elements, with a drawing for readers without JavaScript.

The modules in `book/interactive/` are embedded in the page as `data:` addresses of an import map, because a
browser loads no module from a file on disk. They import each other by name: `import { Pool } from "pool"`.
"""

import json
import re
from base64 import b64encode
from collections.abc import Callable
from html import escape
from pathlib import Path

from .errors import BookError

IMPORT_MAP = '<script type="importmap">'
FOLDER = Path(__file__).parents[1] / "interactive"


class Interactive:
    """The directive `interactive NAME CAPTION`: the element `<NAME-figure>` of the module `NAME_figure.js`.

    fallback: draws what the page shows until the element is ready, and where JavaScript is off.
    data: values that Python computes for a figure, by its name.
    """

    def __init__(self, fallback: Callable[[str], str], data: dict[str, Callable[[], object]]) -> None:
        self._fallback, self._data = fallback, data

    def interactive(self, arguments: str) -> str:
        """The element with its fallback, and the scripts that it needs."""
        name, _, caption = arguments.partition(" ")
        module = f"{name.replace('-', '_')}_figure"
        if module not in modules():
            known = (one.removesuffix("_figure") for one in modules() if one.endswith("_figure"))
            raise BookError(f"there is no interactive figure {name!r}: {', '.join(known)}")
        content = f'<div class="fallback">{self._fallback(name)}</div>'
        if name in self._data:
            found = json.dumps(self._data[name](), separators=(",", ":")).replace("<", "\\u003c")
            content += f'<script type="application/json">{found}</script>'
        return "\n".join(
            [
                '<figure class="interactive">',
                f"<{name}-figure>{content}</{name}-figure>",
                f"<figcaption>{escape(caption)}</figcaption>" if caption else "",
                "</figure>",
                "",
                scripts(module),
            ]
        )


def with_one_import_map(chapter: str) -> str:
    """Remove all import maps of a chapter but the first: they are equal, and browsers expect one."""
    head, start, rest = chapter.partition(IMPORT_MAP)
    first, end, rest = rest.partition("</script>\n")
    return head + start + first + end + re.sub(f"{IMPORT_MAP}.*?</script>\n", "", rest, flags=re.DOTALL)


def modules() -> dict[str, str]:
    """The JavaScript modules by name."""
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.js"))}


def scripts(module: str) -> str:
    """The HTML that loads a module: an import map with all modules, and one import."""
    addresses = {
        name: f"data:text/javascript;base64,{b64encode(text.encode()).decode()}"
        for name, text in modules().items()
    }
    import_map = json.dumps({"imports": addresses})
    return f'{IMPORT_MAP}{import_map}</script>\n<script type="module">import "{module}";</script>'
