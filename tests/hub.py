"""A hub on loopback: repositories are folders, served as the real one serves them."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@contextmanager
def serving(
    repositories: dict[tuple[str, str], Path],
) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Serve folders by (owner/name, revision); gives the client's environment, and what it gets."""
    fetched: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(200)
            known = {"Content-Type": "application/json", "Content-Length": str(len(body))}
            for key, value in (known | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            for (repository, revision), folder in repositories.items():
                commit = COMMITS[revision]
                files = {
                    file.relative_to(folder).as_posix(): file.read_bytes()
                    for file in sorted(folder.rglob("*"))
                    if file.is_file()
                }
                oid = {name: hashlib.sha1(body).hexdigest() for name, body in files.items()}
                api = f"/api/models/{repository}"
                if path in {f"{api}/tree/{r}" for r in (revision, commit)}:
                    rows = [{"type": "file", "path": n, "size": len(b), "oid": oid[n]}
                            for n, b in files.items()]  # fmt: skip
                    return self.answer(json.dumps(rows).encode())
                names = {f"{api}/revision/{r}" for r in (revision, commit)}
                if path in names or (path == api and revision == "main"):
                    about = {"id": repository, "modelId": repository, "sha": commit, "tags": [],
                             "private": False, "downloads": 0, "likes": 0,
                             "siblings": [{"rfilename": n} for n in files]}  # fmt: skip
                    return self.answer(json.dumps(about).encode())
                for r in (revision, commit):
                    name = path.removeprefix(f"/{repository}/resolve/{r}/")
                    if name in files:
                        if self.command == "GET":
                            fetched.append(name)
                        head = {"ETag": f'"{oid[name]}"', "X-Repo-Commit": commit}
                        return self.answer(files[name], head | {"Accept-Ranges": "bytes"})
            self.send_response(404)
            self.end_headers()

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield (
            {
                "HF_ENDPOINT": address,
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_OFFLINE": "0",
                "HF_TOKEN": "",
            },
            fetched,
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
