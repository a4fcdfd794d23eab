"""Tokenizer files of an exported Hugging Face model, and a check that transformers reads the run's ids from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint.transformers_check import reason_of, without_transformers_output
from titan_cpt.data.tokenizer.check_texts import TOKENIZER_TEST_STRINGS
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
_CLASS = "PreTrainedTokenizerFast"  # reads all of tokenizer.json, in every version
_IGNORING = ("qwen2",)  # model types for which transformers 5 ignores parts of tokenizer.json and tokenizer_class


def write_tokenizer(tokenizer: Tokenizer, out: Path, positions: int) -> None:
    """Write tokenizer.json and the files that belong to it; the byte tokenizer is written as BPE without merges."""
    if tokenizer.name == BYTES:
        spec = byte_tokenizer_json(tokenizer.eod_id)
        (out / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    else:
        source = Path(tokenizer.name) / "tokenizer.json" if Path(tokenizer.name).is_dir() else Path(tokenizer.name)
        spec = json.loads(source.read_bytes())
        (out / "tokenizer.json").write_bytes(source.read_bytes())
        for name in _BESIDE:
            if (source.parent / name).is_file():
                shutil.copyfile(source.parent / name, out / name)
    settings: dict[str, Any] = {"tokenizer_class": _CLASS, "clean_up_tokenization_spaces": False}
    if (out / "tokenizer_config.json").exists():
        settings |= _read_object(out / "tokenizer_config.json")  # without tokenizer_class, the class of the model type
    else:
        vocabulary = model_vocab(spec["model"]) | {one["content"]: one["id"] for one in spec.get("added_tokens") or []}
        end = next(token for token, number in vocabulary.items() if number == tokenizer.eod_id)
        begin = next((token for token, number in vocabulary.items() if number == tokenizer.bos_id), end)
        settings |= {"model_max_length": positions, "eos_token": end, "bos_token": begin}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def tokenizer_warning(out: Path, tokenizer: Tokenizer, model_type: str) -> str | None:
    """A warning if transformers' AutoTokenizer does not give the run's ids; None if it does.

    If transformers is installed, ids are compared on difficult texts that contain no names of special tokens.

    Args:
        out: the exported folder, with config.json.
        tokenizer: the run's.
        model_type: from config.json.
    """
    remedy = f"read it with `{_CLASS}.from_pretrained`"
    with without_transformers_output():
        try:
            import transformers  # optional, and takes seconds to import
        except ImportError:
            if model_type in _IGNORING:
                return (
                    "AutoTokenizer of transformers 5 ignores tokenizer.json's normalizer and pre-tokenizer for "
                    f"model_type {model_type} and may give other ids: {remedy}"
                )
            return None
        name = f"transformers {transformers.__version__}"
        auto = _difference(transformers.AutoTokenizer, out, tokenizer)
        if auto is None:
            return None
        fast = _difference(transformers.PreTrainedTokenizerFast, out, tokenizer)
    if fast is None:
        return f"AutoTokenizer of {name} {auto} for model_type {model_type}: {remedy}, which gives the run's ids"
    return f"AutoTokenizer of {name} {auto}, and {_CLASS} {fast}: use neither; tokenizers.Tokenizer.from_file reads it"


def _difference(kind: Any, out: Path, tokenizer: Tokenizer) -> str | None:
    """How the ids of a tokenizer class of transformers differ from the run's; None if they are equal."""
    special = [one["content"] for one in json.loads((out / "tokenizer.json").read_bytes()).get("added_tokens") or []]
    try:
        loaded = kind.from_pretrained(out, local_files_only=True)
        for text in TOKENIZER_TEST_STRINGS:
            if any(name in text for name in special):
                continue  # in a run the name of a special token is text; transformers reads the token
            expected = tokenizer.encode(text)
            ids = loaded(text, add_special_tokens=False)["input_ids"]
            if ids != expected:
                first = next((n for n, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), 0)
                shown = f"{ids[first : first + 4]} where the run has {expected[first : first + 4]}"
                return f"gives other ids than the run ({shown} in {text[:40]!r})"
    except Exception as error:  # any exception of a class that does not support these files
        return f"cannot read it ({reason_of(error)})"
    return None
