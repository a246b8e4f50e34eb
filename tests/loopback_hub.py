"""A small Hub on the loopback interface: what `huggingface_hub` asks of it, and the ways in which it can fail."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class LoopbackHub:
    """
    Repositories in memory, served over HTTP.

    Attributes:
        url (`str`): The value for `HF_ENDPOINT`.
        repos (`dict`): `"model/user/name"` to `{"private", "branches": {name: commit}, "commits": {commit: files}}`.
        requests (`list`): Method, path and Authorization header of everything that was asked.
        faults (`dict`): Part of a path to a status code, to `"die"` (the connection is cut without an answer), or to
            `"hang"` (no answer until the server is closed), or to a status and the Hub's error code.
        token (`str`): When set, every request needs it.
        lfs (`bool`): Whether safetensors go the way of large files: to a storage first, by name only into the commit.
    """

    user = "someone"

    def __init__(self):
        self.repos, self.requests, self.faults, self.commits = {}, [], {}, []
        self.token: str | None = None
        self.lfs, self.large = False, {}
        self.lock, self.closed = threading.Lock(), threading.Event()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.storage = self.url.replace("127.0.0.1", "localhost")  # another host, as far as a client can tell
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def create(self, repo_id: str, kind: str = "model", private: bool = False, files: dict[str, bytes] | None = None):
        repo = {"private": private, "branches": {}, "commits": {}}
        self.repos[f"{kind}/{repo_id}"] = repo
        self.commit(repo, "main", files or {})
        return repo

    def commit(self, repo: dict, branch: str, changes: dict[str, bytes | None], message: str = "") -> str:
        """A new commit on `branch`; None removes a file."""
        files = dict(repo["commits"].get(repo["branches"].get(branch), {}))
        for path, content in changes.items():
            if content is None:
                files.pop(path, None)
            else:
                files[path] = content
        text = json.dumps([message, len(repo["commits"]), sorted(files)])
        commit = hashlib.sha1(text.encode()).hexdigest()
        repo["commits"][commit] = files
        repo["branches"][branch] = commit
        return commit

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        repo = self.repos[f"{kind}/{repo_id}"]
        return repo["commits"][repo["branches"].get(revision, revision)]


def talk_to(hub: LoopbackHub, monkeypatch, cache) -> None:
    """Makes this process, which may have read HF_ENDPOINT long ago, talk to `hub`; nothing is cached elsewhere."""
    import datasets
    import huggingface_hub

    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)  # what `model_info` and the like belong to
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{cache}/hub")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", f"{cache}/datasets")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve()

    def do_HEAD(self):
        self._serve()

    def do_POST(self):
        self._serve()

    def do_PUT(self):
        self._serve()

    def _serve(self):
        hub = self.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        if any(part in path and fault == "hang" for part, fault in hub.faults.items()):
            hub.closed.wait()
        with hub.lock:
            hub.requests.append((self.command, path, self.headers.get("Authorization")))
            for part, fault in list(hub.faults.items()):
                if part in path:
                    if fault == "die":
                        self.close_connection = True
                        self.connection.shutdown(2)
                        return
                    if isinstance(fault, tuple):
                        self._error(fault[0], "Access to this model is restricted.", fault[1])
                        return
                    # As careless servers do, the answer repeats what it was sent.
                    self._error(fault, f"fault {fault} for {self.headers.get('Authorization')}")
                    return
            if path.startswith("/large/"):  # the storage knows its addresses, not who asks
                self._storage(path.removeprefix("/large/"), body)
                return
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._error(401, "Invalid username or password.")
                return
            self._route([unquote(part) for part in path.split("/")[1:]], body)

    def _route(self, parts, body):
        match parts:
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "whoami-v2"]:
                self._json({"type": "user", "name": self.hub.user, "orgs": [], "auth": {}})
            case ["api", "models" | "datasets" as kind, owner, name, *rest]:
                repo = self.hub.repos.get(f"{kind[:-1]}/{owner}/{name}")
                if repo is None:
                    self._error(404, "Repository not found", "RepoNotFound")
                else:
                    self._api(kind, f"{owner}/{name}", repo, rest, body)
            case [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                objects = [
                    entry | {"actions": {"upload": {"href": f"{self.hub.storage}/large/{entry['oid']}"}}}
                    for entry in json.loads(body)["objects"]
                ]
                self._json({"transfer": "basic", "objects": objects})
            case ["datasets", owner, name, "resolve", revision, *file]:
                self._file(f"dataset/{owner}/{name}", revision, "/".join(file))
            case [owner, name, "resolve", revision, *file]:
                self._file(f"model/{owner}/{name}", revision, "/".join(file))
            case _:
                self._error(404, f"no route {'/'.join(parts)}")

    def _create(self, asked):
        owner = asked.get("organization") or self.hub.user
        key = f"{asked.get('type') or 'model'}/{owner}/{asked['name']}"
        url = f"{self.hub.url}/{owner}/{asked['name']}"
        if key in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": url}, 409)
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.create(f"{owner}/{asked['name']}", key.split("/")[0], private)
        self._json({"url": url, "name": f"{owner}/{asked['name']}", "id": "0" * 24})

    def _api(self, kind, repo_id, repo, rest, body):
        match rest:
            case [] | ["revision", _]:
                commit = self._commit_of(repo, rest[1] if rest else "main")
                if commit:
                    names = [{"rfilename": name} for name in repo["commits"][commit]]
                    about = {"id": repo_id, "modelId": repo_id, "sha": commit, "private": repo["private"]}
                    self._json(about | {"siblings": names, "tags": [], "downloads": 0, "likes": 0, "gated": False})
            case ["tree", revision, *_]:
                commit = self._commit_of(repo, revision)
                if commit:
                    files = repo["commits"][commit]
                    folders = {"/".join(name.split("/")[:i]) for name in files for i in range(1, name.count("/") + 1)}
                    entries = [{"type": "directory", "path": name, "oid": _sha(b""), "size": 0} for name in folders]
                    entries += [
                        {"type": "file", "path": name, "oid": _sha(content), "size": len(content)}
                        for name, content in files.items()
                    ]
                    self._json(sorted(entries, key=lambda entry: entry["path"]))
            case ["paths-info", revision]:
                commit = self._commit_of(repo, revision)
                if commit:
                    asked = json.loads(body)["paths"] if body.startswith(b"{") else []
                    found = {name: c for name, c in repo["commits"][commit].items() if name in asked}
                    self._json([{"type": "file", "path": n, "oid": _sha(c), "size": len(c)} for n, c in found.items()])
            case ["preupload", revision]:
                commit = self._commit_of(repo, revision)
                if commit:
                    there = repo["commits"][commit]
                    asked = json.loads(body)["files"]
                    self._json(
                        {
                            "files": [
                                {
                                    "path": file["path"],
                                    "uploadMode": "lfs" if self.hub.lfs and _is_large(file["path"]) else "regular",
                                    "shouldIgnore": False,
                                    "oid": _sha(there[file["path"]]) if file["path"] in there else None,
                                }
                                for file in asked
                            ]
                        }
                    )
            case ["branch", branch]:
                repo["branches"].setdefault(branch, repo["branches"]["main"])
                self._json({})
            case ["commit", branch]:
                self._take_commit(repo_id, repo, branch, body)
            case _:
                self._error(404, f"no route {rest}")

    def _take_commit(self, repo_id, repo, branch, body):
        if not self._commit_of(repo, branch):
            return
        changes, message = {}, ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                message = entry["value"]["summary"]
            elif entry["key"] == "file":
                changes[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                changes[entry["value"]["path"]] = self.hub.large[entry["value"]["oid"]]
            elif entry["key"] == "deletedFile":
                changes[entry["value"]["path"]] = None
        commit = self.hub.commit(repo, branch, changes, message)
        self.hub.commits.append((repo_id, branch, message, sorted(changes)))
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _file(self, key, revision, path):
        repo = self.hub.repos.get(key)
        if repo is None:
            self._error(404, "Repository not found", "RepoNotFound")
            return
        commit = self._commit_of(repo, revision)
        if not commit:
            return
        content = repo["commits"][commit].get(path)
        if content is None:
            self._error(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
            return
        if self.hub.lfs and _is_large(path):
            oid = hashlib.sha256(content).hexdigest()
            headers = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": commit}
            self._answer(302, b"", "text/plain", headers | {"Location": f"{self.hub.storage}/large/{oid}"})
            return
        start, status = 0, 200
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else len(content), len(content))
            total, content, status = len(content), content[start:end], 206
        headers = {"ETag": f'"{_sha(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{total}"
        self._answer(status, content, "application/octet-stream", headers)

    def _storage(self, oid, body):
        if self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == oid
            self.hub.large[oid] = body
        self._answer(200, b"" if self.command == "PUT" else self.hub.large[oid], "application/octet-stream")

    def _commit_of(self, repo, revision):
        commit = repo["branches"].get(revision, revision)
        if commit in repo["commits"]:
            return commit
        self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return None

    def _json(self, data, status=200):
        self._answer(status, json.dumps(data).encode(), "application/json")

    def _error(self, status, message, code=None, headers=None):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        self._answer(status, json.dumps({"error": message}).encode(), "application/json", headers)

    def _answer(self, status, body, kind, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _sha(content: bytes) -> str:
    """Git's name of a file's content, which the client compares with its own to leave out what has not changed."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
