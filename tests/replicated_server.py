"""`tiny-llm serve --replicas 2` as a process, and clients of its server. It has one API key."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
from prometheus_client.parser import text_string_to_metric_families

from served import SECONDS, until

KEY = "a-key-for-all-replicas"
START_SECONDS = 300.0  # Ray starts several processes, each of which imports much
COMPLETE = "/v1/completions"


class Cluster:
    """The command, its log, and clients of its server. A replica runs 4 sequences and queues 2 requests.

    folder: an empty folder, for the file of keys. env: the command's environment; None: that of this process.
    """

    def __init__(self, folder: Path, env: dict[str, str] | None = None) -> None:
        keys = folder / "keys"
        keys.write_text(f"# for the tests\n{KEY}\n")
        keys.chmod(0o600)
        command = [sys.executable, "-m", "tiny_llm_cli", "serve", "--port", "0", "--replicas", "2"]
        command += ["--num-blocks", "512", "--max-num-seqs", "4", "--max-num-waiting", "2"]
        command += ["--generation-config", "vllm", "--api-key-file", str(keys)]
        self.popen = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=env,
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        until(self.is_listening, START_SECONDS)
        [line] = [line for line in self.lines if "Listening on" in line]
        self.url = line.split("Listening on ")[1].split(" ")[0]
        until(self.is_ready, START_SECONDS)

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout as output:
            self.lines.extend(output)

    def has_line(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def is_listening(self) -> bool:
        assert self.popen.poll() is None, "".join(self.lines)
        return self.has_line("Listening on")

    def is_ready(self) -> bool:
        assert self.popen.poll() is None, "".join(self.lines)
        return httpx.get(f"{self.url}/health", timeout=SECONDS).status_code == 200

    def post(self, path: str, **body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=SECONDS)

    def stream(self, prompt: str, result: "Streamed | None" = None, **body: Any) -> "Streamed":
        """Complete a prompt as a stream, and read it to its end. result: filled as the stream comes."""
        headers = {"Authorization": f"Bearer {KEY}"}
        result, body = result or Streamed(), {"prompt": prompt, "stream": True, **body}
        with httpx.stream("POST", self.url + COMPLETE, json=body, headers=headers, timeout=SECONDS) as answer:
            for line in answer.iter_lines():
                result.take(line)
        return result

    def replicas(self) -> set[str]:
        """The replicas' names in the metrics."""
        return {one.labels["replica"] for one in self._samples() if one.name == "vllm:num_requests_running"}

    def num_unfinished(self) -> float:
        """The sequences that run or wait on all replicas; a load need not be spread evenly."""
        time.sleep(0.2)
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        return sum(one.value for one in self._samples() if one.name in names)

    def _samples(self) -> list[Any]:
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = httpx.get(f"{self.url}/metrics", headers=headers, timeout=SECONDS)
        return [one for family in text_string_to_metric_families(answer.text) for one in family.samples]

    def processes(self) -> set[int]:
        """The ids of the replicas' processes, all of them below the command's."""
        return {one for one, line in self.below().items() if line.startswith("ray::ServeReplica")}

    def below(self) -> dict[int, str]:
        """The command lines of the processes that the command has started, by id."""
        parents, lines = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                line = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:  # not a process, or it has ended
                continue
            parents[int(folder.name)] = int(fields[1])
            if fields[0] != "Z":
                lines[int(folder.name)] = line
        return {one: line for one, line in lines.items() if self.popen.pid in _ancestors(one, parents)}


def _ancestors(process: int, parents: dict[int, int]) -> list[int]:
    above = []
    while process in parents:
        process = parents[process]
        above.append(process)
    return above


class Streamed:
    """What came of a stream: its text, its finish reason, an error, and whether it had its proper end."""

    def __init__(self) -> None:
        self.text, self.is_done = "", False
        self.reason: str | None = None
        self.error: dict[str, Any] | None = None

    def take(self, line: str) -> None:
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self.is_done = True
        elif data and not data.startswith(":"):
            event = json.loads(data)
            self.error = event.get("error", self.error)
            for choice in event.get("choices", ()):
                self.text += choice["text"]
                self.reason = choice["finish_reason"] or self.reason
