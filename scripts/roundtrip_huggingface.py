"""Hugging Face -> titan_cpt -> Hugging Face with tiny models: import, train one German stage, export, generate.

`python scripts/roundtrip_huggingface.py [FOLDER]` needs transformers and half a minute on a CPU, no network or data. A
random GPT-NeoX, saved by transformers, is imported with `titan-cpt import` and `init = "checkpoint:..."`, a random
Llama with `init = "hf:..."`. transformers loads the exports. Exit status 0 if the loss in transformers equals the one
that the run measured, the loss has fallen, and the model generates text.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from titan_cpt.cli import main as titan_cpt
from titan_cpt.common.numbers import evenly_spaced
from titan_cpt.data.formats.indexed import TokenStream

WORDS = ("der", "die", "das", "Hund", "Katze", "Straße", "über", "läuft", "größer", "und", "oder", "nicht", "heute")
ROWS = 300  # more than the byte tokenizer's 257 ids, since published vocabularies are padded

CONFIG = """
[job]
name = "{name}"
output_dir = "{folder}/outputs"
[model]
family = "{family}"
size = "debug"
vocab_size = {rows}
[datasets.german]
train = "{folder}/german"
validation = "{folder}/german-validation"
[training]
global_batch_size = 8
local_batch_size = 8
seq_len = 64
mixed_precision_param = "float32"
[metrics]
enable_tensorboard = false
[validation]
sequences = 8
[[stages]]
name = "german"
dataset = "german"
steps = 30
init = "{init}"
lr = {{ schedule = "cosine", max = 3e-3, warmup_until = 0.1 }}
"""


def main(folder: Path) -> None:
    """The round trip of both model families."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"{folder}: is not empty, and files in it would be replaced; give a new folder")
    write_german(folder / "german.jsonl")
    command(
        "prepare", "--input", folder / "german.jsonl", "--output", folder / "german", "--holdout", 0.1, "--workers", 1
    )
    neox = GPTNeoXConfig(
        vocab_size=ROWS, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
    )
    llama = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=192,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    GPTNeoXForCausalLM(neox).save_pretrained(folder / "gpt_neox-released")
    LlamaForCausalLM(llama).save_pretrained(folder / "llama-released")
    command("import", folder / "gpt_neox-released", folder / "gpt_neox-imported")
    there_and_back(folder, "gpt_neox", f"checkpoint:{folder}/gpt_neox-imported")
    there_and_back(folder, "llama", f"hf:{folder}/llama-released")


def write_german(path: Path) -> None:
    """Write documents of made-up sentences, one per line, the same ones every time."""
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=12)).capitalize() + "." for _ in range(600)]
    path.write_text("\n".join(json.dumps({"text": sentence}) for sentence in sentences))


def there_and_back(folder: Path, family: str, init: str) -> None:
    """Train one stage from the imported weights, export it, and check the export with transformers."""
    config = folder / f"{family}.toml"
    config.write_text(CONFIG.format(name=family, folder=folder, family=family, rows=ROWS, init=init))
    command("train", "--config", config)
    run, out = folder / "outputs" / family, folder / f"{family}-exported"
    command("export", run / "german" / "step-00000030", out, "--dtype", "float32", "--max-shard-size", "100KB")
    (stage,) = json.loads((run / "summary.json").read_text())["stages"]
    before, after = stage["before"]["german"], stage["after"]["german"]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    loss = loss_in_transformers(model, folder)
    text = tokenizer.decode(model.generate(**tokenizer("Der Hund", return_tensors="pt"), max_new_tokens=24)[0])
    print(f"{family}: loss {before:.4f} -> {after:.4f}, in transformers {loss:.4f}; it generates {text!r}")
    if not (abs(loss - after) < 1e-4 and after < before - 1 and text.startswith("Der Hund") and len(text) > 8):
        raise SystemExit(f"{family}: the round trip failed")


def loss_in_transformers(model: torch.nn.Module, folder: Path) -> float:
    """Mean validation loss in nats per token, computed by transformers on the windows that the run uses."""
    stream = TokenStream([folder / "german-validation"], 257)
    starts = [window * 64 for window in evenly_spaced((stream.tokens - 1) // 64, 8)]
    windows_BL = torch.stack([torch.from_numpy(stream.read(start, 64 + 1)) for start in starts])
    with torch.no_grad():
        logits_BLV = model(windows_BL[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), windows_BL[:, 1:].flatten()).item()


def command(*words: object) -> None:
    """Run `titan-cpt WORDS` in this process; it must succeed."""
    print("$ titan-cpt", *words, flush=True)
    try:
        titan_cpt([str(word) for word in words])
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
