"""Comparing and hashing recipes."""

from titan_cpt.common.recipe import differences, fingerprint


def test_differences_name_the_key_the_old_and_the_new_value():
    """Sorted by key; "not set" for a missing key; 1 and 1.0 differ, another order of keys does not."""
    old = {"b": 1, "a": {"x": 1, "y": 2}, "gone": True, "same": [1]}
    new = {"b": 1.0, "a": {"y": 2, "x": 1}, "new": "text", "same": [1]}

    assert differences(old, new) == ["b: 1 -> 1.0", "gone: true -> not set", "new: not set -> text"]


def test_a_fingerprint_is_the_beginning_of_a_sha_256_over_sorted_json():
    """`printf '{"a": 1, "b": [2]}' | sha256sum`: fingerprints in checkpoints depend on it."""
    assert fingerprint({"b": [2], "a": 1}) == fingerprint({"a": 1, "b": [2]}) == "ae8a9a50"
