"""Bodies made to cost time and memory are refused cheaply. The server runs in another process.

Bounds are about ten times what was measured on an idle machine of two cores.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2 as httpx
import pytest

from grammars import chained_schemas
from served import SECONDS, until

COMPLETE, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
SIZE = (4 << 20) - 256  # just within the limit of a body
ANSWER_SECONDS, HEALTH_SECONDS, MAX_GROWTH_MIB = 5.0, 2.0, 300

PROMPT, MESSAGES, CONTENT = b'{"prompt":', b'{"messages":[', b'{"role":"user","content":'
ONE = b'{"prompt":"x","max_tokens":1,'
JSON_SCHEMA = b',"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":'


def times(element: bytes, before: bytes, after: bytes, max_count: int = SIZE) -> bytes:
    """Repeat an element as often as fits, separated by commas."""
    count = min(max_count, (SIZE - len(before) - len(after)) // (len(element) + 1))
    return before + b",".join([element] * count) + after


def named(element: bytes, before: bytes, after: bytes, max_count: int) -> bytes:
    """Repeat a field under different names: `element` contains %d."""
    parts = [element % number for number in range(max_count)]
    return (before + b",".join(parts))[: SIZE - 100].rpartition(b",")[0] + after


def filled(before: bytes, filling: bytes, after: bytes) -> bytes:
    """Fill the space with one long string, number or white space."""
    return before + filling * ((SIZE - len(before) - len(after)) // len(filling)) + after


TOOL = b'{"type":"function","function":{"name":"f","parameters":{"enum":'
ARGUMENTS = MESSAGES + b'{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"'


def costly(schema: bytes) -> bytes:
    """A conversation whose answer must have the form of a schema."""
    return MESSAGES + CONTENT + b'"x"}]' + JSON_SCHEMA + schema + b"}}}"


FEW, SOME, MANY = 49_000, 95_000, 990_000  # just within the limits on values

HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "prompts of objects": (COMPLETE, lambda: times(b"{}", PROMPT + b"[", b"]}")),
    "few prompts of objects": (COMPLETE, lambda: times(b"{}", PROMPT + b"[", b"]}", FEW)),
    "prompts of lists": (COMPLETE, lambda: times(b"[]", PROMPT + b"[", b"]}")),
    "few prompts of lists": (COMPLETE, lambda: times(b"[]", PROMPT + b"[", b"]}", FEW)),
    "prompts of lists of texts": (COMPLETE, lambda: times(b'["a"]', PROMPT + b"[", b"]}", FEW)),
    "prompts of lists of ids": (COMPLETE, lambda: times(b"[1]", PROMPT + b"[", b"]}", FEW)),
    "prompts of null": (COMPLETE, lambda: times(b"null", PROMPT + b"[", b"]}")),
    "prompts of fractions": (COMPLETE, lambda: times(b"1.5", PROMPT + b"[", b"]}", MANY)),
    "prompts of booleans": (COMPLETE, lambda: times(b"true", PROMPT + b"[", b"]}")),
    "prompts of texts": (COMPLETE, lambda: times(b'"a"', PROMPT + b"[", b"]}", MANY)),
    "prompts of texts and ids": (COMPLETE, lambda: times(b'1,"a"', PROMPT + b"[", b"]}", MANY // 2)),
    "ids without end": (COMPLETE, lambda: times(b"1", PROMPT + b"[", b"]}")),
    "many ids": (COMPLETE, lambda: times(b"11", PROMPT + b"[", b"]}", MANY)),
    "negative ids": (COMPLETE, lambda: times(b"-1", PROMPT + b"[", b"]}", MANY)),
    "ids of 4,000 digits": (COMPLETE, lambda: times(b"9" * 4000, PROMPT + b"[", b"]}")),
    "long fractions": (COMPLETE, lambda: times(b"0." + b"123456789" * 80, PROMPT + b"[", b"]}")),
    "stop of numbers": (COMPLETE, lambda: times(b"1", ONE + b'"stop":[', b"]}", MANY)),
    "stop of texts": (COMPLETE, lambda: times(b'"ab"', ONE + b'"stop":[', b"]}")),
    "stop of objects": (COMPLETE, lambda: times(b"{}", ONE + b'"stop":[', b"]}", FEW)),
    "stop_token_ids of fractions": (
        COMPLETE,
        lambda: times(b"1.5", ONE + b'"stop_token_ids":[', b"]}", MANY),
    ),
    "stop_token_ids of texts": (COMPLETE, lambda: times(b'"7"', ONE + b'"stop_token_ids":[', b"]}", MANY)),
    "logit_bias of names": (COMPLETE, lambda: named(b'"k%d":1', ONE + b'"logit_bias":{', b"}}", 300_000)),
    "few logit_bias of names": (COMPLETE, lambda: named(b'"k%d":1', ONE + b'"logit_bias":{', b"}}", SOME)),
    "logit_bias of texts": (COMPLETE, lambda: named(b'"%d":"x"', ONE + b'"logit_bias":{', b"}}", SOME)),
    "logit_bias of objects": (COMPLETE, lambda: named(b'"%d":{}', ONE + b'"logit_bias":{', b"}}", FEW)),
    "logit_bias without end": (COMPLETE, lambda: named(b'"%d":1e999', ONE + b'"logit_bias":{', b"}}", SOME)),
    "logit_bias of booleans": (COMPLETE, lambda: named(b'"%d":true', ONE + b'"logit_bias":{', b"}}", SOME)),
    "a long token id": (COMPLETE, lambda: filled(ONE + b'"logit_bias":{"', b"9", b'":1}}')),
    "unknown fields": (COMPLETE, lambda: named(b'"u%d":1', ONE, b"}", 300_000)),
    "some unknown fields": (COMPLETE, lambda: named(b'"u%d":1', ONE, b"}", SOME)),
    "unknown fields of a message": (
        CHAT,
        lambda: named(b'"u%d":1', MESSAGES + CONTENT + b'"x",', b"}]}", SOME),
    ),
    "unknown options": (COMPLETE, lambda: named(b'"u%d":1', ONE + b'"stream_options":{', b"}}", SOME)),
    "a long unknown field": (COMPLETE, lambda: filled(ONE + b'"', b"u", b'":1}')),
    "response_format": (CHAT, lambda: named(b'"u%d":1', MESSAGES + b'],"response_format":{', b"}}", SOME)),
    "a schema of many properties": (
        CHAT,
        lambda: named(
            b'"p%d":{}', MESSAGES + CONTENT + b'"x"}]' + JSON_SCHEMA + b'{"properties":{', b"}}}}}", FEW
        ),
    ),
    "a deep schema": (
        CHAT,
        lambda: (
            MESSAGES + CONTENT + b'"x"}]' + JSON_SCHEMA + b'{"items":' * 150 + b"{}" + b"}" * 150 + b"}}}"
        ),
    ),
    "a schema that takes the stack": (CHAT, lambda: costly(json.dumps(chained_schemas(1500)).encode())),
    "a schema that takes an hour": (
        CHAT,
        lambda: costly(
            b'{"allOf":[' + b",".join(b'{"type":"string","pattern":"a%d"}' % i for i in range(40)) + b"]}"
        ),
    ),
    "many choices": (
        COMPLETE,
        lambda: times(b'"ab"', ONE + b'"structured_outputs":{"choice":[', b"]}}", MANY),
    ),
    "a long regular expression": (
        COMPLETE,
        lambda: filled(ONE + b'"structured_outputs":{"regex":"', b"a?", b'"}}'),
    ),
    "metadata of objects": (CHAT, lambda: named(b'"u%d":{}', MESSAGES + b'],"metadata":{', b"}}", FEW)),
    "messages of numbers": (CHAT, lambda: times(b"1", MESSAGES, b"]}", MANY)),
    "messages of nothing": (CHAT, lambda: times(b"{}", MESSAGES, b"]}", FEW)),
    "messages of a king": (CHAT, lambda: times(b'{"role":"king"}', MESSAGES, b"]}", FEW)),
    "many messages": (CHAT, lambda: times(CONTENT + b'"x"}', MESSAGES, b"]}", FEW)),
    "a wrong last message": (CHAT, lambda: times(CONTENT + b'"x"}', MESSAGES, b",{}]}", 4000)),
    "parts of nothing": (CHAT, lambda: times(b"{}", MESSAGES + CONTENT + b"[", b"]}]}", FEW)),
    "parts of numbers": (CHAT, lambda: times(b"1", MESSAGES + CONTENT + b"[", b"]}]}", MANY)),
    "parts of images": (
        CHAT,
        lambda: times(b'{"type":"image_url"}', MESSAGES + CONTENT + b"[", b"]}]}", FEW),
    ),
    "content of an object": (CHAT, lambda: named(b'"k%d":1', MESSAGES + CONTENT + b"{", b"}}]}", SOME)),
    "tools": (CHAT, lambda: times(b"{}", MESSAGES + b'],"tools":[', b"]}", FEW)),
    "tool_calls": (CHAT, lambda: times(b"{}", MESSAGES + CONTENT + b'"x","tool_calls":[', b"]}]}", FEW)),
    "tools of many values": (
        CHAT,
        lambda: times(TOOL + b"[" + b"1," * 6000 + b"1]}}}", MESSAGES + b'],"tools":[', b"]}", 128),
    ),
    "tools of long schemas": (CHAT, lambda: filled(MESSAGES + b'],"tools":[' + TOOL + b'"', b"x", b'"}}}]}')),
    "tools of deep schemas": (
        CHAT,
        lambda: MESSAGES + b'],"tools":[' + TOOL + b'{"not":' * 120 + b"{}" + b"}" * 123 + b"]}",
    ),
    "arguments of lists": (CHAT, lambda: filled(ARGUMENTS, b"[],", b'"}}]}]}')),
    "arguments within arguments": (CHAT, lambda: filled(ARGUMENTS, b"[", b'"}}]}]}')),
    "arguments of quotes": (CHAT, lambda: filled(ARGUMENTS, rb"\"", b'"}}]}]}')),
    "a long name of a call": (
        CHAT,
        lambda: filled(ARGUMENTS.partition(b'"f"')[0] + b'"', b"f", b'"}}]}]}'),
    ),
    "many calls of lists": (
        CHAT,
        lambda: times(
            b'{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{\\"a\\":['
            + b"[]," * 9000
            + b'[]]}"}}]}',
            MESSAGES,
            b"]}",
        ),
    ),
    "a long role": (CHAT, lambda: filled(MESSAGES + b'{"role":"', b"r", b'","content":"x"}]}')),
    "a long model": (COMPLETE, lambda: filled(ONE + b'"model":"', b"m", b'"}')),
    "a list of models": (COMPLETE, lambda: times(b"1", ONE + b'"model":[', b"]}", MANY)),
    "lists within lists": (COMPLETE, lambda: b"[" * SIZE),
    "objects within objects": (COMPLETE, lambda: b'{"a":' * (SIZE // 5)),
    "lists within lists that end": (COMPLETE, lambda: PROMPT + b"[" * FEW + b"]" * FEW + b"}"),
    "many towers of lists": (COMPLETE, lambda: times(b"[" * 150 + b"]" * 150, PROMPT + b"[", b"]}")),
    "a number of 4 MB": (COMPLETE, lambda: filled(ONE + b'"seed":', b"9", b"}")),
    "an exponent of 4 MB": (COMPLETE, lambda: filled(ONE + b'"top_p":1e', b"9", b"}")),
    "halves of characters": (COMPLETE, lambda: filled(PROMPT + b'"', b"\\ud800", b'"}')),
    "no UTF-8": (COMPLETE, lambda: filled(PROMPT + b'"', b"\xff", b'"}')),
    "no UTF-8 at the end": (COMPLETE, lambda: filled(PROMPT + b'"', b"a", b'\xff"}')),
    "quotes": (COMPLETE, lambda: b'"' * SIZE),
    "colons": (COMPLETE, lambda: b":" * SIZE),
    "backslashes that do not end": (COMPLETE, lambda: filled(PROMPT + b'"', b'\\"', b"")),
    "white space": (COMPLETE, lambda: b" " * SIZE),
    "lines, then no JSON": (COMPLETE, lambda: b"\n" * SIZE + b"x"),
    "a text that does not end": (COMPLETE, lambda: filled(PROMPT + b'"', b"a", b"")),
    "null bytes": (COMPLETE, lambda: b"\0" * SIZE),
    "a list": (COMPLETE, lambda: times(b"1", b"[", b"]", MANY)),
    "a text": (COMPLETE, lambda: filled(b'"', b"a", b'"')),
    "tokens of texts": (DETOKENIZE, lambda: times(b'"1"', b'{"tokens":[', b"]}", MANY)),
    "negative tokens": (DETOKENIZE, lambda: times(b"-1", b'{"tokens":[', b"]}", MANY)),
    "many tokens": (DETOKENIZE, lambda: times(b"1", b'{"tokens":[', b"]}", MANY)),
    "a prompt of numbers": (TOKENIZE, lambda: times(b"1", PROMPT + b"[", b"]}", MANY)),
    "messages without a role": (TOKENIZE, lambda: times(b"{}", MESSAGES, b"]}", FEW)),
}


@dataclass
class Server:
    """A server in another process. slowest: the longest time of a request to /health, in seconds."""

    process: subprocess.Popen[str]
    url: str
    slowest: float = 0.0
    has_ended: threading.Event = field(default_factory=threading.Event)

    def memory(self, what: str) -> int:
        """Return a figure of /proc/PID/status, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) // 1024  # type: ignore[index]

    def processor_seconds(self) -> float:
        """Return the processor time of the server so far: other programs do not lengthen it."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def poll_health(self) -> None:
        """Request /health again and again."""
        with httpx.Client(base_url=self.url, timeout=SECONDS) as client:
            while not self.has_ended.wait(0.01):
                start = time.monotonic()
                assert client.get("/health").status_code == 200
                self.slowest = max(self.slowest, time.monotonic() - start)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    command = [sys.executable, "-m", "tiny_llm_cli", "serve", "--port", "0", "--num-blocks", "512"]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        read = iter(process.stdout.readline, "")
        reader = threading.Thread(target=lambda: lines.extend(read), daemon=True)
        reader.start()
        until(lambda: any("is ready" in line for line in lines))
        here = Server(process, re.search(r"http://[\d.:]+", "".join(lines))[0])  # type: ignore[index]
        polling = threading.Thread(target=here.poll_health, daemon=True)
        polling.start()
        yield here
        here.has_ended.set()
        polling.join(SECONDS)
        process.kill()
        process.wait()
        reader.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_body_is_refused_quickly(server: Server, kind: str) -> None:
    """The engine computes nothing, other requests are answered meanwhile, and the answer is short."""
    path, make = HOSTILE[kind]
    body, before = make(), server.memory("VmRSS")
    assert len(body) <= 4 << 20
    server.slowest = 0.0
    start = server.processor_seconds()
    with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    seconds = server.processor_seconds() - start
    assert answer.status_code in (400, 404), answer.text[:300]
    assert answer.json()["error"]["message"]
    assert len(answer.content) < 10_000
    assert seconds < ANSWER_SECONDS
    assert server.slowest < HEALTH_SECONDS
    assert server.memory("VmHWM") - min(before, server.memory("VmRSS")) < MAX_GROWTH_MIB
