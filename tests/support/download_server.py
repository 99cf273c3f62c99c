"""A loopback stand-in for Meta's download server, which can also misbehave on request.

Like the real one, it requires the link's signature in the query, serves ranges, and refuses HEAD.
`faults` makes the next requests for a path fail, one fault each, in order:

- an `int`: answer with that status; `bytes`: answer with exactly these, headers and all;
- `("cut", n)`: disconnect after n bytes of the body;
- `("slow", seconds)`: wait in the middle of the body; `"flip"`: damage one byte;
- `"page"`: a login page; `"no-range"`: the whole file, whatever range was requested.

A fault in `always` applies to every request for its path that has no other fault.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

Fault = int | bytes | str | tuple[str, float]
SIGNATURE = "Kx7SeCrEt~Q-signature__"
PAGE = b"\n<!DOCTYPE html><html><body>Log in to continue</body></html>" + b" " * 900


class Request(NamedTuple):
    method: str
    path: str
    range: str | None


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


class FakeLlamaServer:
    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.requests: list[Request] = []
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._httpd.daemon_threads = True
        self._httpd.handle_error = lambda *_: None  # connections that are cut are the point here
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self._httpd.server_port}"

    def link(self, host: str | None = None, expires: int | str = 4102444800) -> str:
        """A signed link whose policy names `host`, in CloudFront's base64 alphabet."""
        condition = {"DateLessThan": {"AWS:EpochTime": "EXPIRES"}}
        resource = f"https://{host or 'elsewhere.example'}/*"
        terms = json.dumps(
            {"Statement": [{"Resource": resource, "Condition": condition}]}, separators=(",", ":")
        )
        terms = terms.replace('"EXPIRES"', str(expires))  # which need not be a number of JSON
        policy = base64.b64encode(terms.replace("/", "\\/").encode()).decode()
        policy = policy.translate(str.maketrans("+=/", "-_~"))
        return f"{self.origin}/*?Policy={policy}&Signature={SIGNATURE}&Key-Pair-Id=K"

    def publish(self, folder: str, shards: int = 1, *, old: bool = False, size: int = 4000) -> None:
        """Serve files of a few bytes as a model; `old` is the layout of LLaMA 1 and Llama 2."""
        own = {f"consolidated.{i:02d}.pth": bytes([i + 1, 0, 10]) * size for i in range(shards)}
        own["params.json"] = b'{"dim": 8}'
        if old:
            tokenizer = self.files["tokenizer.model"] = b"pieces"
            self.files["tokenizer_checklist.chk"] = f"{md5(tokenizer)}  tokenizer.model\n".encode()
        else:
            own["tokenizer.model"] = b"pieces of " + folder.encode()
        self.offer(folder, own)

    def offer(self, folder: str, own: dict[str, bytes]) -> None:
        """Serve a model's own files, with a checklist and Meta's terms."""
        checklist = "".join(f"{md5(data)}  {name}\n" for name, data in own.items())
        own["checklist.chk"] = checklist.encode()
        for name, data in own.items():
            self.files[f"{folder}/{name}"] = data
        for name in ("LICENSE", "USE_POLICY", "USE_POLICY.md"):
            self.files[name] = f"Meta's {name}\n".encode()

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers of the requests for `path`."""
        return [request.range for request in self.requests if request.path == path]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def _answer(self) -> None:
                url = urlsplit(self.path)
                path = url.path[1:]
                asked = self.headers.get("Range")
                server.requests.append(Request(self.command, path, asked))
                queue = server.faults[path]
                fault = queue.pop(0) if queue else server.always.get(path)
                if self.command == "HEAD" or parse_qs(url.query).get("Signature") != [SIGNATURE]:
                    fault = 403
                if fault is None and path not in server.files:
                    fault = 404
                data = server.files.get(path, b"")
                if fault == "flip":
                    data = data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]
                start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
                if isinstance(fault, bytes):
                    self.wfile.write(fault)
                    self.close_connection = True
                elif isinstance(fault, int):
                    self._send(fault, b"<Error/>", type="application/xml")
                elif fault == "page":
                    self._send(200, PAGE, type="text/html; charset=utf-8")
                elif asked is None or fault == "no-range":
                    self._send(200, data, fault)
                elif start >= len(data):
                    self._send(416, b"", range=f"bytes */{len(data)}")
                else:
                    span = f"bytes {start}-{len(data) - 1}/{len(data)}"
                    self._send(206, data[start:], fault, range=span)

            def _send(
                self,
                status: int,
                body: bytes,
                fault: Fault | None = None,
                type: str = "binary/octet-stream",
                range: str | None = None,
            ) -> None:
                self.send_response(status)
                self.send_header("Content-Type", type)
                self.send_header("Content-Length", str(len(body)))
                if range:
                    self.send_header("Content-Range", range)
                self.end_headers()
                if self.command == "HEAD":
                    return
                try:
                    match fault:
                        case ("cut", n):
                            self.wfile.write(body[: int(n)])
                            self.close_connection = True
                        case ("slow", seconds):
                            self.wfile.write(body[: len(body) // 2])
                            self.wfile.flush()
                            time.sleep(seconds)
                            self.wfile.write(body[len(body) // 2 :])
                        case _:
                            self.wfile.write(body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

        return Handler
