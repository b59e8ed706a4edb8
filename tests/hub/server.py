"""A hub on localhost: the protocol for reading, streaming, creating and pushing, with injected faults."""

import base64
import hashlib
import json
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Hub:
    """Repositories as (kind, name) -> path -> bytes, recorded requests, and faults to inject.

    `files` are served by a plain web server: `/files/NAME` supports ranges, `/whole/NAME` declares that it does not, and
    `/plain/NAME` declares nothing and has a new ETag each time.
    `faults` is a list of (pattern of the path, fault). A fault is a status such as 503, `"cut"` (half of the body),
    `"etag"` (a changed ETag), `"other"` (changed content from now on), or `None` (no fault for this request).
    """

    def __init__(self):
        self.clear()

    def clear(self):
        self.repos, self.faults, self.asked, self.files = {}, [], [], {}

    def add(self, name, files, kind="datasets"):
        self.repos[kind, name] = {
            path: data if isinstance(data, bytes) else data.encode() for path, data in files.items()
        }

    def commit(self, repo):
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()

    def fault(self, path):
        for number, (pattern, what) in enumerate(self.faults):
            if re.search(pattern, path):
                del self.faults[number]
                return what
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def address(self):
        return f"http://{self.headers['Host']}"

    def reply(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code):
        self.reply(404, {"error": code}, X_Error_Code=code)

    def repo_of(self, kind, name):
        return (kind or "models", name) if (kind or "models", name) in self.hub.repos else None

    def answer(self):  # noqa: C901  (one branch per address)
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        what = self.hub.fault(path)
        if isinstance(what, int):
            self.reply(what, {"error": "injected"}, Retry_After="0")
            return
        if found := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(self.repo_of(*found.group(1, 2)), found[4], what)
        elif found := re.fullmatch(r"/(files|whole|plain)/(.+)", path):
            self.file(found[2], found[1], what)
        elif found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self.info(self.repo_of(*found.group(1, 2)), found[2])
        elif found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/(tree|paths-info)/([^/]+)/?(.*)", path):
            self.tree(self.repo_of(*found.group(1, 2)), found[5])
        elif path == "/api/repos/create":
            made = json.loads(body)
            kind = made.get("type", "model") + "s"
            name = f"{made.get('organization') or 'me'}/{made['name']}"
            self.hub.repos.setdefault((kind, name), {})
            self.reply(200, {"url": f"{self.address}/{kind}/{name}", "id": name})
        elif path == "/api/whoami-v2":
            self.reply(200, {"name": "me", "type": "user", "orgs": []})
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/preupload/.+", path):
            files = json.loads(body)["files"]
            modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            self.reply(200, {"files": modes})
        elif found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/commit/.+", path):
            self.take(found.group(1, 2), body)
        else:
            self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815  (the names that http.server calls)

    def resolve(self, repo, name, what):
        if repo is None:
            self.missing("RepoNotFound")
            return
        data = self.hub.repos[repo].get(name)
        if data is None:
            self.missing("EntryNotFound")
            return
        self.send(data, what, {"X_Repo_Commit": self.hub.commit(repo)})

    def file(self, name, kind, what):
        if name not in self.hub.files:
            self.reply(404)
            return
        if what == "other":
            self.hub.files[name] = self.hub.files[name].swapcase()
        headers = {"files": {}, "whole": {"Accept_Ranges": "none"}}.get(kind)
        if kind != "files":
            del self.headers["Range"]
        if kind == "plain":
            headers = {"Accept_Ranges": None, "ETag": f'"{len(self.hub.asked)}"'}
        self.send(self.hub.files[name], what, headers)

    def send(self, data, what, headers):
        tag = hashlib.sha256(data + (b"x" if what == "etag" else b"")).hexdigest()
        headers = {"ETag": f'"{tag}"', "Accept_Ranges": "bytes", **headers}
        headers = {name: value for name, value in headers.items() if value is not None}
        status, part = 200, data
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), int(found[2]) if found[2] else len(data) - 1
            status, part = 206, data[start : end + 1]
            headers["Content_Range"] = f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"
        if what == "cut" and self.command == "GET":
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return
        self.reply(status, part, **headers)

    def info(self, repo, name):
        if repo is None:
            self.missing("RepoNotFound")
            return
        files = self.hub.repos[repo]
        card = re.match(rb"---\n(.*?)\n---", files.get("README.md", b""), re.DOTALL)
        found = {"id": name, "sha": self.hub.commit(repo), "private": False, "tags": [], "downloads": 0, "likes": 0}
        found["siblings"] = [{"rfilename": path} for path in files]
        if card:
            import yaml

            found["cardData"] = yaml.safe_load(card[1])
        self.reply(200, found)

    def tree(self, repo, folder):
        if repo is None:
            self.missing("RepoNotFound")
            return
        start = f"{folder}/" if folder else ""
        listed, deep = {}, "recursive=true" in urlparse(self.path).query.lower()
        for path, data in self.hub.repos[repo].items():
            if path.startswith(start):
                inner, _, deeper = path.removeprefix(start).partition("/")
                oid = hashlib.sha1(data).hexdigest()
                if deeper:
                    listed[start + inner] = {"type": "directory", "path": start + inner, "oid": oid}
                if deep or not deeper:
                    listed[path] = {"type": "file", "path": path, "size": len(data), "oid": oid}
        self.reply(200, list(listed.values()))

    def take(self, repo, body):
        files = self.hub.repos[repo]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                files.pop(line["value"]["path"], None)
        self.reply(
            200,
            {
                "commitUrl": f"{self.address}/{'/'.join(repo)}/commit/{self.hub.commit(repo)}",
                "commitOid": self.hub.commit(repo),
                "success": True,
            },
        )


class Server(ThreadingHTTPServer):
    """A server that ignores clients that disconnect."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving():
    """Yield a hub and its address."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
