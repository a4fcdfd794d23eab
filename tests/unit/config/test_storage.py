"""[storage]: sizes with units, and a cache that can hold blocks."""

import pytest
from pydantic import ValidationError

from titan_cpt.config.storage import StorageConfig


def test_sizes_have_units():
    assert StorageConfig(cache_size="2GB", block_size="1MiB").cache_size == 2 * 10**9
    assert StorageConfig(cache_size="2GiB").cache_size == 2**31


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cache_size": "big"}, 'must be a size in bytes such as "5GB" or "80GiB", got \'big\''),
        ({"cache_size": 0}, 'must be a size in bytes such as "50GB", got 0'),
        ({"cache_size": True}, "got True"),
        ({"block_size": "1KiB"}, "block_size must be 4KiB or more, got 1024"),
        ({"cache_size": "1MB"}, "cache_size must be at least 16 blocks, 33554432 bytes, got 1000000"),
    ],
)
def test_an_impossible_size_is_refused_with_what_is_allowed(keys, message):
    with pytest.raises(ValidationError) as raised:
        StorageConfig(**keys)
    assert message in str(raised.value)


def test_the_default_folder_is_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/cache")
    assert StorageConfig().resolved_cache_dir == "/scratch/cache/titan_cpt"
    assert StorageConfig(cache_dir="/elsewhere").resolved_cache_dir == "/elsewhere"
