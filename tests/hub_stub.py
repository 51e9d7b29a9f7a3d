"""A Hugging Face hub with one repository on 127.0.0.1: the part of its API that `huggingface_hub` uses."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The repository `repo` with the files of `folder`. `requests` records what was requested.

    break_after: the first larger download is cut off after this number of bytes.
    """

    repo: str
    folder: Path
    url: str = ""
    gated: bool = False
    break_after: int | None = None
    requests: list[str] = field(default_factory=list)

    def files(self) -> dict[str, bytes]:
        """File contents by name."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}


@contextmanager
def served(hub: Hub) -> Iterator[Hub]:
    """Serve a hub while the block runs; `hub.url` is its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            hub.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{hub.repo}/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                    for name, content in hub.files().items()
                ]
                self.send(200, json.dumps(entries).encode(), with_body)
            elif path.startswith(f"/api/models/{hub.repo}"):
                siblings = [{"rfilename": name} for name in hub.files()]
                info = {"id": hub.repo, "sha": COMMIT, "siblings": siblings}
                self.send(200, json.dumps(info).encode(), with_body)
            else:
                self.send_file(path, with_body)

        def send_file(self, path: str, with_body: bool) -> None:
            match = re.fullmatch(rf"/{hub.repo}/resolve/[^/]+/(.+)", path)
            if match is None:
                self.send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})
            elif hub.gated:
                self.send(403, b"{}", with_body, {"X-Error-Code": "GatedRepo"})
            elif match[1] not in hub.files():
                self.send(404, b"{}", with_body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                content = hub.files()[match[1]]
                headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if wanted is None:
                    self.send(200, content, with_body, headers)
                else:
                    start = int(wanted[1])
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                    self.send(206, content[start:], with_body, headers)

        def send(
            self, code: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None
        ) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body and hub.break_after is not None and len(body) > hub.break_after:
                self.wfile.write(body[: hub.break_after])
                hub.break_after, self.close_connection = None, True
            elif with_body:
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
