"""The begin-of-document token, as the tokenizer's post-processor adds it: in data, plan, evaluation and export."""

import json

import pytest
import small_checkpoints
import training
from prepared import jsonl, run
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from titan_cpt.checkpoint.hf_export import export
from titan_cpt.checkpoint.provenance import find_tokenizer
from titan_cpt.cli import main
from titan_cpt.data.formats.indexed import TokenStream
from titan_cpt.data.inventory import take_inventory
from titan_cpt.data.tokenizer.special_tokens import BYTE_NAMES
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer
from titan_cpt.distributed.process_group import init_process_group
from titan_cpt.errors import DataError
from titan_cpt.evaluation.generate import Sampling, generate
from titan_cpt.evaluation.inference import open_checkpoint
from titan_cpt.evaluation.prompts import generate_texts
from titan_cpt.planning.planner import make_plan

TEXTS = ["ab ba", "b\u00e9 </s><s>", " a"]


def template(bos, number, *more):
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)])


def llama_2():
    """A BPE over characters that falls back to bytes, "\u2581" before the text, <s> put by a template."""
    vocab = ["<unk>", "<s>", "</s>", *BYTE_NAMES, "\u2581", "a", "b", "ab", "\u2581a"]
    numbers = {token: number for number, token in enumerate(vocab)}
    merges = [("a", "b"), ("\u2581", "a")]
    library = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = template("<s>", 1)
    return library, "<s>", "</s>"


def llama_3():
    """A byte-level BPE; the template is the second part of a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({token: number for number, token in enumerate([*alphabet, "ab"])}, [("a", "b")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    both = [processors.ByteLevel(trim_offsets=False), template("<|begin_of_text|>", 257)]
    library.post_processor = processors.Sequence(both)
    return library, "<|begin_of_text|>", "<|end_of_text|>"


def gemma():
    """A BPE with byte fallback, without a space before the text; <bos> added by a template."""
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTE_NAMES, "\u2581", "a", "b", "ab"]
    numbers = {token: number for number, token in enumerate(vocab)}
    library = Tokenizer(models.BPE(numbers, [("a", "b")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", "\u2581")
    library.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    library.post_processor = template("<bos>", 2)
    return library, "<bos>", "<eos>"


def saved(library, folder):
    folder.mkdir(exist_ok=True, parents=True)
    library.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.mark.parametrize("kind", [llama_2, llama_3, gemma])
def test_documents_begin_as_in_the_library(tmp_path, kind):
    """The ids of the library with its special tokens, then the end of the document; empty texts too."""
    library, bos, eos = kind()
    path = saved(library, tmp_path)
    library.encode_special_tokens = True
    ours = load_tokenizer(path).with_bos(True)
    expected = [[*library.encode(text).ids, library.token_to_id(eos)] for text in [*TEXTS, "", "b"]]
    ids, lengths, _ = ours.encode_documents([*TEXTS, "", "b"])

    assert ids.tolist() == [number for document in expected for number in document]
    assert lengths.tolist() == [len(document) for document in expected]
    assert all(document[0] == library.token_to_id(bos) for document in expected)
    assert ours.bos_id == library.token_to_id(bos)
    assert ours.encode_prompt("ab") == library.encode("ab").ids
    assert int(ours.token_byte_lengths()[ours.bos_id]) == 0


@pytest.mark.parametrize("kind", [llama_2, llama_3, gemma])
def test_without_add_bos_documents_begin_with_their_text_and_prepare_notes_it(tmp_path, kind):
    """The note names the token, the flag and the key."""
    library, bos, _ = kind()
    (tmp_path / "a.jsonl").write_text(jsonl(["ab", "b"]))
    result = run([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=saved(library, tmp_path / "t"))

    assert f"its post-processor adds {bos} before every text" in result.summary
    assert "--add-bos (in a config, tokenizer.add_bos = true) adds it" in result.summary
    assert library.token_to_id(bos) not in TokenStream([tmp_path / "out"]).read(0, result.counts.tokens)
    assert "add_bos" not in json.loads((tmp_path / "out.json").read_text())


def test_the_flag_of_prepare_adds_the_token_and_the_record_says_so(tmp_path, capsys):
    """The same inputs with and without it are two recipes."""
    library, _, _ = llama_3()
    tokenizer = saved(library, tmp_path / "t")
    (tmp_path / "a.jsonl").write_text(jsonl(["ab", "b"]))
    command = ["prepare", "--input", str(tmp_path / "a.jsonl"), "--tokenizer", tokenizer, "--workers", "1"]
    command += ["--output", str(tmp_path / "out")]

    def status(*more):
        with pytest.raises(SystemExit) as left:
            main([*command, *more])
        return left.value.code

    assert status("--add-bos") == 0
    assert "post-processor puts" not in capsys.readouterr().out
    b = library.token_to_id("b")
    assert TokenStream([tmp_path / "out"]).read(0, 6).tolist() == [257, 256, 258, 257, b, 258]
    assert json.loads((tmp_path / "out.json").read_text())["add_bos"] is True
    assert status("--add-bos") == 0
    assert "already prepared" in capsys.readouterr().out
    assert status() == 2
    assert "add_bos True -> False" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "--config", "x.toml", "--add-bos"])
    assert "with a config write tokenizer.add_bos = true into the file" in capsys.readouterr().err


def test_a_tokenizer_without_such_a_token_is_refused(tmp_path):
    """Bytes, and a vocabulary without one of the usual names; with such a name no post-processor is needed."""
    with pytest.raises(DataError, match="bytes: has no begin-of-document token"):
        load_tokenizer("bytes").with_bos(True)
    words = {"</s>": 0, "a": 1}
    without = Tokenizer(models.WordLevel(words, unk_token="a"))
    with pytest.raises(DataError, match=r"its post-processor adds none, .*<\|begin_of_text\|>, <bos>"):
        load_tokenizer(saved(without, tmp_path / "without")).with_bos(True)
    named = load_tokenizer(saved(Tokenizer(models.WordLevel({**words, "<s>": 2}, unk_token="a")), tmp_path / "named"))

    assert named.with_bos(True).encode_documents(["a"]).ids.tolist() == [2, 1, 0]
    assert not named.adds_bos_itself


def test_several_tokens_before_a_text_are_refused_by_name(tmp_path):
    """Only the user can decide which of them begins a document."""
    library, _, _ = llama_3()
    library.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 257), ("<sop>", 258)]
    )

    with pytest.raises(DataError, match=r"adds 2 tokens before a text \(\[gMASK\] <sop>\)"):
        load_tokenizer(saved(library, tmp_path)).with_bos(True)


def test_a_template_with_the_id_of_another_token_is_refused(tmp_path):
    """The library would add the template's id, whatever id the vocabulary has."""
    library, _, _ = llama_3()
    path = saved(library, tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["post_processor"]["processors"][1]["special_tokens"]["<|begin_of_text|>"]["ids"] = [97]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))

    with pytest.raises(DataError, match=r"gives <\|begin_of_text\|> the id 97, but its vocabulary does not"):
        load_tokenizer(path).with_bos(True)


def test_roberta_and_bert_add_their_first_token_too(tmp_path):
    """Their post-processors have another form."""
    for processor in (
        processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
        processors.BertProcessing(("</s>", 2), ("<s>", 1)),
    ):
        library = Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a"))
        library.post_processor = processor
        ours = load_tokenizer(saved(library, tmp_path)).with_bos(True)

        assert ours.encode_documents(["a"]).ids.tolist() == library.encode("a").ids == [1, 0, 2]


@pytest.fixture
def prepared(tmp_path):
    """A config over English and German, prepared with or without the token."""
    library, _, _ = llama_3()
    tokenizer = saved(library, tmp_path / "t")
    (tmp_path / "a.jsonl").write_text(jsonl(["ab ba " * 20, "ba"] * 60))
    options = {"tokenizer": tokenizer, "holdout": 0.3, "show_progress": False}

    def config(*, data, key):
        for name in ("en", "de"):
            run([tmp_path / "a.jsonl"], tmp_path / name, add_bos=data, force=True, **options)
        return training.config_of(training.two_stages(tmp_path, tmp_path) | {"tokenizer": {"path": tokenizer, **key}})

    return config


def test_data_and_config_must_agree(prepared):
    """A record without the key says that there is none."""
    take_inventory(prepared(data=True, key={"add_bos": True}))
    take_inventory(prepared(data=False, key={}))
    with pytest.raises(DataError, match=r"en.train: has a begin-of-document token .*Set tokenizer.add_bos = true"):
        take_inventory(prepared(data=True, key={}))
    with pytest.raises(DataError, match=r"en.train: does not have a begin-of-document token .*add_bos = false"):
        take_inventory(prepared(data=False, key={"add_bos": True}))


def test_the_key_is_part_of_the_recipe_if_it_is_set(prepared):
    """Runs of earlier versions keep their fingerprint."""
    plans = []
    for key in ({}, {"add_bos": False}, {"add_bos": True}):
        config = prepared(data=bool(key.get("add_bos")), key=key)
        plans.append(make_plan(config, take_inventory(config)))
    plain, off, on = plans

    assert plain.fingerprint == off.fingerprint != on.fingerprint
    assert "tokenizer.add_bos" not in plain.recipe_until(0)
    assert on.recipe_until(0)["tokenizer.add_bos"] is True


def test_prompts_begin_as_the_training_documents_did(tmp_path):
    """By the recipe in the manifest; a release's tokenizer is used as the release used it."""
    library, _, _ = llama_3()
    path = saved(library, tmp_path)
    recipe = {"model.vocab_size": 384}

    def prompt(record):
        return find_tokenizer({"data": {}, **record}, tmp_path / "x" / "y", path, None).encode_prompt("b")

    b = library.token_to_id("b")
    assert prompt({"recipe": recipe}) == [b]
    assert prompt({"recipe": recipe | {"tokenizer.add_bos": True}}) == [257, b]
    assert prompt({"recipe": recipe, "released": {"name": "x", "config": {}}}) == [257, b]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """An imported release whose tokenizer adds a token before each text."""
    folder = tmp_path_factory.mktemp("imported")
    checkpoint = small_checkpoints.imported(folder, "llama")
    saved(llama_3()[0], folder / "released")
    return checkpoint


def test_generate_adds_the_token_before_a_prompt(imported):
    """The same continuation as from the ids with the token, and another one than without it."""
    model = open_checkpoint(imported, init_process_group())
    prompts = ["The dog", "ab"]
    with_bos, without = (
        generate(model, [[*first, *model.tokenizer.encode(text)] for text in prompts], max_new_tokens=12)
        for first in ([257], [])
    )

    assert generate_texts(model, prompts, 12, Sampling()) == [
        model.tokenizer.decode([token for token in tokens if token < 259]) for tokens in with_bos
    ]
    assert with_bos != without


def test_scores_equal_those_of_lm_evals_own_model_with_its_token(imported, tmp_path):
    """Choices, empty contexts and whole texts. In lm-eval, transformers adds the token."""
    pytest.importorskip("lm_eval", reason="needs lm-eval, which the test extra brings")
    pytest.importorskip("accelerate", reason="needs accelerate, which the test extra brings")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from titan_cpt.evaluation.lm_eval_model import CheckpointLM

    lines: list[str] = []
    export(imported, tmp_path / "out", dtype="float32", log=lines.append)
    how = {"pretrained": str(tmp_path / "out"), "dtype": "float32", "batch_size": 3, "device": "cpu"}
    theirs, theirs_without = HFLM(**how), HFLM(**how, add_bos_token=False)
    ours = CheckpointLM(open_checkpoint(imported, init_process_group()))

    def requests(kind, *arguments):
        return [Instance(request_type=kind, doc={}, arguments=one, idx=number) for number, one in enumerate(arguments)]

    pairs = requests("loglikelihood", ("The dog", " ran"), ("", "ab ran"), ("x", " y z"), ("ab ", "ba"))
    texts = requests("loglikelihood_rolling", ("A short text.",), ("Long. " * 20,))
    assert [nats for nats, _ in ours.loglikelihood(pairs)] == pytest.approx(
        [nats for nats, _ in theirs.loglikelihood(pairs, disable_tqdm=True)], abs=1e-3
    )
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs_without.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3
    )  # which has the token once, as the context of the first; with the tokenizer's own it would be there twice
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (257, 258)
    assert not any("training did not begin" in line for line in lines)
    assert "began with <|begin_of_text|>, which the tokenizer puts" in (tmp_path / "out" / "README.md").read_text()
