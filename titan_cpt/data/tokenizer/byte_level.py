"""The byte-level alphabet of GPT-2: printable characters that represent bytes in a vocabulary."""

import codecs

NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable characters for bytes: visible Latin-1 for itself, characters from U+0100 on for the others."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


_TO_BYTES = codecs.charmap_build("".join(sorted(BYTE_OF, key=BYTE_OF.__getitem__)))


def token_bytes(token: str) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary.

    Raises:
        KeyError: a character is not one of the 256 that represent bytes.
    """
    try:
        return codecs.charmap_encode(token, "strict", _TO_BYTES)[0]  # several times as fast as a look-up per character
    except UnicodeEncodeError as fault:
        raise KeyError(token[fault.start]) from None
