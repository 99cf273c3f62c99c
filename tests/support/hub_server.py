"""A small Hugging Face hub on loopback: repositories are folders, and each request is recorded."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789" * 4


class HubServer:
    """Serves `root`/org/name as repository org/name; those in `gated` are refused."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._httpd.server_port}"

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                hub.requests.append("/".join(parts))
                api = parts[:2] == ["api", "models"]
                parts = parts[2:] if api else parts
                name, folder = "/".join(parts[:2]), hub.root.joinpath(*parts[:2])
                if name in hub.gated:
                    return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
                if not folder.is_dir():
                    return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
                if not api:
                    return self._file(folder.joinpath(*parts[4:]))
                files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                listed = [
                    {
                        "type": "file",
                        "path": str(path.relative_to(folder)),
                        "size": path.stat().st_size,
                        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                    }
                    for path in files
                ]
                siblings = [{"rfilename": entry["path"]} for entry in listed]
                found = listed if parts[2] == "tree" else {"id": name, "sha": COMMIT, "siblings": siblings}
                return self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

            def _file(self, path: Path) -> None:
                data = path.read_bytes()
                etag = hashlib.sha1(data).hexdigest()
                self._send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

            def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        return Handler
