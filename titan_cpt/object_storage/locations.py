"""Names of files that are on a local disk or in object storage: Path, or RemotePath for a URL such as s3://bucket/key.

Supported are s3://, gs://, memory:// (fsspec's dictionary in this process, for tests) and file://.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from titan_cpt.config.storage import PROTOCOLS
from titan_cpt.errors import DataError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


@dataclass(frozen=True)
class CacheSettings:
    """The local block cache of remote files.

    Attributes:
        folder: where blocks are stored.
        limit_bytes: size of the cache, about; older blocks are removed beyond it.
        block_bytes: size of a block.
    """

    folder: str
    limit_bytes: int
    block_bytes: int


@dataclass(frozen=True)
class RemotePath:
    """A file in object storage, or a prefix of such files.

    Attributes:
        url: such as s3://bucket/data/train.bin.
        cache: where blocks of it are cached.
    """

    url: str
    cache: CacheSettings

    def __str__(self) -> str:
        """The URL."""
        return self.url

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return self.url.rpartition("/")[2]


Location = Path | RemotePath


def is_url(name: str) -> bool:
    """Whether a name is a URL, of any protocol."""
    return _URL.match(name) is not None


def protocol_of(url: str) -> str:
    """The protocol of a URL.

    Raises:
        DataError: it is not supported.
    """
    match = _URL.fullmatch(url)
    protocol = match[1] if match else ""
    if protocol not in PROTOCOLS:
        allowed = ", ".join(f"{one}://" for one in PROTOCOLS)
        raise DataError(f"{url}: {protocol}:// is not supported; allowed are {allowed} and local paths")
    return protocol


def located(name: str, cache: CacheSettings | None) -> Location:
    """The location that a name denotes: a RemotePath for a URL."""
    if not is_url(name):
        return Path(name)
    protocol_of(name)
    assert cache is not None, "every reader of remote files has cache settings"
    return RemotePath(name, cache)


def with_ending(location: Location, ending: str) -> Location:
    """The location whose name is that of `location` followed by `ending`."""
    if isinstance(location, RemotePath):
        return RemotePath(f"{location.url}{ending}", location.cache)
    return Path(f"{location}{ending}")
