"""Exports: transformers reads the run's ids or there is a warning; the model card; file modes."""

import json
import os
import shutil
import sys
from contextlib import contextmanager

import pytest
import tokenizers
from safetensors.torch import save_file
from training import THEIR_WARNINGS_IGNORED, changed, train, write_config, write_languages
from training import two_stages as two_stages_of
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from titan_cpt.checkpoint.hf_export import export
from titan_cpt.checkpoint.hf_import import import_released
from titan_cpt.checkpoint.hf_tokenizer import tokenizer_warning, write_tokenizer
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer
from titan_cpt.data.tokenizer.train_bpe import train_bpe
from titan_cpt.models.build import build_model
from titan_cpt.models.huggingface_config import config_from_spec
from titan_cpt.models.huggingface_weights import to_huggingface
from titan_cpt.models.registry import named_size

pytestmark = THEIR_WARNINGS_IGNORED
TEXT = "In 1066 the people's army didn't   march 23,456 miles: ﬁne weather, naïve Füße.\n\n\tEnd"
OPTIONS = {
    "gpt_neox": ("gpt_neox", {}),
    "llama": ("llama", {}),
    "mistral": ("llama", {"sliding_window": 7}),
    "qwen2": ("llama", {"qkv_bias": True}),
    "qwen3": ("llama", {"qk_norm": True}),
    "olmo2": ("olmo", {}),
    "olmo3": ("olmo", {"sliding_window": 7, "global_interval": 2}),
    "smollm3": ("smollm3", {}),
    "gemma3_text": ("gemma3", {}),
}


def shape_of(model_type):
    family, overrides = OPTIONS[model_type]
    return named_size(family, "debug", 300, overrides={**overrides, "vocab_size": 400})


def write_release(folder, model_type):
    """A debug model in Hugging Face format, without tokenizer."""
    spec = shape_of(model_type)
    model = build_model(spec)
    model.init_weights(1)
    folder.mkdir(parents=True)
    config = config_from_spec(spec, max_positions=64, dtype="float32")
    (folder / "config.json").write_text(json.dumps(config))
    save_file(to_huggingface(model.state_dict(), spec), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """Tokenizers with multi-digit numbers, with a normalizer, and of another type than BPE."""
    folder = tmp_path_factory.mktemp("vocabularies")
    train_bpe([TEXT.replace(" ", "")] * 3, 290, folder / "bpe.json")
    normalized = tokenizers.Tokenizer.from_file(str(folder / "bpe.json"))
    normalized.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    normalized.save(str(folder / "normalized.json"))
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((character, -1.0) for character in sorted(set(TEXT)))]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0))
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    unigram.decoder = tokenizers.decoders.Metaspace()
    unigram.add_special_tokens(["</s>"])
    unigram.save(str(folder / "unigram.json"))
    return {"bytes": "bytes", **{name: str(folder / f"{name}.json") for name in ("bpe", "normalized", "unigram")}}


def folder_of(tmp_path, model_type, path):
    """Write config.json and the tokenizer files of an export."""
    config = config_from_spec(shape_of(model_type), max_positions=64, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = load_tokenizer(path)
    write_tokenizer(words, tmp_path, 64)
    return words


@pytest.mark.parametrize("name", ["bytes", "bpe", "normalized", "unigram"])
@pytest.mark.parametrize("model_type", OPTIONS)
def test_auto_tokenizer_gives_the_ids_of_the_run_or_there_is_a_warning(model_type, name, vocabularies, tmp_path):
    """It does for every model_type except qwen2; PreTrainedTokenizerFast does for all."""
    words = folder_of(tmp_path, model_type, vocabularies[name])
    warning = tokenizer_warning(tmp_path, words, model_type)
    auto, fast = (kind.from_pretrained(tmp_path) for kind in (AutoTokenizer, PreTrainedTokenizerFast))

    assert fast(TEXT)["input_ids"] == words.encode(TEXT)
    if warning is None:
        assert auto(TEXT)["input_ids"] == words.encode(TEXT)
    else:
        assert model_type == "qwen2"
        assert warning.startswith("AutoTokenizer of transformers ")
        assert "read it with `PreTrainedTokenizerFast.from_pretrained`, which gives the run's ids" in warning
    if model_type == "qwen2" and name in ("bpe", "normalized"):
        assert warning is not None


def test_without_transformers_only_qwen2_has_a_warning(vocabularies, tmp_path, monkeypatch):
    """Nothing can be compared."""
    words = folder_of(tmp_path, "qwen2", vocabularies["bpe"])
    monkeypatch.setitem(sys.modules, "transformers", None)

    assert "for model_type qwen2 and may give other ids" in tokenizer_warning(tmp_path, words, "qwen2")
    assert tokenizer_warning(tmp_path, words, "llama") is None


@pytest.mark.parametrize("beside", [{"model_max_length": 7}, {"tokenizer_class": "GPTNeoXTokenizerFast"}, None])
def test_tokenizer_config_keeps_its_values_and_gets_a_class(beside, vocabularies, tmp_path):
    """Without one AutoTokenizer uses the class of the model type; a damaged file is written anew."""
    (tmp_path / "own").mkdir()
    (tmp_path / "out").mkdir()
    shutil.copyfile(vocabularies["normalized"], tmp_path / "own" / "tokenizer.json")
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(beside) if beside else "{")
    words = folder_of(tmp_path / "out", "gpt_neox", str(tmp_path / "own"))
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    warning = tokenizer_warning(tmp_path / "out", words, "gpt_neox")

    assert (beside or {}).items() <= settings.items()
    assert settings["tokenizer_class"] == (beside or {}).get("tokenizer_class", "PreTrainedTokenizerFast")
    assert (warning is None) == (settings["tokenizer_class"] == "PreTrainedTokenizerFast")


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_of_imports_and_exports_have_the_mode_of_the_umask(mask, mode, tmp_path):
    """Weights too: colleagues on a shared file system can read them."""
    write_release(tmp_path / "released", "llama")
    with umask(mask):
        import_released(str(tmp_path / "released"), tmp_path / "imported", log=print)
        export(
            tmp_path / "imported",
            tmp_path / "exported",
            dtype="bfloat16",
            tokenizer="bytes",
            max_shard_bytes=200_000,
            log=print,
        )
    files = [path for name in ("imported", "exported") for path in (tmp_path / name).rglob("*") if path.is_file()]

    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 1
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: oct(mode) for path in files}


def test_an_export_prints_its_tokenizer_warning_and_has_it_on_the_model_card(vocabularies, tmp_path):
    """A model with qkv_bias is a qwen2 for transformers."""
    write_release(tmp_path / "released", "qwen2")
    import_released(str(tmp_path / "released"), tmp_path / "imported", log=print)
    said = []
    export(tmp_path / "imported", tmp_path / "out", dtype="float32", tokenizer=vocabularies["bpe"], log=said.append)
    (warning,) = [line.removeprefix("note: ") for line in said if line.startswith("note: ")]

    assert "PreTrainedTokenizerFast.from_pretrained" in warning
    assert warning in (tmp_path / "out" / "README.md").read_text()


def test_the_model_card_of_a_repeated_command_has_its_losses(tmp_path):
    """The command was repeated and a stage appended: metrics.jsonl holds events without a step."""
    write_languages(tmp_path / "data")
    raw = two_stages_of(tmp_path / "data", tmp_path)
    first, second = raw["stages"]
    for stages in ([first], [first], [first, second | {"steps": 4}]):
        outcome = train(write_config(changed(raw, stages=stages), tmp_path / "run.toml"))
        assert outcome.status == 0, outcome.output
    losses = {}
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] == "validation":
            losses[entry["stage"], entry["dataset"], entry["step"]] = entry["loss_nats_per_token"]
    export(tmp_path / "run" / "german" / "step-00000004", tmp_path / "out", dtype="float32", log=print)
    card = (tmp_path / "out" / "README.md").read_text()

    assert "Unknown" not in card
    assert f"| german | de | {losses['german', 'de', 0]:.4f} | {losses['german', 'de', 4]:.4f} | 4 |" in card
