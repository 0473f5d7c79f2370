"""A hub on this machine: the few endpoints with which huggingface_hub creates a repository, commits and reads back."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png", ".0")  # what a hub takes by LFS


class LocalHub(ThreadingHTTPServer):
    """Keeps what is pushed.

    Attributes:
        repos: the files of each repository.
        commits: of each repository, the files after each commit.
        metadata: of each card that was checked, its YAML.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.metadata: list[Any] = []
        self.blobs: dict[str, bytes] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve_hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.startswith("/api/whoami-v2"):
            return self.answer({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+).*", self.path)
        content = self.server.repos.get(found[1], {}).get(found[2]) if found else None
        if content is None:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha1(content).hexdigest()
        return self.reply(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": "0" * 40})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self.body()
        self.reply(b"")

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
            self.server.repos.setdefault(name, {})
            return self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            self.server.metadata.append(yaml.safe_load(json.loads(body)["content"].split("---\n")[1]))
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [self.upload(o["oid"], o["size"]) for o in json.loads(body)["objects"]]
            return self.answer({"transfer": "basic", "objects": objects})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/[^?]+.*", self.path)
        if found is None:
            return self.answer({"error": f"no endpoint {self.path}"}, 404)
        return self.choose_modes(body) if found[2] == "preupload" else self.commit(found[1], body)

    def upload(self, oid: str, size: int) -> dict[str, Any]:
        return {"oid": oid, "size": size, "actions": {"upload": {"href": f"{self.server.url}/lfs/{oid}"}}}

    def choose_modes(self, body: bytes) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def commit(self, repo: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        with self.server.lock:
            files = dict(self.server.repos[repo])
            for value in (line["value"] for line in lines if line["key"] == "file"):
                files[value["path"]] = base64.b64decode(value["content"])
            for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
                files[value["path"]] = self.server.blobs[value["oid"]]
            self.server.repos[repo] = files
            self.server.commits.setdefault(repo, []).append(files)
        oid = f"{len(self.server.commits[repo]):040x}"
        self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "hookOutput": ""})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.reply(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def reply(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Stays silent."""
