"""A Ray cluster of two nodes on this machine, and `tiny-llm serve-cluster` on it."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from served import SECONDS

NODES = Path(__file__).parent / "ray_nodes.py"
COMMAND_SECONDS = 300  # a timeout against hanging, not a requirement on speed


class Nodes(NamedTuple):
    """A Ray cluster.

    environment: of commands that use it. ports: of the proxies of its two nodes. folder: Ray's files.
    """

    environment: dict[str, str]
    ports: list[int]
    folder: Path


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def running_nodes() -> Iterator[Nodes]:
    """Start the nodes of `ray_nodes.py`, and stop them at the end."""
    folder, ports = (
        tempfile.mkdtemp(prefix="ray", dir="/tmp"),
        free_ports(2),
    )  # paths of sockets must be short
    command = [sys.executable, str(NODES), folder, str(ports[1])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, "Ray has not started"
        yield Nodes(
            {**os.environ, "RAY_ADDRESS": address, "RAY_USAGE_STATS_ENABLED": "0"}, ports, Path(folder)
        )
    finally:
        process.stdin.close()  # it stops Ray then
        process.wait(SECONDS)
        process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def started(nodes: Nodes, *arguments: str) -> subprocess.Popen[str]:
    """Start `tiny-llm serve-cluster`."""
    line = [sys.executable, "-m", "tiny_llm_cli", "serve-cluster", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, env=nodes.environment, text=True, **pipes)


def command(nodes: Nodes, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `tiny-llm serve-cluster` to its end."""
    process = started(nodes, *arguments)
    out, err = process.communicate(timeout=COMMAND_SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
