"""A small Hugging Face hub on loopback, for `huggingface_hub`: repositories in memory, with commits, gates and faults.

with SmallHub() as hub:
    hub.repositories["models/owner/name"] = Repository({"config.json": b"{}"})
    os.environ["HF_ENDPOINT"] = hub.address

Source: what huggingface_hub 2.4 asks: hf_api.py (repo_info, list_repo_tree), file_download.py (get_hf_file_metadata,
http_get), utils/_http.py (hf_raise_for_status).
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
TOKEN = "hf_good"


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class Repository:
    """files: of the branch main. gated: TOKEN alone opens it. has_tree: its files are listed with their sizes. branches: further ones. cut: path -> how many downloads of
    it break off in the middle."""

    files: dict[str, bytes]
    gated: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    old: dict[str, dict[str, bytes]] = field(default_factory=dict)
    has_tree: bool = True

    def move(self, files: dict[str, bytes]) -> None:
        """A new commit on main."""
        self.old[commit_of(self.files)] = self.files
        self.files = files

    def at(self, revision: str | None) -> dict[str, bytes] | None:
        """The files of a branch or commit."""
        heads = {"main": self.files, **self.branches}
        commits = {commit_of(files): files for files in heads.values()} | self.old
        return (heads | commits).get(revision or "main")


class SmallHub:
    """repositories: "models/OWNER/NAME" or "datasets/OWNER/NAME" -> Repository. asked: (method, path) of every request."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.asked: list[tuple[str, str]] = []

        class Handler(_Handler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "SmallHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> set[str]:
        """Paths of the files whose content was asked for since the last call."""
        paths = {match[4] for method, path in self.asked if method == "GET" and (match := FILE.fullmatch(path))}
        self.asked.clear()
        return paths


class _Handler(BaseHTTPRequestHandler):
    hub: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        if match := FILE.fullmatch(path):
            kind, name, revision, file = match.groups()
        elif match := API.fullmatch(path):
            kind, name, what, revision = match.groups()
            file = None
        else:
            return self._error(404, "")
        repository = self.hub.repositories.get(f"{kind or 'models'}/{name}")
        if repository is None:
            return self._error(401, "RepoNotFound")
        token = self.headers.get("Authorization", "")
        if repository.gated and file is not None and token != f"Bearer {TOKEN}":
            return self._error(403 if token else 401, "GatedRepo")
        files = repository.at(revision)
        if files is None:
            return self._error(404, "RevisionNotFound")
        if file is not None:
            return self._file(repository, files, file)
        if what == "tree" and not repository.has_tree:
            return self._error(404, "")
        if what == "tree":
            return self._json(
                [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                 for path, content in files.items()]
            )  # fmt: skip
        return self._json({"id": name, "sha": commit_of(files), "siblings": [{"rfilename": path} for path in files]})

    def _json(self, value) -> None:
        content = json.dumps(value).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(content))})
        self.wfile.write(content)

    def _file(self, repository: Repository, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self._error(404, "EntryNotFound")
        content = files[path]
        about = {"X-Repo-Commit": commit_of(files), "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        about["Content-Length"] = str(len(content) - start)
        if start:
            about["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._head(206 if start else 200, about)
        if self.command == "HEAD":
            return
        if repository.cut.get(path, 0) > 0:
            repository.cut[path] -= 1
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content[start:])

    def _error(self, status: int, code: str) -> None:
        self._head(status, {"X-Error-Code": code, "X-Error-Message": code, "Content-Length": "0"})

    def _head(self, status: int, fields: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
