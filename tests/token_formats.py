"""The same tokens written in every format that training reads."""

import numpy as np

from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.formats.token_files import TokenFiles

VOCAB, SEQ_LEN, SEQUENCES = 257, 16, 40
TOKENS = np.random.default_rng(7).integers(0, VOCAB, size=SEQUENCES * (SEQ_LEN + 1))
DTYPES = ("uint16", "uint32", "int32", "int64")
SHARDS = ("0-of-3", "1-of-3", "2-of-3")


def write_pair(prefix, sizes=(17,) * SEQUENCES, tokens=TOKENS):
    with IndexedWriter(prefix, VOCAB) as writer:
        writer.add_documents(np.asarray(tokens), np.array(sizes))
    return prefix


def write_raw(path, dtype="uint16", tokens=TOKENS):
    """Write one array without a header, as nanoGPT and OLMo do."""
    np.asarray(tokens).astype(np.dtype(dtype).newbyteorder("<")).tofile(path)
    return path


def write_ds(path, dtype="uint16", tokens=TOKENS, ends=(100, 100, 250, 680)):
    """Write ids, and the end of each document in tokens as u64, as datatrove does."""
    write_raw(path, dtype, tokens)
    np.array(ends, dtype="<u8").tofile(f"{path}.index")
    return path


def write_all(folder):
    """Write the same tokens in every format; returns {name: TokenFiles}."""
    write_pair(folder / "pair", sizes=(7, 0, 300, SEQUENCES * 17 - 307))
    write_pair(folder / "even")
    for dtype in DTYPES:
        write_raw(folder / f"raw-{dtype}", dtype)
    np.save(folder / "headed.npy", TOKENS.astype("<u2"))
    write_ds(folder / "two.ds")
    write_ds(folder / "four.ds", "uint32")
    for name, part in zip(SHARDS, np.split(TOKENS, (5, 333)), strict=True):  # none of the cuts between two sequences
        write_raw(folder / f"shard-{name}.bin", tokens=part)
    return {
        "pair": TokenFiles((str(folder / "pair"),)),
        **{f"raw-{dtype}": TokenFiles((str(folder / f"raw-{dtype}"),), "raw", dtype) for dtype in DTYPES},
        "headed": TokenFiles((str(folder / "headed.npy"),), "raw", "uint16"),
        "shards": TokenFiles((str(folder / "shard-*.bin"),), "raw", "uint16"),
        "ds": TokenFiles((str(folder / "two.ds"),), "ds"),
        "ds-wide": TokenFiles((str(folder / "four.ds"),), "ds"),
        "even": TokenFiles((str(folder / "even"),), "presequenced", None, True),
        "even-shards": TokenFiles((str(folder / "shard-*.bin"),), "presequenced", "uint16", True),
    }


STREAMS = ("raw-uint16", "raw-uint32", "raw-int32", "raw-int64", "headed", "shards", "ds", "ds-wide")
CUT = ("even", "even-shards")
