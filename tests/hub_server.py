"""A Hub on this machine: the HTTP routes of the Hugging Face Hub that uploads and downloads use.

Repositories are kept in memory. The server can break a connection in the middle of a file, in either direction.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

KINDS = {"models": "model", "spaces": "space"}
LARGE = (".safetensors", ".png")  # uploaded by LFS; other files are part of the commit request


@dataclass
class Repository:
    """The files of every commit, and the head of each branch."""

    private: bool
    gated: str | bool = False  # True, "auto" or "manual": files only for readers who were accepted
    variables: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # id -> path -> digest
    titles: dict[str, str] = field(default_factory=dict)  # id -> title
    descriptions: dict[str, str] = field(default_factory=dict)  # id -> the rest of the message
    branches: dict[str, str] = field(default_factory=dict)  # name -> id

    def commit(self, branch: str, files: dict[str, str], title: str) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[oid], self.titles[oid], self.branches[branch] = files, title, oid
        return oid

    def files(self, revision: str) -> tuple[str, dict[str, str]] | None:
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


class Hub(ThreadingHTTPServer):
    """An HTTP server that runs from `start` to `stop`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens, self.readers = {"hf_ann": "ann"}, {"hf_reads": "ann"}  # write and read-only tokens, each with its user
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}  # uploaded content by its SHA-256 digest
        self.received = 0  # bytes of large files received in all uploads
        self.break_upload_after: int | None = None  # close the connection after this many bytes of a large file
        self.break_download_after: int | None = None  # the same for a download, but only once
        self.requests: list[str] = []  # method and path of each
        self.instead: bytes | Callable[[], None] | None = (
            None  # a fixed answer to all requests, or a function called before each
        )

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> None:
        Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: tests close connections on purpose, and an error of the server fails the request of the client."""

    def store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

    def content(self, name: str, path: str, revision: str = "main", kind: str = "model") -> bytes:
        found = self.repositories[kind, name].files(revision)
        assert found, revision
        return self.blobs[found[1][path]]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _send(self, status: int, body: Any = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, message: str, code: str = "") -> None:
        self._send(status, {"error": message}, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if isinstance(self.server.instead, bytes):
            return self._send(200, self.server.instead)
        if self.server.instead:
            self.server.instead()
        self.writer = self.server.tokens.get(token)
        self.reader = self.writer or self.server.readers.get(token)
        if self.command == "PUT":
            return self._receive(path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0))) if self.command == "POST" else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        if token and not self.reader:
            return self._refuse(401, "Invalid credentials in Authorization header")
        routes = {
            r"/api/whoami-v2": self._who,
            r"/api/validate-yaml": self._validate,
            r"/api/repos/create": self._create,
            r"/api/(models|spaces)/([^/]+/[^/]+)(?:/revision/(.+))?": self._info,
            r"/api/(models|spaces)/([^/]+/[^/]+)/refs": self._refs,
            r"/api/(models|spaces)/([^/]+/[^/]+)/(preupload|commit|commits|branch|tree)/(.+)": self._act,
            r"/api/spaces/([^/]+/[^/]+)/variables": self._variable,
            r"/(spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"/(spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._resolve,
        }
        for route, answer in routes.items():
            if found := re.fullmatch(route, path):
                return answer(*found.groups())
        return self._refuse(404, f"no such route: {self.command} {path}")

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _who(self) -> None:
        if not self.reader:
            return self._refuse(401, "Invalid username or password.")
        role = "write" if self.writer else "read"
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return self._send(200, {"type": "user", "name": self.reader, "orgs": [], "auth": token})

    def _validate(self) -> None:
        """The Hub validates the metadata of a card before the commit."""
        errors = []
        if re.search(r"(?m)^license: *(?!mit|apache-2.0|cc0-1.0)\S", json.loads(self.body)["content"].split("\n---\n")[0]):
            errors = [{"message": '"license" must be one of mit, apache-2.0, cc0-1.0'}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _create(self) -> None:
        request = json.loads(self.body)
        owner, kind = request["organization"] or self.writer, request.get("type") or "model"
        if not self.reader:
            return self._refuse(401, "Invalid username or password.")
        if owner != self.writer:
            return self._refuse(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        key = kind, f"{owner}/{request['name']}"
        url = f"{self.server.address}/{'spaces/' if kind == 'space' else ''}{key[1]}"
        if key in self.server.repositories:
            return self._send(409, {"error": "You already created this repo", "url": url}, X_Error_Message="already exists")
        repository = Repository(request.get("visibility") == "private" or request.get("private", False))
        files = {".gitattributes": b"*.safetensors filter=lfs\n"}
        if request.get("sdk") == "static":  # the Hub fills it with an example
            card = b"---\ntitle: Example\nsdk: static\n---\n\nRead the docs.\n"
            files |= {"README.md": card, "index.html": b"Hello", "style.css": b"p {}"}
        repository.commit("main", {name: self.server.store(content) for name, content in files.items()}, "initial commit")
        self.server.repositories[key] = repository
        return self._send(200, {"url": url, "name": key[1]})

    def _repository(self, kind: str, name: str, write: bool = False) -> Repository | None:
        """Return the repository if the token may read it (or write to it); answer with an error if not."""
        repository = self.server.repositories.get((kind, name))
        owner = name.split("/")[0]
        if repository is None or (repository.private and self.reader != owner):
            self._refuse(401 if not self.reader else 404, "Repository not found", "RepoNotFound")
        elif write and self.writer != owner:
            self._refuse(403, "This token may not write to this repository")
        else:
            return repository
        return None

    def _info(self, kinds: str, name: str, revision: str | None) -> None:
        if repository := self._repository(KINDS[kinds], name):
            if not (found := repository.files(revision or "main")):
                return self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            siblings = [{"rfilename": path} for path in found[1]]
            self._send(
                200,
                {"id": name, "sha": found[0], "private": repository.private, "gated": repository.gated}
                | {"siblings": siblings, "tags": []},
            )

    def _refs(self, kinds: str, name: str) -> None:
        if repository := self._repository(KINDS[kinds], name):
            heads = repository.branches.items()
            branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in heads]
            self._send(200, {"branches": branches, "tags": [], "converts": []})

    def _act(self, kinds: str, name: str, what: str, revision: str) -> None:
        if not (repository := self._repository(KINDS[kinds], name, write=what not in ("tree", "commits"))):
            return None
        if what == "branch":
            repository.branches[revision] = repository.branches["main"]
            return self._send(201, {})
        revision, _, below = revision.partition("/")
        if not (found := repository.files(revision)):
            return self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        oid, files = found
        if below:  # a subdirectory: repositories here have none
            return self._refuse(404, f"{below} does not exist", "EntryNotFound")
        if what == "commits":  # of all branches, the last one first
            ids = list(repository.commits)
            listed = ({"id": it, "title": repository.titles[it]} for it in reversed(ids[: ids.index(oid) + 1]))
            more = {"date": "2026-01-01T00:00:00Z", "authors": []}
            return self._send(200, [{**it, "message": repository.descriptions.get(it["id"], ""), **more} for it in listed])
        if what == "tree":
            return self._send(200, [self._entry(path, digest) for path, digest in files.items()])
        if what == "preupload":
            answers = []
            for path in (it["path"] for it in json.loads(self.body)["files"]):
                known = self._entry(path, files[path])["oid"] if path in files else None
                mode = "lfs" if path.endswith(LARGE) else "regular"
                answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
            return self._send(200, {"files": answers})
        home = f"{self.server.address}/{'spaces/' if kinds == 'spaces' else ''}{name}"
        return self._commit(repository, revision, oid, dict(files), home)

    def _entry(self, path: str, digest: str) -> dict[str, Any]:
        content = self.server.blobs[digest]
        is_large = path.endswith(LARGE)
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # the blob id of git
        large = {"lfs": {"oid": digest, "size": len(content), "pointerSize": 134}} if is_large else {}
        return {"type": "file", "path": path, "size": len(content), "oid": digest if is_large else blob, **large}

    def _commit(self, repository: Repository, branch: str, oid: str, files: dict[str, str], home: str) -> None:
        title = description = ""
        for line in map(json.loads, self.body.splitlines()):
            key, it = line["key"], line["value"]
            if key == "header":
                title, description = it["summary"], it["description"]
                if it.get("parentCommit", oid) != oid:
                    return self._refuse(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[it["path"]] = self.server.store(base64.b64decode(it["content"]))
            elif key == "lfsFile":
                if it["oid"] not in self.server.blobs:
                    return self._refuse(400, f"{it['path']} was not uploaded")
                files[it["path"]] = it["oid"]
            elif key == "deletedFile":
                del files[it["path"]]
        new = repository.commit(branch, files, title)
        repository.descriptions[new] = description
        return self._send(200, {"success": True, "commitOid": new, "commitUrl": f"{home}/commit/{new}"})

    def _variable(self, name: str) -> None:
        if repository := self._repository("space", name, write=True):
            request = json.loads(self.body)
            repository.variables[request["key"]] = request["value"]
            self._send(200, {request["key"]: request})

    def _batch(self, space: str | None, name: str) -> None:
        if self._repository("space" if space else "model", name, write=True):
            objects = json.loads(self.body)["objects"]
            for it in objects:
                if it["oid"] not in self.server.blobs:
                    it["actions"] = {"upload": {"href": f"{self.server.address}/store/{it['oid']}"}}
            self._send(200, {"transfer": "basic", "objects": objects})

    def _receive(self, path: str) -> None:
        """Receive a large file at an address that `_batch` gave out."""
        size, limit = int(self.headers["Content-Length"]), self.server.break_upload_after
        content = self.rfile.read(size if limit is None else min(size, limit))
        self.server.received += len(content)
        if limit is not None and len(content) < size:
            return self._hang_up()
        if self.server.store(content) != path.removeprefix("/store/"):
            return self._refuse(400, "the content does not have the announced digest")
        return self._send(200, {})

    def _resolve(self, space: str | None, name: str, revision: str, path: str) -> None:
        if not (repository := self._repository("space" if space else "model", name)):
            return None
        if not (found := repository.files(revision)):
            return self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        oid, files = found
        if path not in files:
            self.close_connection = False
            return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        content, etag = self.server.blobs[files[path]], self._entry(path, files[path])["oid"]
        start = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-"))
        limit = self.server.break_download_after
        self.send_response(206 if start else 200)
        for header, value in {
            "X-Repo-Commit": oid,
            "ETag": f'"{etag}"',
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(content) - start),
            "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
        }.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if limit is not None and len(content) > limit:
            self.server.break_download_after = None
            self.wfile.write(content[start : start + limit])
            self.wfile.flush()
            return self._hang_up()
        self.wfile.write(content[start:])
        return None
