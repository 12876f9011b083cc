"""A hub of models on this machine: repositories are folders, and what is asked for is noted."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


class Hub:
    """What a hub has.

    Attributes:
        repositories: owner/name -> folder.
        asked: the addresses that were asked for.
    """

    def __init__(self):
        self.repositories, self.asked = {}, []
        self.address = ""

    def commit(self, repo):
        """Return a commit that the content gives."""
        digest = hashlib.sha1(repo.encode())
        for name, file in self.files(repo):
            digest.update(name.encode() + file.read_bytes())
        return digest.hexdigest()

    def files(self, repo):
        folder = Path(self.repositories[repo])
        found = sorted(p for p in folder.rglob("*") if p.is_file())
        return [(p.relative_to(folder).as_posix(), p) for p in found]

    def answer(self, path):
        """Return (status, headers, content)."""
        parts = [unquote(p) for p in urlparse(path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repo = "/".join(parts[:2])
        if repo not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no"}, b""
        sha = self.commit(repo)
        if len(parts) > 3 and parts[3] not in ("main", sha):
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no"}, b""
        if api and "tree" in parts:
            found = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                for name, file in self.files(repo)
                for data in [file.read_bytes()]
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
        if api:
            names = [{"rfilename": name} for name, _ in self.files(repo)]
            said = {"id": repo, "modelId": repo, "sha": sha, "siblings": names, "private": False}
            return 200, {"Content-Type": "application/json"}, json.dumps(said).encode()
        file = Path(self.repositories[repo]) / "/".join(parts[4:])
        if parts[2] != "resolve" or not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}, b""
        data = file.read_bytes()
        return 200, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": sha}, data


def _oid(data):
    return hashlib.sha256(data).hexdigest()


@contextmanager
def running():
    """Give a hub that answers."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hub.asked.append(self.path)
            status, headers, content = hub.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
