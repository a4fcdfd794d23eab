"""Object storage through fsspec: look up objects, read byte ranges, list, write and remove; errors with a remedy.

Credentials, endpoints and regions come from the environment, as for every other client: AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, or fsspec's own configuration. They are never in a TOML.

Transient errors (no answer, 500, 503) are tried again by the client library with growing pauses, a bounded number of
times. A file system object belongs to a process: fsspec makes a new one after a fork, so none is kept here.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from titan_cpt.errors import RemoteError, how_to_install
from titan_cpt.object_storage.locations import protocol_of

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the role of the machine; AWS_ENDPOINT_URL for "
    "another server than Amazon's",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "use_listings_cache": False,  # a listing of minutes ago must not hide a new or changed object
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 20,
            "retries": {"mode": "standard", "max_attempts": 8},  # botocore's, with pauses of up to 20 s
        },
    },
    "gs": {"use_listings_cache": False},
    "file": {"auto_mkdir": True},
}
_VERSION_KEYS = ("ETag", "etag", "generation", "mtime", "LastModified", "created")  # the first one that is known
_TRIES = 2  # s3fs repeats botocore's tries; it does so twice in a read, so its own default of 5 means 200 tries
_SLOW_SECONDS = 20.0  # a request that has taken this long is reported,
_REPORT_EVERY_SECONDS = 60.0  # but by one process not more often than this
PART_BYTES = 32 << 20  # of a multipart upload
_DOWNLOAD_BYTES = 8 * PART_BYTES  # read concurrently and held in memory


class ObjectInfo(NamedTuple):
    """What is known of an object without reading it.

    Attributes:
        size: length in bytes.
        version: a string that changes when the content is replaced.
        md5: MD5 of the content in hexadecimal digits, as the storage reports it; after an upload in N parts the MD5 of
            the parts' MD5s, "-" and N. With some encryptions S3 reports other digits. "" if it is not known.
    """

    size: int
    version: str
    md5: str = ""


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, of this process, and the path of the URL within it.

    Raises:
        RemoteError: the package of the protocol is not installed, or the URL is malformed.
    """
    import fsspec  # its import takes time that a local run does not need

    protocol = protocol_of(url)
    options = {**_OPTIONS.get(protocol, {}), **fsspec.config.conf.get(protocol, {})}
    try:
        system = fsspec.filesystem(protocol, **options)
        if protocol == "s3":
            system.retries = _TRIES
        return system, str(system._strip_protocol(url))
    except ImportError:
        package = _PACKAGES.get(protocol, "fsspec")
        raise RemoteError(f"{url}: {protocol}:// needs the package {package}; {how_to_install(package)}") from None
    except ValueError as error:
        raise RemoteError(f"{url}: is not a valid address: {error}") from None


_last_report = -_REPORT_EVERY_SECONDS


@contextmanager
def _reported_if_slow(url: str) -> Iterator[None]:
    """Print a line if the block takes long: while the client repeats a request, training stands still."""
    began = time.monotonic()

    def report() -> None:
        global _last_report
        now = time.monotonic()
        if now - _last_report < _REPORT_EVERY_SECONDS:
            return
        _last_report = now
        print(
            f"rank {os.environ.get('RANK', '0')}: waiting for {url} for {now - began:.0f} s; the client repeats "
            "requests without an answer for about ten minutes. Then the run stops; its checkpoints stay intact",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(_SLOW_SECONDS, report)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Translate every error of a client library in the block into RemoteError with a remedy.

    FileNotFoundError passes through: the caller knows whether a missing object is an error.
    """
    try:
        yield
    except (RemoteError, FileNotFoundError, KeyboardInterrupt):
        raise
    except Exception as error:  # any: each library has a hierarchy of its own
        raise RemoteError(_explain(url, error)) from error


def _explain(url: str, error: BaseException) -> str:
    """What went wrong and what to do, from the error of a client library."""
    protocol = protocol_of(url)
    kind = type(error).__name__
    reason = " ".join(str(error).split()) or kind
    if isinstance(error, PermissionError) or "Credential" in kind or "Token" in kind:
        sources = _CREDENTIALS.get(protocol, "the permissions of the file system")
        return (
            f"{url}: access is refused ({reason}): the credentials are missing or wrong, or may not do this here. They "
            f"come from the environment: {sources}"
        )
    reason = f"{kind}: {reason.rstrip('.')}"
    busy = isinstance(error, OSError) and error.errno == errno.EBUSY  # s3fs's translation of 503
    if busy or isinstance(error, TimeoutError | ConnectionError) or "Timeout" in kind or "Connect" in kind:
        return (
            f"{url}: the server does not answer or is busy ({reason}), also after several tries. Check the network "
            "and the endpoint, then run the same command again"
        )
    return f"{url}: {reason}. If this is transient, run the same command again"


def find(url: str) -> ObjectInfo | None:
    """Length and version of an object; None if it does not exist.

    Raises:
        RemoteError: no access, no answer, or the bucket does not exist.
    """
    system, path = open_filesystem(url)
    with remote_errors(url), _reported_if_slow(url):
        try:
            info = system.info(path)
        except FileNotFoundError:
            _require_bucket(system, url, path)
            return None
    if info.get("type") != "file":
        return None
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
    return ObjectInfo(int(info["size"]), version, _md5_of(info))


def _md5_of(info: Mapping[str, Any]) -> str:
    if isinstance(info.get("md5Hash"), str):  # Google's
        return base64.b64decode(info["md5Hash"]).hex()
    tag = str(info.get("ETag", "")).strip('"')
    return tag if re.fullmatch(r"[0-9a-f]{32}(-\d+)?", tag) else ""


def stat(url: str) -> ObjectInfo:
    """`find` for an object that must exist.

    Raises:
        RemoteError: see `find`; or it does not exist.
    """
    info = find(url)
    if info is None:
        raise RemoteError(f"{url}: no such object. Check the name, and that it was uploaded completely")
    return info


def _require_bucket(system: Any, url: str, path: str) -> None:
    """Raise RemoteError if the bucket of a missing object does not exist."""
    protocol = protocol_of(url)
    bucket = path.partition("/")[0]
    if protocol not in _PACKAGES or not bucket:
        return
    try:
        system.info(bucket)
    except FileNotFoundError:
        raise RemoteError(
            f"{url}: there is no bucket {bucket!r}. Check its name and the endpoint, or create it"
        ) from None
    except PermissionError:
        return  # an account may read objects and not the bucket


def read_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes [start, stop) of each range of an object, read concurrently.

    Raises:
        RemoteError: the object is missing or shorter, no access, no answer.
    """
    if not ranges:
        return []
    system, path = open_filesystem(url)
    starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
    with remote_errors(url), _reported_if_slow(url):
        try:
            found = system.cat_ranges([path] * len(ranges), starts, stops, on_error="raise")
        except FileNotFoundError:
            raise RemoteError(f"{url}: the object does not exist any more") from None
    for (start, stop), data in zip(ranges, found, strict=True):
        if len(data) != stop - start:
            raise RemoteError(f"{url}: bytes {start} to {stop} were requested, and {len(data)} of them came")
    return [bytes(data) for data in found]


def read_object(url: str) -> bytes | None:
    """The whole content of a small object; None if it does not exist.

    Raises:
        RemoteError: no access, no answer, or the bucket does not exist.
    """
    system, path = open_filesystem(url)
    with remote_errors(url):
        try:
            return bytes(system.cat_file(path))
        except FileNotFoundError:
            _require_bucket(system, url, path)
            return None


def write_object(url: str, content: bytes) -> None:
    """Write a small object in one request, which replaces an older one as a whole."""
    system, path = open_filesystem(url)
    with remote_errors(url):
        try:
            system.pipe_file(path, content)
        except FileNotFoundError as error:
            _require_bucket(system, url, path)
            raise RemoteError(f"{url}: cannot be written: {error}") from None


def upload_file(path: Path, url: str, on_progress: Callable[[int], None] = lambda count_bytes: None) -> None:
    """Write a local file to an object, in parts of PART_BYTES if it has two of them or more.

    Args:
        on_progress: called with the number of bytes that were transferred since the last call.

    Raises:
        FileNotFoundError: the local file does not exist any more.
        RemoteError: see `find`.
    """
    system, target = open_filesystem(url)
    options: dict[str, Any] = {"chunksize": PART_BYTES} if protocol_of(url) == "s3" else {}
    path.stat()
    with remote_errors(url):
        try:
            system.put_file(str(path), target, callback=_Progress(on_progress), **options)
        except FileNotFoundError:
            path.stat()
            _require_bucket(system, url, target)
            raise RemoteError(f"{url}: cannot be written") from None


def download_file(url: str, path: Path) -> None:
    """Write an object to a local file.

    Raises:
        OSError: the file cannot be written, such as on a full disk.
        RemoteError: see `find`; or the object is missing.
    """
    info = stat(url)
    with open(path, "wb") as file:
        for first in range(0, info.size, _DOWNLOAD_BYTES):
            spans = [(at, min(at + PART_BYTES, info.size)) for at in range(first, info.size, PART_BYTES)]
            for data in read_ranges(url, spans[: _DOWNLOAD_BYTES // PART_BYTES]):
                file.write(data)
        file.flush()
        os.fsync(file.fileno())


def content_pieces(url: str, size: int) -> Iterator[bytes]:
    """Yield the content of an object of that size, in order."""
    for first in range(0, size, PART_BYTES):
        yield read_ranges(url, [(first, min(first + PART_BYTES, size))])[0]


def remove_object(url: str) -> None:
    """Remove an object, if it exists."""
    system, path = open_filesystem(url)
    with remote_errors(url):
        try:
            system.rm_file(path)
        except FileNotFoundError:
            return


def list_objects(url: str) -> dict[str, int]:
    """{name relative to the folder: length} of all objects below a folder; {} if there are none.

    Raises:
        RemoteError: no access, no answer, or the bucket does not exist.
    """
    system, path = open_filesystem(url)
    base = path.rstrip("/") + "/"
    with remote_errors(url), _reported_if_slow(url):
        try:
            found = system.find(base, detail=True)
        except FileNotFoundError:
            found = {}
        if not found:
            _require_bucket(system, url, path)
    return {
        name.removeprefix(base): int(info["size"])
        for name, info in found.items()
        if info.get("type") == "file" and name.startswith(base)
    }


def matching_urls(pattern: str) -> list[str]:
    """The URLs of the objects that a glob matches, sorted."""
    system, path = open_filesystem(pattern)
    protocol = protocol_of(pattern)
    with remote_errors(pattern):
        try:
            names = system.glob(path)
        except FileNotFoundError:
            names = []
        if not names:
            _require_bucket(system, pattern, path)
    return sorted(f"{protocol}://{name.removeprefix('/') if protocol == 'memory' else name}" for name in names)


class _Progress:
    """The part of fsspec's callbacks that put_file uses."""

    def __init__(self, on_progress: Callable[[int], None]) -> None:
        self._on_progress = on_progress

    def relative_update(self, count_bytes: int = 1) -> None:
        self._on_progress(count_bytes)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None
