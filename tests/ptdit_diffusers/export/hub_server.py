"""A Hugging Face Hub on the loopback, as far as an upload through huggingface_hub asks for it. Keeps all in memory."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse


class HubServer(ThreadingHTTPServer):
    """Repositories with branches, large files by their hash, and a list of what was asked.

    Attributes:
        repos: {repository: {branch: {file name: content}}}.
        large: {sha256: content} of large files that were sent.
        sent: Hashes in the order in which large files came in.
        requests: (method, path) of every request.
        commits_to_refuse: So many next commits get an error 500.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos, self.large, self.sent, self.requests = {}, {}, [], []
        self.commits_to_refuse = 0
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def commit(self, repo: str, branch: str, lines: list[dict]) -> str:
        """Apply the operations of a commit, as huggingface_hub sends them, and return its number."""
        files = self.repos[repo].setdefault(branch, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, code: int, content: object = None, **headers: str) -> None:
        body = json.dumps(content if content is not None else {}).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self) -> None:
        hub, url = self.server, urlparse(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, url.path))
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if repo in hub.repos:
                return self.answer(409, {"error": "exists", "url": f"{hub.endpoint}/{repo}"})
            hub.repos[repo] = {"main": {}}
            return self.answer(200, {"url": f"{hub.endpoint}/{repo}", "name": repo})
        if parts == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        if self.command == "PUT":
            oid = hashlib.sha256(body).hexdigest()
            assert oid == parts[-1], "the content is not what was announced"
            hub.large[oid] = body
            hub.sent.append(oid)
            return self.answer(200)
        if parts[2:] == ["info", "lfs", "objects", "batch"] or parts[-3:] == ["lfs", "objects", "batch"]:
            return self.answer(
                200, {"transfer": "basic", "objects": [self.place(o) for o in json.loads(body)["objects"]]}
            )
        if parts[:2] == ["api", "models"] and len(parts) > 4:
            return self.handle_model("/".join(parts[2:4]), parts[4:], parse_qs(url.query), body)
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in hub.repos:
            return self.answer(200, {"id": "/".join(parts[2:4]), "sha": "0" * 40, "siblings": []})
        return self.answer(404, {"error": f"{self.command} {url.path}"}, X_Error_Code="EntryNotFound")

    def place(self, wanted: dict) -> dict:
        """Where a large file goes; nothing to do for one that is here."""
        if wanted["oid"] in self.server.large:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.server.endpoint}/large/{wanted['oid']}"}}}

    def handle_model(self, repo: str, rest: list[str], query: dict, body: bytes) -> None:
        hub = self.server
        if rest[0] == "branch":
            hub.repos[repo].setdefault(rest[1], {})
            return self.answer(201)
        if rest[0] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if rest[0] == "commit":
            if hub.commits_to_refuse:
                hub.commits_to_refuse -= 1
                return self.answer(400, {"error": "not now"})
            branch, answer = rest[1], {}
            if query.get("create_pr") == ["1"]:
                branch = "refs/pr/1"
                answer = {"pullRequestUrl": f"{hub.endpoint}/{repo}/discussions/1"}
            number = hub.commit(repo, branch, [json.loads(line) for line in body.splitlines()])
            url = f"{hub.endpoint}/{repo}/commit/{number}"
            return self.answer(200, {"success": True, "commitOid": number, "commitUrl": url, **answer})
        return self.answer(404, {"error": "/".join(rest)}, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request
