"""A Cloud Storage server in memory, in a process of its own: the part of the JSON API that gcsfs and TensorStore use.

As Cloud Storage documents it: an object is whole or absent, every write makes a new generation, and
`ifGenerationMatch` is checked atomically, and listings are up to date. `--failing` answers that share of all requests
with status 503.

    python cloud_storage.py PORT
"""

import argparse
import base64
import contextlib
import itertools
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit
from urllib.request import Request, urlopen

BUCKET = "runs"
RESUME = 308
"""The status of a resumable upload that waits for more."""


@contextlib.contextmanager
def serve(*options: str) -> Iterator[dict[str, str]]:
    """Serve an empty bucket while the block runs; yields the environment of its clients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, __file__, str(port), *options], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield clients_environment(port)
    finally:
        server.kill()
        server.wait()


def clients_environment(port: int) -> dict[str, str]:
    """The variables that point gcsfs, google-cloud-storage and TensorStore to the server."""
    url = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def copy_all(environment: dict[str, str], source: str, target: str) -> None:
    """Copy all objects whose names begin with `source` to names that begin with `target`."""
    url = environment["STORAGE_EMULATOR_HOST"]
    urlopen(Request(f"{url}/copy-all?source={quote(source)}&target={quote(target)}", method="POST")).read()


class Stored(NamedTuple):
    content: bytes
    generation: int


class Bucket:
    """The objects, and the uploads in progress."""

    def __init__(self, failing: float) -> None:
        self.failing = failing
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self.lock, self.numbers = threading.RLock(), itertools.count(1_700_000_000_000_000)

    def write(self, name: str, content: bytes, query: dict[str, str]) -> dict[str, Any] | None:
        """The metadata of the new object; None if `ifGenerationMatch` does not hold."""
        with self.lock:
            if not self.matches(name, query):
                return None
            self.objects[name] = Stored(content, next(self.numbers))
            return metadata(name, self.objects[name])

    def remove(self, name: str) -> Stored | None:
        with self.lock:
            return self.objects.pop(name, None)

    def matches(self, name: str, query: dict[str, str]) -> bool:
        stored = self.objects.get(name)
        return int(query.get("ifGenerationMatch", "-1")) in (-1, stored.generation if stored else 0)


def metadata(name: str, stored: Stored) -> dict[str, Any]:
    import google_crc32c

    checksum = struct.pack(">I", google_crc32c.value(stored.content))
    return {
        "kind": "storage#object",
        "id": f"{BUCKET}/{name}/{stored.generation}",
        "name": name,
        "bucket": BUCKET,
        "generation": str(stored.generation),
        "metageneration": "1",
        "contentType": "application/octet-stream",
        "size": str(len(stored.content)),
        "crc32c": base64.b64encode(checksum).decode(),
        "etag": str(stored.generation),
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": "2026-01-01T00:00:00.000Z",
    }


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # of clients that were killed
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True
    bucket: Bucket

    def log_message(self, format: str, *args: Any) -> None:  # silent
        pass

    def do_GET(self) -> None:
        path, query = self._request()
        if self._fails():
            return
        if "/o/" in path:
            self._get_object(self._name(path), query, media=query.get("alt") == "media" or path.startswith("/download"))
        elif path.endswith("/o"):
            self._answer(200, self._listing(query))
        else:
            self._answer(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET})

    def do_POST(self) -> None:
        path, query = self._request()
        body = self._body()
        if path == "/copy-all":
            for name, stored in [*self.bucket.objects.items()]:
                if name.startswith(query["source"]):
                    self.bucket.write(query["target"] + name.removeprefix(query["source"]), stored.content, {})
            self._answer(200)
        elif self._fails():
            pass
        elif path.startswith("/upload/"):
            self._upload(query, body)
        elif names := re.fullmatch(r".*/o/([^/]+)/(copyTo|rewriteTo|moveTo)(?:/b/[^/]+)?/o/([^/]+)", path):
            self._copy(unquote(names[1]), unquote(names[3]), names[2], query)
        else:
            self._answer(501, error(501, self.path))

    def do_PUT(self) -> None:
        _, query = self._request()
        body = self._body()
        if not self._fails():
            self._upload(query, body)

    def do_DELETE(self) -> None:
        path, query = self._request()
        if self._fails():
            return
        name = self._name(path)
        with self.bucket.lock:
            if not self.bucket.matches(name, query):
                self._answer(412, error(412, "conditionNotMet"))
            elif self.bucket.remove(name) is None:
                self._answer(404, error(404, name))
            else:
                self._answer(204)

    def _get_object(self, name: str, query: dict[str, str], media: bool) -> None:
        stored = self.bucket.objects.get(name)
        if stored is None:
            self._answer(404, error(404, name))
        elif not self.bucket.matches(name, query):
            self._answer(412, error(412, "conditionNotMet"))
        elif int(query.get("ifGenerationNotMatch", "-1")) == stored.generation:
            self._answer(304)
        elif not media:
            self._answer(200, metadata(name, stored))
        else:
            size = len(stored.content)
            headers = {"x-goog-generation": str(stored.generation), "x-goog-stored-content-length": str(size)}
            wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if wanted is None:
                self._answer(200, stored.content, headers)
                return
            begin = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
            end = min(size, int(wanted[2]) + 1) if wanted[1] and wanted[2] else size
            if begin >= size:
                self._answer(416, error(416, "range"))
            else:
                headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
                self._answer(206, stored.content[begin:end], headers)

    def _listing(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, stop = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        items, prefixes = [], {}
        page: dict[str, Any] = {"kind": "storage#objects"}
        with self.bucket.lock:
            objects = sorted(self.bucket.objects.items())
        for name, stored in objects:
            if not name.startswith(prefix) or not start <= name < stop or name <= query.get("pageToken", ""):
                continue
            folder, below, _ = name[len(prefix) :].partition(delimiter or "\0")
            if below:
                prefixes[prefix + folder + delimiter] = None
                continue
            items.append(metadata(name, stored))
            if len(items) == int(query.get("maxResults", 1000)):
                page["nextPageToken"] = name
                break
        return {**page, "items": items, "prefixes": [*prefixes]}

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        if "upload_id" in query:
            name, first, received = self.bucket.uploads[query["upload_id"]]
            received += body
            total = self.headers.get("Content-Range", "bytes */0").split("/")[1]
            if total == "*" or int(total) > len(received):
                self._answer(RESUME, b"", {"Range": f"bytes=0-{len(received) - 1}"})
            else:
                self._written(self.bucket.write(name, bytes(received), first))
        elif query["uploadType"] == "resumable":
            key = str(next(self.bucket.numbers))
            self.bucket.uploads[key] = query.get("name") or json.loads(body)["name"], query, bytearray()
            where = f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={key}"
            self._answer(200, {}, {"Location": where, "X-GUploader-UploadID": key})
        elif query["uploadType"] == "multipart":
            found = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])
            assert found is not None
            facts, content = (
                re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in body.split(b"--" + found[1].encode())[1:3]
            )
            content = content.removesuffix(b"\n").removesuffix(b"\r")
            self._written(self.bucket.write(json.loads(facts)["name"], content, query))
        else:
            self._written(self.bucket.write(query["name"], body, query))

    def _copy(self, source: str, target: str, kind: str, query: dict[str, str]) -> None:
        with self.bucket.lock:
            stored = self.bucket.remove(source) if kind == "moveTo" else self.bucket.objects.get(source)
            if stored is None:
                self._answer(404, error(404, source))
                return
            written = self.bucket.write(target, stored.content, query)
        size = str(len(stored.content))
        done = {"done": True, "objectSize": size, "totalBytesRewritten": size, "resource": written}
        self._written(done if kind == "rewriteTo" and written else written)

    def _written(self, facts: dict[str, Any] | None) -> None:
        if facts is None:
            self._answer(412, error(412, "conditionNotMet"))
        else:
            self._answer(200, facts)

    def _fails(self) -> bool:
        failing = random.random() < self.bucket.failing
        if failing:
            self._answer(503, error(503, "a failure on purpose"))
        return failing

    def _request(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {key: values[-1] for key, values in parse_qs(parts.query).items()}

    def _name(self, path: str) -> str:
        return unquote(path.split("/o/", 1)[1])

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(
        self, status: int, content: bytes | dict[str, Any] = b"", headers: dict[str, str] | None = None
    ) -> None:
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if isinstance(content, dict) else "text/plain")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)
        self.wfile.flush()


def error(status: int, message: str) -> dict[str, Any]:
    return {"error": {"code": status, "message": message}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--failing", type=float, default=0.0, help="share of the requests")
    options = parser.parse_args()
    Handler.bucket = Bucket(options.failing)
    server = Server(("127.0.0.1", options.port), Handler)
    print("ready", flush=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    server.serve_forever()


def _end_with_parent() -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


if __name__ == "__main__":
    main()
