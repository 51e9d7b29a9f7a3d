"""The results of real runs: a JSON file for each name in `results/runs.toml`, by `pdm run book results`.

A file has the command, the date, the machine, and what the command printed: `json` for a command that ends in
`--json`, otherwise `output`, the text.
"""

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from .arithmetic import Number, evaluate, shown
from .errors import BookError
from .pictures import framed

FOLDER = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Saved:
    """A result as saved. machine: processor, kernels, threads and versions, from `tiny-llm info`."""

    command: str
    date: str
    machine: Mapping[str, Any]
    json: Any = None
    output: str | None = None

    @property
    def source(self) -> str:
        """A line that says how and where the result was measured."""
        machine = self.machine
        kernels = f"{machine['instruction_set']} kernels, {machine['threads']} threads"
        command = self.command.removesuffix(" --json")
        return f"`{command}` on {machine['processor']}, {kernels}, MLX {machine['mlx']}"


@dataclass(frozen=True)
class Run:
    """A command that the book takes a result from, and what happens before it in the same overlay.

    start: a day that is started first. writes: by file, functions that then replace those of the same name.
    before: commands that run after that and must succeed. exit_code: what `command` must end with.
    """

    command: str
    start: str = ""
    writes: Mapping[str, str] = field(default_factory=dict)
    before: Sequence[str] = ()
    exit_code: int = 0


def runs() -> dict[str, Run]:
    """The runs of `runs.toml` by name; a text there is a command that needs no preparation."""
    found = tomllib.loads((FOLDER / "runs.toml").read_text(encoding="utf-8"))
    return {name: Run(run) if isinstance(run, str) else Run(**run) for name, run in found.items()}


def read(name: str) -> Saved:
    """A saved result. Raises `BookError` for a name without a file."""
    file = FOLDER / f"{name}.json"
    if not file.exists():
        guess = get_close_matches(name, [path.stem for path in FOLDER.glob("*.json")], n=1)
        advice = f"; did you mean {guess[0]}?" if guess else ""
        raise BookError(f"there is no result {name!r}{advice} (add it to results/runs.toml)")
    return Saved(**json.loads(file.read_text(encoding="utf-8")))


def write(name: str, saved: Saved) -> None:
    """Save a result."""
    text = json.dumps(asdict(saved), indent=1, ensure_ascii=False)
    (FOLDER / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


class Results:
    """The directives that show results: `value`, `calc`, `table`, `chart`, `output`, `source`.

    chart: draws a lab's picture as SVG.
    """

    def __init__(self, chart: Callable[[Mapping[str, Any]], str]) -> None:
        self._chart = chart
        self._read: dict[str, Saved] = {}

    @cached_property
    def directives(self) -> dict[str, Callable[[str], str]]:
        """The directives by name."""
        return {
            "value": self.value,
            "calc": self.calc,
            "table": self.table,
            "chart": self.chart,
            "output": self.output,
            "source": self.source,
        }

    def value(self, arguments: str) -> str:
        """One number or text of a result: `NAME PATH`, or `NAME PATH as FORM`."""
        what, _, form = arguments.partition(" as ")
        name, _, path = what.partition(" ")
        found = self.at(name, path.strip())
        return found if isinstance(found, str) else shown(found, form.strip())

    def calc(self, arguments: str) -> str:
        """The value of an expression, such as `value("trap", "tables.0.rows.1.tokens") / 2 as .1f`."""
        expression, _, form = arguments.partition(" as ")
        return shown(evaluate(expression.strip(), {"value": self.number}), form.strip())

    def number(self, name: str, path: str) -> Number:
        """A number of a result. Raises `BookError` for anything else."""
        found = self.at(name, path)
        if not isinstance(found, int | float):
            raise BookError(f"{name} {path} is {found!r}, not a number")
        return found

    def at(self, name: str, path: str) -> Any:
        """What is at a path such as `tables.0.rows.3.bytes.measured`.

        An item of a list is chosen by its place, or by one of its values: `rows.max_seq_len=2048.waste`.
        """
        found = self._saved(name).json
        for key in path.split("."):
            found = _item(found, key, f"{name} {path}")
        if isinstance(found, dict | list):
            raise BookError(f"{name} {path} is not one value: {_keys(found)}")
        return found

    def table(self, arguments: str) -> str:
        """A table of a lab: `NAME`, or `NAME PLACE` for a later one. The caption names the source."""
        name, _, place = arguments.partition(" ")
        tables = self._json(name, "tables")
        found = _item(tables, place or "0", name)
        return f"{_markdown(found)}\n\n{self._caption(name, found['title'])}"

    def chart(self, arguments: str) -> str:
        """The picture of a lab, drawn from the same run as its tables."""
        picture = self._json(arguments, "picture")
        return framed(self._chart(picture), f"{escape(picture['title'])}. {self._source_html(arguments)}")

    def output(self, arguments: str) -> str:
        """The command and the text that it printed, as on a terminal: `NAME`, or `NAME FIRST-LAST` lines."""
        name, _, lines = arguments.partition(" ")
        saved = self._saved(name)
        if saved.output is None:
            raise BookError(f"the result {name} is JSON: use value, table or chart")
        text = _lines(saved.output.rstrip().splitlines(), lines)
        return f"```console\n$ {saved.command}\n{text}\n```\n\n{self._caption(name, '')}"

    def source(self, arguments: str) -> str:
        """How and where a result was measured, as text for a sentence."""
        return self._saved(arguments).source

    def _caption(self, name: str, title: str) -> str:
        text = f"{escape(title)}. " if title else ""
        return f'<p class="caption">{text}{self._source_html(name)}</p>'

    def _source_html(self, name: str) -> str:
        command, _, rest = self._saved(name).source[1:].partition("`")
        return f"<code>{escape(command)}</code>{escape(rest)}."

    def _json(self, name: str, key: str) -> Any:
        found = self._saved(name).json
        if not isinstance(found, dict) or key not in found:
            raise BookError(f"the result {name!r} has no {key}")
        return found[key]

    def _saved(self, name: str) -> Saved:
        if name not in self._read:
            self._read[name] = read(name)
        return self._read[name]


def _item(found: Any, key: str, where: str) -> Any:
    """An item of a list or a dict."""
    if isinstance(found, list) and "=" in key:
        name, _, wanted = key.partition("=")
        same = [one for one in found if isinstance(one, dict) and str(one.get(name)) == wanted]
        if len(same) == 1:
            return same[0]
        raise BookError(f"{where}: {len(same)} items have {key} ({[one.get(name) for one in found]})")
    if isinstance(found, list) and key.isdigit() and int(key) < len(found):
        return found[int(key)]
    if isinstance(found, dict) and key in found:
        return found[key]
    raise BookError(f"{where}: there is no {key!r}: {_keys(found)}")


def _keys(found: Any) -> str:
    if isinstance(found, dict):
        return f"it has {', '.join(found)}"
    return f"it has items 0 to {len(found) - 1}" if isinstance(found, list) else f"it is {found!r}"


def _lines(lines: Sequence[str], wanted: str) -> str:
    """The lines `FIRST-LAST`, counted from 1; all of them for an empty text."""
    if not wanted:
        return "\n".join(lines)
    first, dash, last = wanted.partition("-")
    if not (dash and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last) <= len(lines)):
        raise BookError(f"{wanted!r} is not FIRST-LAST within 1-{len(lines)}")
    return "\n".join(lines[int(first) - 1 : int(last)])


def _markdown(table: Mapping[str, Any]) -> str:
    """A lab's table as Markdown; a column with predictions is two."""
    shown_table = table["shown"]
    rules = ("---" if is_text else "--:" for is_text in shown_table["is_text"])
    return "\n".join([_row(shown_table["heads"]), _row(rules), *map(_row, shown_table["rows"])])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
