"""The commands and code blocks of the documents and help texts, in the order of the text."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{file.name}" for file in ROOT.glob("docs/*.md")))
HELPS = (
    *(f"tiny_llm_cli{words}" for words in ("", " chat", " generate", " serve", " models", " info", " bench")),
    *(f"tiny_llm_cli bench {name}" for name in ("latency", "throughput", "serve")),
    *(f"tiny_llm_course{words}" for words in ("", " start", " test", " hint", " try", " compare", " diff")),
    *(f"tiny_llm_course {name}" for name in ("progress", "map", "skip", "reset", "restore", "doctor")),
    *(f"tiny_llm_course {name}" for name in ("build-kernels", "test-refsol", "course-check")),
)
PROGRAMS = ("tiny-llm", "pdm", "pip", "curl", "echo", "python3", "sudo", "bash", "pytest")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)}) ")


class Block(NamedTuple):
    """A fenced block of a document. language: the word after the fence, such as `sh`."""

    language: str
    text: str


def blocks(document: str) -> Iterator[Block]:
    """The fenced blocks of a document, in order."""
    for language, text in _FENCE.findall((ROOT / document).read_text(encoding="utf-8")):
        yield Block(language, text)


def shell_commands(text: str) -> list[str]:
    """The commands of a `sh` block, one per line, without comments. A trailing backslash continues a line."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [re.sub(r"\s+# .*$", "", line).strip() for line in lines]
    return [command for command in commands if command]


def inline_commands(document: str) -> list[str]:
    """The commands in code spans outside of fenced blocks, in order, each once."""
    text = _FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))
    return list(dict.fromkeys(span for span in _SPAN.findall(text) if _COMMAND.match(f"{span} ")))


def help_examples(page: str) -> list[str]:
    """The examples of a help text: indented lines that start with a program. page: a module and a command."""
    shown = subprocess.run(
        [sys.executable, "-m", *page.split(), "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    lines = [line.strip() for line in shown.stdout.splitlines() if line.startswith("  ")]
    return [re.sub(r"\s{2,}.*$", "", line) for line in lines if re.match(r"(tiny-llm|pdm run) ", line)]
