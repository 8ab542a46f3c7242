"""A small server of files on this machine: plain HTTP with ranges and lists of links, and what is read of S3 and of
Hugging Face's hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class Server(ThreadingHTTPServer):
    """Serves `files`; the first folder of a name is its bucket."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.requests: list[tuple[str, str, str]] = []  # method, path, range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def bytes_sent(self) -> int:
        """By all ranges that were asked for."""
        ranges = [asked.removeprefix("bytes=").split("-") for _, _, asked in self.requests if asked]
        return sum(int(end) - int(start) + 1 for start, end in ranges)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path, query = unquote(urlsplit(self.path).path).lstrip("/"), parse_qs(urlsplit(self.path).query)
        self.server.requests.append((self.command, path, self.headers.get("Range", "")))
        if "list-type" in query:
            self._send(200, self._listed(path.rstrip("/"), query.get("prefix", [""])[0]), body, kind="application/xml")
        elif path.startswith("api/datasets/"):
            self._send(
                200,
                json.dumps(self._of_hub(path, deep=query.get("recursive") == ["true"])).encode(),
                body,
                kind="application/json",
            )
        elif path in self.server.files:
            self._send_file(self.server.files[path], body)
        elif links := self._links(path):
            self._send(200, "".join(f'<a href="{link}">{link}</a>' for link in links).encode(), body, kind="text/html")
        else:
            self._send(404, b"", body)

    def _of_hub(self, path: str, *, deep: bool) -> list[dict[str, object]] | dict[str, object]:
        """What the hub says of its only dataset, or of what lies in a folder of it, and below."""
        if "/tree/" not in path:
            return {"id": "/".join(path.split("/")[2:4]), "sha": "0" * 40}
        inside = path.partition("/tree/main")[2].strip("/")
        root = f"{path.partition('api/')[2].partition('/tree/')[0]}/resolve/main/{inside}".rstrip("/")
        below = [name.removeprefix(f"{root}/") for name in self.server.files if name.startswith(f"{root}/")]
        return [self._described(root, inside, name) for name in (below if deep else self._links(root))]

    def _described(self, root: str, inside: str, name: str) -> dict[str, object]:
        """A file, or a folder, as the hub lists it."""
        path, content = f"{inside}/{name}".strip("/"), self.server.files.get(f"{root}/{name}")
        if content is None:
            return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        return {"type": "file", "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}

    def _links(self, folder: str) -> list[str]:
        below = f"{folder.rstrip('/')}/" if folder else ""
        inside = [name.removeprefix(below) for name in self.server.files if name.startswith(below)]
        return sorted({name.partition("/")[0] + ("/" if "/" in name else "") for name in inside})

    def _listed(self, bucket: str, prefix: str) -> bytes:
        rows = "".join(
            f"<Contents><Key>{escape(name.removeprefix(f'{bucket}/'))}</Key><Size>{len(content)}</Size>"
            f"<ETag>&quot;{hash(content)}&quot;</ETag><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
            for name, content in sorted(self.server.files.items())
            if name.startswith(f"{bucket}/{prefix}")
        )
        xml = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>{rows}'
        return f"{xml}<IsTruncated>false</IsTruncated></ListBucketResult>".encode()

    def _send_file(self, content: bytes, body: bool) -> None:
        asked = self.headers.get("Range")
        if asked is None:
            return self._send(200, content, body, etag=str(hash(content)))
        start, _, end = asked.removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end) + 1]
        span = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
        self._send(206, part, body, etag=str(hash(content)), span=span)

    def _send(
        self,
        code: int,
        content: bytes,
        body: bool,
        *,
        kind: str = "application/octet-stream",
        etag: str = "",
        span: str = "",
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if etag:
            self.send_header("ETag", f'"{etag}"')
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the console."""


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    """A server of the files, as long as the block lasts."""
    with Server(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
