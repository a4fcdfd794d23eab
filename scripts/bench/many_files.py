"""Time to open a dataset of many small files in a plan, and to list many texts in `prepare`.

Creates COUNT (default 100,000) files in a temporary folder, then times listing them and reading their headers:

    python scripts/bench/many_files.py [COUNT]
"""

import sys
import tempfile
import time
from pathlib import Path

from titan_cpt.config.load import load_config
from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.inventory import take_inventory
from titan_cpt.data.prepare.text_inputs import find_inputs

CONFIG = """
[job]
name = "many"
[model]
family = "gpt_neox"
size = "debug"
[datasets.many]
train = "{spec}"
{keys}
[training]
global_batch_size = 4
local_batch_size = 4
seq_len = 16
[[stages]]
name = "one"
dataset = "many"
steps = 1
lr = {{ schedule = "constant", max = 1e-3 }}
"""


def main(count: int) -> None:
    """Print one line for each kind of file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with IndexedWriter(folder / "pair", 300) as writer:
            writer.add_document(list(range(100)))
        contents = {suffix: (folder / f"pair{suffix}").read_bytes() for suffix in (".bin", ".idx")}
        for kind, suffixes in (("texts", (".txt",)), ("raw", (".npy",)), ("pairs", (".bin", ".idx"))):
            (folder / kind).mkdir()
            for number in range(count):
                for suffix in suffixes:
                    (folder / kind / f"{number}{suffix}").write_bytes(contents.get(suffix, contents[".bin"]))
            spec = f"{folder}/{kind}/*{'' if kind == 'pairs' else suffixes[0]}"
            config = folder / "many.toml"
            keys = 'format = "raw"\ndtype = "uint16"' if kind == "raw" else ""
            config.write_text(CONFIG.format(spec=spec, keys=keys))
            began = time.perf_counter()
            if kind == "texts":
                assert len(find_inputs([spec])) == count
            else:
                assert take_inventory(load_config(config)).tokens == {"many": 100 * count}
            print(f"{kind}: {count:,} files opened after {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
