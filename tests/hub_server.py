"""The part of the Hugging Face hub's API that an upload uses, on this machine: repositories and commits in memory.

Written from the requests that huggingface_hub sends; it does not check tokens except by equality.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer:
    """The server: `repositories` is {name: {"private": bool, "files": {path: content}}}; `fault` a status to answer."""

    def __init__(self, token: str = "hf_right") -> None:
        self.token = token
        self.repositories: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.fault: tuple[str, int] | None = None  # (part of a path, status)
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self, "GET")

            def do_POST(self) -> None:
                outer._answer(self, "POST")

            def do_PUT(self) -> None:
                outer._answer(self, "PUT")

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler, method: str) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.requests.append(f"{method} {handler.path}")
        status, answer = self._respond(method, handler.path, handler.headers, body)
        content = json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        if status >= 400:
            handler.send_header("X-Error-Message", str(answer.get("error")))
        handler.end_headers()
        handler.wfile.write(content)

    def _respond(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.fault is not None and self.fault[0] in path:
            return self.fault[1], {"error": "fault of the test"}
        if path.startswith("/blob/") and method == "PUT":
            self.blobs[path.removeprefix("/blob/")] = body
            return 200, {}
        if headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            private = wanted.get("private", wanted.get("visibility") == "private")
            self.repositories[name] = {"private": bool(private), "files": {}}
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": []}
        found = re.match(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?/(preupload|commit|info/lfs|tree|revision)", path)
        name = found[1] if found else path.removeprefix("/api/models/").partition("?")[0]
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        kind = found[2] if found else ""
        if kind == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            return 200, {"files": modes}
        if kind == "info/lfs":
            objects = [
                {
                    "oid": wanted["oid"],
                    "size": wanted["size"],
                    "actions": {"upload": {"href": f"{self.url}/blob/{wanted['oid']}"}},
                }
                for wanted in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if kind == "commit":
            self._commit(name, body)
            return 200, {
                "success": True,
                "commitOid": "c" * 40,
                "commitUrl": f"{self.url}/{name}/commit/{'c' * 40}",
                "hookOutput": "",
            }
        return 200, {"id": name, "sha": "a" * 40, "siblings": [], "private": self.repositories[name]["private"]}

    def _commit(self, name: str, body: bytes) -> None:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.repositories[name]["files"][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.repositories[name]["files"][value["path"]] = self.blobs[value["oid"]]
