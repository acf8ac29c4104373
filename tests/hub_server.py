"""A model hub on the loopback interface: the part of the Hugging Face Hub's protocol that downloads need."""

import hashlib
import json
import re
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

_INFO = re.compile(r"/api/models/(?P<id>.+?)(?:/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/models/(?P<id>.+)/tree/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(?P<id>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass(frozen=True, slots=True)
class Request:
    """One request that the server received."""

    method: str
    path: str
    authorization: str | None


class HubServer:
    """Serves directories as repositories `{id: directory}` at `.url` while the `with` block lasts.

    A repository has one commit, `commit(id)`, to which `main` and all `branches` point. The files of a
    `gated` repository need `token`; as on the Hub, their list does not. `requests` holds what was asked.
    """

    def __init__(
        self,
        repositories: Mapping[str, Path],
        *,
        commits: Mapping[str, str] | None = None,
        gated: Collection[str] = (),
        token: str = "hf_let_me_in",
        branches: Collection[str] = (),
    ) -> None:
        self.repositories = dict(repositories)
        self._commits = dict(commits or {})
        self.gated, self.token = frozenset(gated), token
        self.branches = {"main", *branches}
        self.status: int | None = None  # when set, the answer to every request
        self.requests: list[Request] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def commit(self, repository: str) -> str:
        """The commit of a repository: as given in `commits`, else made from the name alone."""
        return self._commits.get(repository) or hashlib.sha1(repository.encode()).hexdigest()

    def files(self, repository: str) -> dict[str, Path]:
        root = self.repositories[repository]
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}

    def asked_for(self, suffix: str) -> list[Request]:
        """The requests whose path ends with `suffix`."""
        return [request for request in self.requests if request.path.endswith(suffix)]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean; `HubServer.requests` is the log."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, unquote(path), self.headers.get("Authorization")))
        if self.hub.status is not None:
            self._refuse(self.hub.status, "", "The hub has a bad day.")
        elif match := _TREE.fullmatch(path) or _FILE.fullmatch(path) or _INFO.fullmatch(path):
            self._answer({key: unquote(value) for key, value in match.groupdict().items() if value is not None})
        else:
            self._refuse(404, "", "Not found.")

    do_HEAD = do_GET  # noqa: N815  http.server looks the method up by this name

    def _answer(self, asked: dict[str, str]) -> None:
        repository, revision = asked["id"], asked.get("revision", "main")
        if repository not in self.hub.repositories:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif revision not in self.hub.branches | {self.hub.commit(repository)}:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif "file" in asked:
            self._file(repository, asked["file"])
        elif "/tree/" in self.path:
            self._tree(repository)
        else:
            names = [{"rfilename": name} for name in self.hub.files(repository)]
            self._json({"id": repository, "sha": self.hub.commit(repository), "siblings": names, "private": False})

    def _tree(self, repository: str) -> None:
        self._json(
            [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                for name, path in self.hub.files(repository).items()
            ]
        )

    def _file(self, repository: str, name: str) -> None:
        path = self.hub.files(repository).get(name)
        token = self.headers.get("Authorization")
        if repository in self.hub.gated and token != f"Bearer {self.hub.token}":
            self._refuse(401 if token is None else 403, "GatedRepo", f"Access to model {repository} is restricted.")
        elif path is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": self.hub.commit(repository)}
            self._send(path.read_bytes(), headers | {"Accept-Ranges": "bytes"})

    def _send(self, content: bytes, headers: Mapping[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted else 0
        stop = min(int(wanted[2]) + 1, len(content)) if wanted and wanted[2] else len(content)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self._finish(content[start:stop], headers)

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self._finish(b"", {"X-Error-Code": code, "X-Error-Message": message} if code else {})

    def _finish(self, body: bytes, headers: Mapping[str, str]) -> None:
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
