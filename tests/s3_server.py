"""A real S3 server on this machine (moto's) in a process of its own, with faults that a test switches on.

`set_fault` names a fault: "503": every request gets 503 Slow Down; "stall": no request is answered; "stall PUT": no
write is answered; "": none. Requests are logged as lines "METHOD path".
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
SHORT_TIMEOUTS = (
    '{"config_kwargs": {"connect_timeout": 1, "read_timeout": 1, "retries": {"mode": "standard", "max_attempts": 2}}}'
)


class S3Server:
    """The server of a test; `close` ends it."""

    def __init__(self, folder: Path, *, checks_credentials: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.control, self.log = folder / "control", folder / "requests"
        self.control.write_text("")
        self.log.write_text("")
        environment = {**os.environ, **KEYS}
        if checks_credentials:
            environment["INITIAL_NO_AUTH_ACTION_COUNT"] = "0"
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout is not None, "it is a pipe"
        self.port = int(self._process.stdout.readline())
        self.environment = {
            **KEYS,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "FSSPEC_S3": SHORT_TIMEOUTS,
        }

    def set_fault(self, fault: str) -> None:
        """Switch a fault on, or off with ""."""
        temporary = self.control.with_suffix(".new")
        temporary.write_text(fault)
        temporary.replace(self.control)

    def requests(self, method: str = "") -> list[str]:
        """The requests so far."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(method)]

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _serve(folder: Path) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    application = DomainDispatcherApplication(create_backend_app)
    log = (folder / "requests").open("a", buffering=1)

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            pass

    def faulty(environ: dict[str, Any], start_response: Any) -> Any:
        method = environ["REQUEST_METHOD"]
        log.write(f"{method} {environ['PATH_INFO']}\n")
        fault = (folder / "control").read_text()
        while fault == "stall" or (fault == "stall PUT" and method in ("PUT", "POST")):
            time.sleep(0.05)
            fault = (folder / "control").read_text()
        if fault == "503":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            content = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            content = b"" if method == "HEAD" else content
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))]
            start_response("503 Service Unavailable", headers)
            return [content]
        return application(environ, start_response)

    server = make_server("127.0.0.1", 0, faulty, threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
