"""Texts on which a backend is compared with the `tokenizers` library when a tokenizer is opened."""

import unicodedata
from collections.abc import Iterator

TOKENIZER_TEST_STRINGS = (
    *("", " ", "  ", "   ", "a", " a", "  a", "a ", "a  ", "a\nb", "a\n\nb", "a \n b", "a\n  b", "\n\n\n", "\t\tx\t "),
    *(
        "\r\n",
        "a\r\n\r\n  b",
        " \n  \n   x",
        "".join(map(chr, range(0x20))) + "\x7f\x80\x9f",
        "=" * 40 + "-" * 41 + "\n" * 7,
        "a" * 17 + "ab" * 9,
    ),
    *(f"x{' ' * k}y\n{' ' * k}z{' ' * k}" for k in (*range(4, 27), 48, 49, 50)),
    *("it's we'll I'M YOU'RE they'Ve 'tis ''", "don\u2019t", "\u017fs '\u017f K\u212a"),
    *(
        "1 12 123 1234 1234567 3.14 1,000 \u0664\u0665 \u2167 \u00bd",
        "snake_case camelCase x=[1,2];// \u20ac5 -- ... !",
    ),
    *("a.b@c.de https://x.y/z?a=1&b=%20", "Stra\u00dfe \u00e4\u00f6\u00fc \u00c4\u00d6\u00dc na\u00efve"),
    *("a\u0308o\u0323\u0302 e\u0301 \u0301x \u1e69 s\u0323\u0307 s\u0307\u0323 \u212b\u2126", "\u1112\u1161\u11ab"),
    *(
        "\u4e2d\u6587\uff0c\u5b57\u7b26\u3002 \u65e5\u672c\u8a9e\u3067\u3059 \ud55c\uad6d",
        "\u0645\u0631\u062d\u0628\u0627",
    ),
    *("\u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947", "\U00010348\U0001d4d0\U0010ffff"),
    *("\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",),
    *(
        "\u00a0\u00a0x\u2003\u3000y\u200b\ufeffz\u0085\u2028\u2029",
        "a <|endoftext|>b</s><s>",
        "<|padding|>  <|endoftext|>",
    ),
    *("\u0301", "\n\u0301\u0301a", "x" * 300 + " " + "Word" * 90 + "0" * 300, " " * 3000 + "\n" * 3000 + "x\r\n" * 40),
)
_EVERY = 32  # characters; almost no script has fewer


def texts_in_every_script() -> Iterator[str]:
    """Yield texts with a character of each script between letters, digits, spaces and signs."""
    for block in range(0, 0x20000, 0x1000):
        characters = map(chr, range(block + 1, block + 0x1001, _EVERY))
        known = [one for one in characters if unicodedata.category(one) not in ("Cn", "Cs")]
        yield " ".join(f"a{one}b 1{one} !{one}\n{one}" for one in known)
