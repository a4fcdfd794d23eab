#!/usr/bin/env bash
# gigatoken 0.10.0 beside tokenizers 0.23.3, byte-level BPE with GPT-2's pattern: other ids for letters of Unicode 17.
#
# The pattern splits a text into runs of letters and runs of other characters. gigatoken's table of letters is newer: it
# takes a letter that Unicode 17 added for a letter, tokenizers takes it for another character. A word with such a letter
# inside is one piece for gigatoken and three for tokenizers, so that a merge over the border applies in one of them
# only. No error, no warning; the ids of both decode to the same text. Letters of older versions have equal ids.
#
# Output seen:
#   U+0C5C of Unicode 17: gigatoken 4 ids, tokenizers 7 ids
#   U+0C5D of Unicode 14: gigatoken 4 ids, tokenizers 4 ids
#
# Installs into a temporary folder and writes its own input there. Exit status 0 if the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gigatoken==0.10.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import gigatoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def in_bytes(text):
    """The characters by which a byte-level tokenizer names the bytes of a text."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)[0][0]


LETTERS = {"U+0C5C of Unicode 17": "\u0c5c", "U+0C5D of Unicode 14": "\u0c5d"}
first, second, third = in_bytes("\u0c5d")
last = in_bytes("\u0c5c")[2]
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
merges = [("b", first), ("b" + first, second)] + [(third, "a"), (last, "a")]
entries = [*alphabet, *("".join(pair) for pair in merges)]
tokenizer = Tokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, merges))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.save("tokenizer.json")
other = gigatoken.Tokenizer("tokenizer.json")

found = {}
for name, letter in LETTERS.items():
    text = f"ab{letter}ab"
    ids = [list(map(int, other.encode(text))), tokenizer.encode(text).ids]
    assert all(tokenizer.decode(numbers) == text for numbers in ids)
    print(f"{name}: gigatoken {len(ids[0])} ids, tokenizers {len(ids[1])} ids")
    found[name] = ids
new, old = found.values()
assert [len(ids) for ids in new] == [4, 7] and old[0] == old[1] and len(old[0]) == 4
PYTHON
