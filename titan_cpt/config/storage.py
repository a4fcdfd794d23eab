"""The tables [storage] and [checkpoint.upload]: the cache of remote data, and uploads of checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, field_validator, model_validator

from titan_cpt.common.numbers import parse_bytes
from titan_cpt.config.types import PositiveInt, Table, validation_error
from titan_cpt.errors import ConfigError

PROTOCOLS = ("s3", "gs", "memory", "file")
"""Protocols of URLs that data and uploads may have; memory:// is fsspec's dictionary in this process, for tests."""


def _size(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = parse_bytes(value, option="size")
        except ConfigError as error:
            raise validation_error(str(error).removeprefix("size: ")) from None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise validation_error(f'must be a size in bytes such as "50GB", got {value!r}')
    return value


Bytes = Annotated[int, PlainValidator(_size)]


class StorageConfig(Table):
    """[storage]: the local cache of token files that are read from object storage (s3://, gs://)."""

    cache_dir: str | None = None
    """Folder of the cache, on a local disk; all runs of a machine may share it. Unset: titan_cpt in $XDG_CACHE_HOME, or
    ~/.cache/titan_cpt."""
    cache_size: Bytes = 50 * 10**9
    """Size of the cache in bytes, such as "50GB"; the least recently used blocks are removed. If the training data does
    not fit, most sequences of a shuffled epoch cost the transfer of a block."""
    block_size: Bytes = 2 << 20
    """Bytes per block, such as "2MiB": what is transferred at a time. Smaller blocks suit data that does not fit the
    cache."""

    @model_validator(mode="after")
    def _cache_holds_blocks(self) -> StorageConfig:
        if self.block_size < 4096:
            raise validation_error(f"block_size must be 4KiB or more, got {self.block_size}")
        if self.cache_size < 16 * self.block_size:
            raise validation_error(
                f"cache_size must be at least 16 blocks, {16 * self.block_size} bytes, got {self.cache_size}"
            )
        return self

    @property
    def resolved_cache_dir(self) -> str:
        """The folder of the cache, also where `cache_dir` is not set."""
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titan_cpt"
        return self.cache_dir or str(default)


class UploadConfig(Table):
    """[checkpoint.upload]: upload of finished checkpoints to object storage, in the background."""

    to: str
    """URL under which the run's folder is copied, such as "s3://bucket/runs"; the run is then in s3://bucket/runs/NAME.
    A run with an empty local folder continues from its newest valid checkpoint there."""
    what: Annotated[tuple[Literal["stage_end", "pre_anneal", "interval"], ...], Field(strict=False, min_length=1)] = (
        "stage_end",
        "pre_anneal",
        "interval",
    )
    """Kinds of checkpoints to upload; those that a later stage starts from are uploaded in any case. metrics.jsonl,
    config.toml, plan.json and summary.json are uploaded with each."""
    keep_local: PositiveInt | None = None
    """Number of newest checkpoints to keep on the local disk. Older ones are removed there once their upload has been
    verified, except those that a stage still starts from. Unset: none is removed for having been uploaded."""

    @field_validator("to")
    @classmethod
    def _is_url(cls, value: str) -> str:
        protocol, separator, rest = value.partition("://")
        if not separator or not rest.strip("/"):
            raise validation_error(f'must be a URL such as "s3://bucket/runs", got {value!r}')
        if protocol not in PROTOCOLS:
            allowed = ", ".join(f"{one}://" for one in PROTOCOLS)
            raise validation_error(f"{protocol}:// is not supported; allowed are {allowed}; got {value!r}")
        return value.rstrip("/")
