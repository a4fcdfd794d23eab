"""Which names are URLs, and what is made of them."""

from pathlib import Path

import pytest

from titan_cpt.errors import DataError
from titan_cpt.object_storage.locations import CacheSettings, RemotePath, is_url, located, with_ending

CACHE = CacheSettings("cache", 1 << 20, 1 << 12)


@pytest.mark.parametrize(("name", "url"), [("s3://b/k", True), ("a/b", False), ("C:x", False), ("/s3:/b", False)])
def test_a_url_has_a_protocol_and_two_slashes(name, url):
    assert is_url(name) is url


def test_a_local_name_is_a_path_and_a_url_keeps_its_slashes():
    assert located("a/b", None) == Path("a/b")
    assert str(located("s3://b//k", CACHE)) == "s3://b//k"


def test_an_ending_is_appended_to_names_with_dots():
    assert with_ending(Path("a/x.v1"), ".bin") == Path("a/x.v1.bin")
    assert with_ending(RemotePath("s3://b/x.v1", CACHE), ".bin").name == "x.v1.bin"


def test_another_protocol_is_refused_with_those_that_are_allowed():
    with pytest.raises(DataError, match=r"ftp://h/x: ftp:// is not supported; allowed are s3://, gs://"):
        located("ftp://h/x", CACHE)
