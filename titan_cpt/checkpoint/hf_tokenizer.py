"""The tokenizer's files of an export, and whether transformers reads the run's ids from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint.transformers_check import quiet, reason_of
from titan_cpt.data.tokenizer.backends import TOKENIZER_TEST_STRINGS
from titan_cpt.data.tokenizer.ids_fingerprint import byte_tokenizer_json
from titan_cpt.data.tokenizer.special_tokens import model_vocab
from titan_cpt.data.tokenizer.tokenizer import BYTES, Tokenizer

_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_CLASS = "PreTrainedTokenizerFast"  # reads a tokenizer.json as it stands, in every version
_IGNORING = ("qwen2",)  # model types whose tokenizer.json transformers 5 reads in part, whatever tokenizer_class says


def write_tokenizer(words: Tokenizer, out: Path, positions: int) -> None:
    """tokenizer.json and what is beside it; the byte tokenizer as the BPE without merges that it is."""
    if words.name == BYTES:
        spec = byte_tokenizer_json(words.eod_id)
        (out / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    else:
        source = Path(words.name) / "tokenizer.json" if Path(words.name).is_dir() else Path(words.name)
        spec = json.loads(source.read_bytes())
        (out / "tokenizer.json").write_bytes(source.read_bytes())
        for name in _BESIDE:
            if (source.parent / name).is_file():
                shutil.copyfile(source.parent / name, out / name)
    settings: dict[str, Any] = {"tokenizer_class": _CLASS, "clean_up_tokenization_spaces": False}
    if (out / "tokenizer_config.json").exists():
        settings |= _read_object(out / "tokenizer_config.json")  # one without a class would be read as the model type's
    else:
        vocabulary = model_vocab(spec["model"]) | {one["content"]: one["id"] for one in spec.get("added_tokens") or []}
        end = next(token for token, number in vocabulary.items() if number == words.eod_id)
        begin = next((token for token, number in vocabulary.items() if number == words.bos_id), end)
        settings |= {"model_max_length": positions, "eos_token": end, "bos_token": begin}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def warning_for_readers(out: Path, words: Tokenizer, model_type: str) -> str | None:
    """What a user of the export must know of its tokenizer; None where transformers' AutoTokenizer gives the run's ids.

    The ids are compared where transformers is installed, on awkward texts without the names of special tokens.

    Args:
        out: the export's folder, config.json included.
        words: the run's tokenizer.
        model_type: of config.json.
    """
    remedy = f"read it with `{_CLASS}.from_pretrained`"
    with quiet():
        try:
            import transformers  # optional, and seconds to import
        except ImportError:
            if model_type in _IGNORING:
                return (
                    "AutoTokenizer of transformers 5 ignores tokenizer.json's normalizer and pre-tokenizer for "
                    f"model_type {model_type} and may give other ids: {remedy}"
                )
            return None
        name = f"transformers {transformers.__version__}"
        auto = _difference(transformers.AutoTokenizer, out, words)
        if auto is None:
            return None
        fast = _difference(transformers.PreTrainedTokenizerFast, out, words)
    if fast is None:
        return f"AutoTokenizer of {name} {auto} for model_type {model_type}: {remedy}, which gives the run's ids"
    return f"AutoTokenizer of {name} {auto}, and {_CLASS} {fast}: use neither; tokenizers.Tokenizer.from_file reads it"


def _difference(kind: Any, out: Path, words: Tokenizer) -> str | None:
    """How a class of transformers reads the folder otherwise than the run did."""
    special = [one["content"] for one in json.loads((out / "tokenizer.json").read_bytes()).get("added_tokens") or []]
    try:
        theirs = kind.from_pretrained(out, local_files_only=True)
        for text in TOKENIZER_TEST_STRINGS:
            if any(name in text for name in special):
                continue  # a name of a special token is text in a run, and the token in transformers
            expected = words.encode(text)
            found = theirs(text, add_special_tokens=False)["input_ids"]
            if found != expected:
                first = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), 0)
                shown = f"{found[first : first + 4]} where the run has {expected[first : first + 4]}"
                return f"gives other ids than the run ({shown} in {text[:40]!r})"
    except Exception as error:  # whatever a class that does not fit the files ends in
        return f"cannot read it ({reason_of(error)})"
    return None
