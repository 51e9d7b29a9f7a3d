"""Every command and every code block in the documents and in `--help` runs exactly as printed.

`NOT_RUN` lists the exceptions with their reasons. The commands of a document run in order, in one folder.
Servers listen on their default port, so these tests wait for each other.
"""

import fcntl
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest

import tiny_llm_kernels
from documents import DOCUMENTS, HELPS, ROOT, Block, blocks, help_examples, inline_commands, shell_commands

SECONDS = 300  # a guard against hanging
PORT = 8000

# Why commands with these prefixes are not run here. The longest matching prefix counts.
NOT_RUN = {
    "python3 -m venv": "installs the project: .ci/run runs both commands of the README's start as printed",
    "pip ": "changes the environment: tests/test_install.py installs the package",
    "sudo apt": "changes the system",
    "pdm install": "changes the environment: .ci/run runs it",
    "pdm sync": "changes the environment: .ci/run runs it with all groups",
    "pdm lock": "needs the package index: .ci/run runs `pdm lock --check`",
    "pdm run pytest": "runs these tests",
    "HYPOTHESIS_PROFILE=": "runs tests for a long time: .ci/run runs the profile `ci`",
    "pdm run lint": "a step of .ci/run",
    "pdm run types": "a step of .ci/run",
    "pdm run format": "changes the files",
    "pdm run course-check": "a step of .ci/run",
    "pdm run test-refsol": "minutes: tests/test_course_commands.py and course-check run the suites",
    "pdm run test 1.1 --watch": "runs until Ctrl-C: tests/test_course_runs.py runs it",
    "pdm run build-kernels": "compiles for minutes: tests/test_course_kernels.py runs it",
    "pdm run bash": "compiles with sanitizers for many minutes",
    "bash .ci/run": "runs these tests",
    "pdm run book": "runs until Ctrl-C, or builds: tests/test_book.py and .ci/run build it",
    "pdm run bench ": "minutes each: tests/test_benches.py runs them with small sizes",
    "pdm run lab ": "minutes each: tests/test_labs.py runs them with small sizes",
    "tiny-llm bench latency": "tests/test_cli_bench_info.py runs it with small sizes",
    "tiny-llm bench throughput": "tests/test_cli_bench_info.py runs it with small sizes",
    "tiny-llm bench serve": "tests/test_bench_serve.py runs it on its own servers",
    "tiny-llm serve --replicas": "needs the group cluster: tests/test_cluster_serving.py runs it",
    "tiny-llm serve-cluster": "needs a Ray cluster",
    "ray ": "starts Ray on this machine, or needs two machines",
    "scp ": "needs a second machine",
    "curl http://10.": "needs the two machines",
    "export RAY_AUTH_MODE=": "a setting of the commands for two machines, which are not run",
    "chmod 600 ~/.ray/": "a file of the commands for two machines, which are not run",
    "mkdir -p ~/.ray": "a folder of the commands for two machines, which are not run",
    "tiny-llm --install-completion": "changes the shell's settings",
    "tiny-llm COMMAND": "COMMAND stands for a command's name",
    "pdm run NAME": "NAME stands for a script's name",
    "kill -HUP PID": "PID stands for a process: tests/test_cluster_serving.py sends the signal",
}
SERVERS = ("tiny-llm serve",)
SHOWN = ("text", "json", "yaml")  # output and files, not commands
NAMES = {"tiny-llm", "tiny-llm chat", "tiny-llm generate"}  # in a sentence they only name a command
CONVERSATIONS = (
    "tiny-llm chat",
    'tiny-llm chat --system "You answer in one sentence."',
)  # they read from a terminal
MAY_FAIL = (
    "pdm run test",
    "pdm run try",
    "pdm run compare",
    "pdm run diff",
)  # exit with 1 if exercises are blank
FILES = {
    "prompts.txt": "The sky is\nOnce upon a time\n",
    "notes.txt": "Water boils at 100 degrees Celsius at sea level.\n",
    "city.json": '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}}',
}


def why_not_run(command: str) -> str | None:
    """The reason why a command is not run here; None if it is."""
    matching = [prefix for prefix in NOT_RUN if command.startswith(prefix)]
    return NOT_RUN[max(matching, key=len)] if matching else None


class Reader:
    """A reader who types every command of a document, in a folder with the files that it mentions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in FILES.items():
            (folder / name).write_text(text, encoding="utf-8")
        overlay = folder / "overlay"
        overlay.mkdir()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "TINY_LLM_OVERLAY": str(overlay), "HOME": str(folder)}
        self.server: subprocess.Popen[bytes] | None = None
        self.port = PORT

    def types(self, command: str) -> None:
        """Run a command as printed and check its exit code."""
        if command.startswith(SERVERS) and "--help" not in command:
            self.starts_server(command.removesuffix(" &"))
        elif command in CONVERSATIONS:
            self.talks(command)
        else:
            done = self.runs(command, shell=True)
            expected = (0, 1) if command.startswith(MAY_FAIL) else (0,)
            assert done.returncode in expected, f"{command}\n{done.stdout}\n{done.stderr}"
            assert "Traceback" not in done.stderr, done.stderr

    def runs(self, command: str | list[str], shell: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a program in the reader's folder; `pdm` in the project's."""
        return subprocess.run(
            command,
            shell=shell,
            cwd=ROOT if str(command).startswith("pdm ") else self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def starts_server(self, command: str) -> None:
        """Stop the previous server, start this one and wait until it is ready."""
        self.stops_server()
        option = re.search(r"--port (\d+)", command)
        self.port = int(option[1]) if option else PORT
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                pytest.skip(f"another program listens on port {self.port}")
        self.server = subprocess.Popen(shlex.split(command), cwd=self.folder, env=self.environment)
        end = time.monotonic() + SECONDS
        while not self.is_ready():
            assert self.server.poll() is None, f"{command} exited with {self.server.returncode}"
            assert time.monotonic() < end, f"{command} is not ready"
            time.sleep(0.05)

    def is_ready(self) -> bool:
        """True if the server is ready for requests."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", trust_env=False).is_success
        except httpx.TransportError:
            return False

    def stops_server(self) -> None:
        """Stop the running server, if any, as Ctrl-C does."""
        if self.server is not None:
            self.server.send_signal(signal.SIGINT)
            assert self.server.wait(SECONDS) == 0
            self.server = None

    def talks(self, command: str) -> None:
        """Start a conversation on a terminal and leave it with /exit."""
        terminal, other_end = pty.openpty()
        with subprocess.Popen(
            shlex.split(command),
            cwd=self.folder,
            env=self.environment,
            stdin=other_end,
            stdout=other_end,
            stderr=other_end,
        ) as conversation:
            os.close(other_end)
            os.write(terminal, b"/exit\n")
            seen = b""
            while chunk := read(terminal):
                seen += chunk
            assert conversation.wait(SECONDS) == 0, seen.decode(errors="replace")
        os.close(terminal)


def read(terminal: int) -> bytes:
    """The next output on a terminal; empty when the other end is closed."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold a lock that all tests on the default port take, in any process."""
    with (Path(tempfile.gettempdir()) / "tiny-llm-test-documents.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    if not tiny_llm_kernels.available():
        pytest.skip(f"commands load the embedded model: {tiny_llm_kernels.why_unavailable()}")
    if shutil.which("pdm") is None:
        pytest.skip("pdm is not on PATH")
    with one_at_a_time():
        person = Reader(tmp_path)
        try:
            yield person
        finally:
            if person.server is not None:
                person.server.kill()
                person.server.wait(SECONDS)


def follow(reader: Reader, block: Block) -> None:
    """Run the commands or the code of a block."""
    if block.language == "sh":
        for command in shell_commands(block.text):
            if why_not_run(command) is None:
                reader.types(command)
    elif block.language == "python":
        done = reader.runs([sys.executable, "-c", block.text])
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip(), block.text
    elif block.language not in SHOWN:
        raise AssertionError(f"no way to test a block of language {block.language!r}\n{block.text}")


@pytest.mark.parametrize(
    "document",
    [pytest.param(name, marks=[] if name == "README.md" else pytest.mark.deep) for name in DOCUMENTS],
)
def test_the_commands_and_code_of_a_document_run(reader: Reader, document: str) -> None:
    fenced = list(blocks(document))
    for block in fenced:
        follow(reader, block)
    shown = {command for block in fenced if block.language == "sh" for command in shell_commands(block.text)}
    for command in inline_commands(document):
        if command not in shown | NAMES and why_not_run(command) is None:
            reader.types(command)
    reader.stops_server()


def before(page: str) -> list[str]:
    """The course commands that a reader of this help text has run: days are started, and moved away."""
    name = page.removeprefix("tiny_llm_course").strip()
    if not page.startswith("tiny_llm_course") or name in ("start", "build-kernels"):
        return []
    started = ["start 1.1", "start 1.6", "start 2.4", "start 2.4 --cpp", "start 3.2"]
    return [*started, "reset 1.1", "reset 3.2b"] if name == "restore" else started


@pytest.mark.deep
@pytest.mark.parametrize("page", HELPS)
def test_the_examples_of_a_help_text_run(reader: Reader, page: str) -> None:
    for command in before(page):
        assert reader.runs(f"python -m tiny_llm_course {command}", shell=True).returncode == 0, command
    for example in help_examples(page):
        command = re.sub(r"\s+#.*$", "", example)
        if why_not_run(command) is None:
            reader.types(command)
    reader.stops_server()


def test_every_exception_is_needed() -> None:
    printed = {command for document in DOCUMENTS for command in inline_commands(document)}
    for document in DOCUMENTS:
        printed |= {command for block in blocks(document) for command in shell_commands(block.text)}
    printed |= {example for page in HELPS for example in help_examples(page)}
    for prefix in NOT_RUN:
        assert any(command.startswith(prefix) for command in printed), f"nothing prints {prefix!r}"
