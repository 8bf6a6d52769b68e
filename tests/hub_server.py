"""A small Hugging Face Hub on this machine: repositories are folders FOLDER/OWNER/NAME, and every request is noted.

Data sets lie there, too. Uploads of the token TOKEN are taken as commits with the files in them.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BRANCHES = ("main", "other", COMMIT)
TOKEN = "hf_local"


class Hub(ThreadingHTTPServer):
    """Serves repositories. `cut_after` makes each file's first answer end early, as a broken line does."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked: list[tuple[str, str, str | None]] = []  # method, file, range
        self.cut_after: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> list[str]:
        """Files whose content was asked for, in order, without repetitions."""
        return list(dict.fromkeys(name for method, name, _ in self.asked if method == "GET" and name))


class Answer(BaseHTTPRequestHandler):
    """The questions that are asked: what a repository holds (in two forms), how large a file is, what is in it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if path == ["api", "whoami-v2"]:
            self.answer({"name": "me", "type": "user"}) if self.may_write() else self.respond(401, b"", {})
        elif path[0] == "api":
            repo, kind, revision = "/".join(path[2:4]), *(path[4:6] if path[5:] else ("revision", "main"))
            self.describe(repo, revision, as_tree=kind == "tree")
        else:
            path = path[1:] if path[0] == "datasets" else path
            self.give("/".join(path[:2]), path[3], "/".join(path[4:]))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Uploading: make a repository, ask how to send each file (here: inside the commit), send the commit."""
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        body = self.body()
        if not self.may_write():
            self.respond(401, b"", {})
        elif path[1:] == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            (self.server.folder / name).mkdir(parents=True, exist_ok=True)
            self.answer({"url": f"{self.server.url}/{name}", "id": name})
        elif path[-2] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in
                     json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif path[-2] == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    target = self.server.folder / "/".join(path[2:4]) / line["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(line["value"]["content"]))
            repo = "/".join(path[2:4])
            self.answer(
                {"success": True, "commitUrl": f"{self.server.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}
            )
        else:  # validate-yaml
            self.answer({"errors": [], "warnings": []})

    def body(self) -> bytes:
        """What came with a request, whole or in chunks."""
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self, content: dict) -> None:
        self.respond(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, kind: str) -> None:
        self.respond(404, b"", {"X-Error-Code": kind})

    def respond(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def describe(self, repo: str, revision: str, as_tree: bool) -> None:
        base = self.server.folder / repo
        self.server.asked.append((self.command, "", revision))
        if not base.is_dir():
            return self.refuse("RepoNotFound")
        if revision not in BRANCHES:
            return self.refuse("RevisionNotFound")
        files = sorted(path for path in base.rglob("*") if path.is_file())
        if as_tree:
            names = {path.relative_to(base).as_posix(): path.stat().st_size for path in files}
            answer = [{"type": "file", "path": name, "oid": "0" * 40, "size": size} for name, size in names.items()]
            return self.respond(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        siblings = [{"rfilename": path.relative_to(base).as_posix(), "size": path.stat().st_size} for path in files]
        answer = {"_id": "0", "id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
        self.respond(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def give(self, repo: str, revision: str, name: str) -> None:
        path = self.server.folder / repo / name
        asked = self.headers.get("Range")
        seen = [entry for entry in self.server.asked if entry[:2] == ("GET", name)]
        self.server.asked.append((self.command, name, asked))
        if not path.is_file() or revision not in BRANCHES:
            return self.refuse("EntryNotFound")
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if asked is None:
            status, start = 200, 0
        else:
            status, start = 206, int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        cut = self.server.cut_after
        if self.command == "GET" and cut is not None and not seen and len(part) > cut:
            self.respond(status, part[:cut], headers | {"Content-Length": str(len(part))})
            self.close_connection = True
            return None
        return self.respond(status, part, headers)


@contextmanager
def hub_server(folder: Path) -> Iterator[Hub]:
    """Run a hub for the length of a `with` block."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
