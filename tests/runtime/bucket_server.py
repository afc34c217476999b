"""A fake Google Cloud Storage on 127.0.0.1 for bucket_test.py, with the requests that a run makes.

The clients are unchanged and use HTTPS and credentials: `environment` makes this server their proxy
for googleapis.com and makes them trust its certificate. As in the real service, an object appears
whole or not at all, cannot be appended to, and there are no directories.
"""

import contextlib
import itertools
import json
import pathlib
import re
import ssl
import subprocess
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http import server
from typing import NamedTuple

PAGE = 5  # entries on a page of a listing; Google's have 1,000
TOKEN = "secret"


class Object(NamedTuple):
    content: bytes
    generation: int


class Storage(server.ThreadingHTTPServer):
    """Holds one bucket in memory.

    Attributes:
      objects: {name: Object}.
      requests: the requests so far: ('read', 'stat', 'write', 'delete' or 'list', name or prefix).
      intercept: called before and after each request: (what, name, done) -> the HTTP status to
        answer instead, or None to answer as usual.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, bucket: str, folder: pathlib.Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bucket, self.objects, self.requests, self.uploads = bucket, {}, [], {}
        self.intercept: Callable[[str, str, bool], int | None] = lambda what, name, done: None
        self.generations, self.lock = itertools.count(1), threading.Lock()
        self._folder, self._pem = folder, folder / "server.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-days", "2"]  # noqa: RUF005
            + ["-subj", "/CN=bucket_test", "-addext", "subjectAltName=DNS:*.googleapis.com"]
            + ["-keyout", self._pem, "-out", folder / "ca.pem"],
            check=True,
            capture_output=True,
        )
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(folder / "ca.pem", self._pem)

    def environment(self) -> dict[str, str]:
        """Returns the environment variables that make a process use this server."""
        credentials = self._folder / "credentials.json"  # as `gcloud auth` writes them
        user = {"type": "authorized_user", "client_id": "i", "client_secret": "s"}
        credentials.write_text(json.dumps(user | {"refresh_token": "r"}))
        certificate = str(self._folder / "ca.pem")
        return {
            "https_proxy": f"http://127.0.0.1:{self.server_port}",
            "no_proxy": "localhost,127.0.0.1",
            "CURL_CA_BUNDLE": certificate,  # for TensorFlow
            "TENSORSTORE_CA_BUNDLE": certificate,
            "REQUESTS_CA_BUNDLE": certificate,
            "GOOGLE_APPLICATION_CREDENTIALS": str(credentials),
        }

    def handle_error(self, request, client_address):
        """Prints nothing about clients that were killed."""


@contextlib.contextmanager
def serve(bucket: str, folder: pathlib.Path) -> Iterator[Storage]:
    """Yields a running Storage; its certificate and credentials are written to `folder`."""
    with Storage(bucket, folder) as storage:
        thread = threading.Thread(target=storage.serve_forever, daemon=True)
        thread.start()
        try:
            yield storage
        finally:
            storage.shutdown()


class _Refused(Exception):  # noqa: N818
    """Ends a request; carries the HTTP status of the answer."""


class _Handler(server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.setup_files()
        self.close_connection = False

    def setup_files(self):
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", 0)

    def do_GET(self):
        self._answer()

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _answer(self):
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        self.body = self._received()
        if url.path.endswith("/token"):
            token = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
            return self._send(200, token)
        try:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise _Refused(401)
            for method, pattern, function in _ROUTES:
                found = re.fullmatch(pattern, url.path)
                if found and method == self.command:
                    parts = map(urllib.parse.unquote, found.groups())
                    if next(parts) != self.server.bucket:
                        raise _Refused(404)
                    return self._send(*function(self, *parts))
            raise _Refused(501)
        except _Refused as refused:
            (status,) = refused.args
            said = {"error": {"code": status, "message": f"answered {status} on purpose"}}
            return self._send(status, said)

    def _received(self):
        # TensorFlow sends both headers; if there are chunks, they count.
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while not chunks or chunks[-1]:
            chunks.append(self.rfile.read(int(self.rfile.readline(), 16)))
            self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status, content, headers=None):
        if status in (204, 304):
            content = b""
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    @contextlib.contextmanager
    def _doing(self, what, name):
        """Yields the server's objects, locked during one request."""
        self._intercept(what, name, False)
        with self.server.lock:
            self.server.requests.append((what, name))
            yield self.server.objects
        self._intercept(what, name, True)

    def _intercept(self, *args):
        if status := self.server.intercept(*args):
            raise _Refused(status)

    def _check_generation(self, found: Object | None):
        generation = found.generation if found else 0
        wanted = self.query.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != generation:
            raise _Refused(412)
        if self.query.get("ifGenerationNotMatch") == str(generation):
            raise _Refused(304 if self.command == "GET" else 412)

    def _bucket(self):
        return 200, {"kind": "storage#bucket", "name": self.server.bucket, "location": "US"}

    def _layout(self):
        return 200, {"kind": "storage#storageLayout", "locationType": "region"}

    def _list(self):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        begin, end = self.query.get("startOffset", ""), self.query.get("endOffset", "")
        entries = {}
        with self._doing("list", prefix) as objects:
            for name in sorted(objects):
                if not name.startswith(prefix) or name < begin or (end and name >= end):
                    continue
                head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
                entry = prefix + head + found if found else name
                entries[entry] = None if found else self._described(name)
        later = [entry for entry in entries if entry > self.query.get("pageToken", "")]
        page = later[: min(PAGE, int(self.query.get("maxResults", PAGE)))]
        listed = {
            "items": [entries[entry] for entry in page if entries[entry]],
            "prefixes": [entry for entry in page if not entries[entry]],
        }
        more = {"nextPageToken": page[-1]} if len(page) < len(later) else {}
        return 200, {name: value for name, value in listed.items() if value} | more

    def _described(self, name):
        found = self.server.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": self.server.bucket,
            "size": str(len(found.content)),
            "generation": str(found.generation),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def _get(self, name):
        """Answers with an object's content (alt=media) or description."""
        if self.query.get("alt") == "media":
            return self._read(name)
        with self._doing("stat", name) as objects:
            if name not in objects:
                raise _Refused(404)
            return 200, self._described(name)

    def _read(self, name):
        with self._doing("read", name) as objects:
            found = objects.get(name)
        if not found:
            raise _Refused(404)
        self._check_generation(found)
        headers = {"x-goog-generation": found.generation, "x-goog-metageneration": 1}
        size = len(found.content)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, found.content, headers
        first, last = wanted.groups()
        begin = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if begin >= size:
            raise _Refused(416)
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        return 206, found.content[begin:end], headers

    def _upload(self):
        """Uploads an object in one request, or begins an upload in several."""
        name = self.query["name"]
        if self.query["uploadType"] == "media":
            return self._write(name, self.body)
        self._intercept("write", name, False)
        key = str(len(self.server.uploads))
        self.server.uploads[key] = [name, b""]
        location = f"https://www.googleapis.com/upload/storage/v1/b/{self.server.bucket}/o"
        return 200, b"", {"Location": f"{location}?upload_id={key}"}

    def _go_on(self):
        upload = self.server.uploads[self.query["upload_id"]]
        upload[1] += self.body
        total = self.headers.get("Content-Range", "/0").rpartition("/")[2]
        if len(upload[1]) < int(total):
            received = {"Range": f"bytes=0-{len(upload[1]) - 1}"} if upload[1] else {}
            return 308, b"", received
        return self._write(*upload)

    def _write(self, name, content):
        with self._doing("write", name) as objects:
            self._check_generation(objects.get(name))
            objects[name] = Object(content, next(self.server.generations))
            return 200, self._described(name)

    def _copy(self, name, bucket, to):
        del bucket  # there is one
        with self._doing("read", name) as objects:
            if name not in objects:
                raise _Refused(404)
            content = objects[name].content
        return 200, {"done": True, "resource": self._write(to, content)[1]}

    def _delete(self, name):
        with self._doing("delete", name) as objects:
            if name not in objects:
                raise _Refused(404)
            self._check_generation(objects[name])
            del objects[name]
        return 204, b""


_API, _OBJECT = "/storage/v1/b/([^/]+)", "/o/([^/]+)"
_ROUTES = (
    ("GET", _API, _Handler._bucket),
    ("GET", _API + "/storageLayout", _Handler._layout),
    ("GET", _API + "/o", _Handler._list),
    ("GET", _API + _OBJECT, _Handler._get),
    ("DELETE", _API + _OBJECT, _Handler._delete),
    ("POST", _API + _OBJECT + "/rewriteTo/b/([^/]+)" + _OBJECT, _Handler._copy),
    ("POST", "/upload" + _API + "/o", _Handler._upload),
    ("PUT", "/upload" + _API + "/o", _Handler._go_on),
    ("GET", "/(?!storage/v1/)([^/]+)/(.+)", _Handler._read),
)
