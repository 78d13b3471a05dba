"""A real registry on the loopback, as its users have it: with TLS and passwords, or without; and
one that does not do what it should, in front of it."""

from __future__ import annotations

import base64
import http.client
import http.server
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from product import until

USER, PASSWORD = "ann", "open sesame"
_PASSWORD_BCRYPT = "$2y$05$e/a/Uq8FF64HCFM7wkRV0OYHODk4aZmiM0wBkzxf4ZUg461FsTuXq"


@dataclass(frozen=True)
class Registry:
    """`address` is HOST:PORT; `certificate` of one that speaks TLS."""

    address: str
    certificate: Path | None = None

    def push(self, layout: Path, name: str) -> str:
        """Put what lies in an OCI layout there; the reference to pull it by."""
        options = ["--dest-tls-verify=false"]
        if self.certificate is not None:
            options = [f"--dest-cert-dir={self.certificate.parent}",
                       f"--dest-creds={USER}:{PASSWORD}"]  # fmt: skip
        reference = f"{self.address}/{name}"
        subprocess.run(
            ["skopeo", "copy", "--all", "--quiet", *options, f"oci:{layout}",
             f"docker://{reference}"],
            check=True, timeout=120,
        )  # fmt: skip
        return reference

    def trust(self, home: Path) -> None:
        """Have skopeo of this home believe the certificate."""
        assert self.certificate is not None
        directory = home / ".config/containers/certs.d" / self.address
        directory.mkdir(parents=True)
        (directory / "ca.crt").write_bytes(self.certificate.read_bytes())

    def log_in(self, home: Path, password: str = PASSWORD) -> None:
        """As `docker login` leaves it."""
        auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
        file = home / ".docker/config.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"auths": {self.address: {"auth": auth}}}))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _secured(directory: Path) -> str:
    """Configuration for TLS with a certificate of our own, and basic authentication."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", directory / "key.pem", "-out", directory / "ca.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    (directory / "htpasswd").write_text(f"{USER}:{_PASSWORD_BCRYPT}\n")
    return f"""
  tls: {{certificate: {directory}/ca.crt, key: {directory}/key.pem}}
auth:
  htpasswd: {{realm: banger, path: {directory}/htpasswd}}
"""


@contextmanager
def serving(directory: Path, *, secured: bool = False) -> Iterator[Registry]:
    """Debian's docker-registry, until the block ends; `directory` is made, and its."""
    directory.mkdir()
    address = f"127.0.0.1:{_free_port()}"
    more = _secured(directory) if secured else ""
    (directory / "config.yml").write_text(
        f"""version: 0.1
log: {{level: error}}
storage: {{filesystem: {{rootdirectory: {directory}/data}}}}
http:
  addr: {address}
{more}"""
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", directory / "config.yml"], stdout=log, stderr=log
        )
    try:
        host, _, port = address.partition(":")
        until(lambda: _answers(host, int(port)), f"a registry at {address}")
        yield Registry(address, directory / "ca.crt" if secured else None)
    finally:
        process.terminate()
        process.wait(20)


def _answers(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), 1):
        return True
    return False


class Mirror:
    """Passes on what a registry says, but for blobs larger than `from_bytes`, to which `harm`
    happens: ``cut`` (the connection ends half-way), ``stall`` (it goes silent), ``other`` (as many
    bytes, but others), ``wait`` (for another harm). `sent` has the blobs that were asked for."""

    def __init__(self, registry: Registry, *, from_bytes: int = 10_000) -> None:
        self.harm = ""
        self.sent: list[str] = []
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                accept = ", ".join(self.headers.get_all("Accept", []))
                with closing(http.client.HTTPConnection(registry.address)) as upstream:
                    upstream.request(self.command, self.path, headers={"Accept": accept})
                    answer = upstream.getresponse()
                    body = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.end_headers()
                if "/blobs/" in self.path:
                    mirror.sent.append(self.path.rpartition("/")[2])
                harm = mirror.harm if "/blobs/" in self.path and len(body) > from_bytes else ""
                if harm == "other":
                    body = body[:-1000] + bytes(1000)
                if harm in ("cut", "stall"):
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    while mirror.harm == "stall":
                        time.sleep(0.1)
                    self.close_connection = True
                    return
                while harm and mirror.harm == "wait":
                    time.sleep(0.1)
                self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815 - the registry sends no body for it either

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.harm = ""
        self._server.shutdown()
        self._server.server_close()
