"""Checkpoint conversion from and to Hugging Face: exact weights, in any sharding, in little memory; round trips."""

import json
import math
import re
import shutil
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from releases import ROOT, SPECS, python, release, state_of
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, AutoTokenizer

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_export import export
from titan_cpt.checkpoint.hf_import import (
    fill,
    import_released,
    load_released,
    open_released,
    verify_against_transformers,
)
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.cli import main
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer
from titan_cpt.errors import CheckpointError, DataError
from titan_cpt.models.build import build_model
from titan_cpt.models.huggingface_weights import from_huggingface, hub_names
from titan_cpt.models.registry import named_size

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"  # DCP in a single process
)


def equal(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_import_has_the_exact_weights(name, dtype, tmp_path):
    """The manifest verifies, its recipe is the spec, and the weights are those of the file in float32."""
    released = release(tmp_path / "released", SPECS[name], dtype)
    said = []
    import_released(str(tmp_path / "released"), tmp_path / "out", log=said.append)
    record = manifest.verify(tmp_path / "out")
    expected = {name: tensor.to(dtype).float() for name, tensor in released.state_dict().items()}

    assert len(list((tmp_path / "released").glob("*.safetensors"))) > 2
    assert equal(state_of(SPECS[name], lambda model: load_state(tmp_path / "out", model, None)), expected)
    assert record["recipe"] == json.loads(json.dumps(SPECS[name].as_recipe()))
    assert "logits are those of transformers" in said[1]
    assert sum(file["bytes"] for file in record["files"].values()) > 4 * SPECS[name].parameters


@pytest.mark.parametrize("name", SPECS)
def test_loading_into_a_model_gives_the_same_weights_as_an_import(name, tmp_path):
    """`hf:` without a checkpoint in between; the comparison with transformers is in the message."""
    released = release(tmp_path / "released", SPECS[name])
    model = build_model(SPECS[name])
    told = load_released(model, str(tmp_path / "released"), SPECS[name])

    assert equal(model.state_dict(), released.state_dict())
    assert "logits are those of transformers" in told


@contextmanager
def rank_5_of_8():
    """A fake process group: this process is rank 5 of 8, and no data is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(length, ranks, rank):
    """The rows of an FSDP rank: equal shares, rounded up; the last rank gets the rest."""
    each = math.ceil(length / ranks)
    return slice(min(rank * each, length), min((rank + 1) * each, length))


@pytest.mark.parametrize("name", SPECS)
def test_a_sharded_model_reads_the_shards_of_its_rank(name, tmp_path):
    """FSDP2 over 8 ranks: rank 5 holds its rows of every weight, among them the vocabulary of 300 + 20 rows."""
    whole = release(tmp_path / "released", SPECS[name]).state_dict()
    released = open_released(str(tmp_path / "released"))
    spec = released.resized(320)
    grown = {}
    for key, tensor in whole.items():
        mean = tensor.double().mean(0).float()
        grown[key] = torch.cat((tensor, mean.expand(20, -1))) if tensor.shape[0] == 300 else tensor
    model = build_model(spec)
    with rank_5_of_8():
        for block in model.blocks.values():
            fully_shard(block)
        fully_shard(model)
        fill(model, released, spec)
        held = {key: parameter.to_local().clone() for key, parameter in model.named_parameters()}

    for key, part in held.items():
        assert torch.equal(part, grown[key][share(grown[key].shape[0], 8, 5)]), key


def test_a_model_with_tp_and_fsdp_reads_the_shards_of_its_rank(tmp_path):
    """TP degree 2 and FSDP2 over 4: rank 5 is at (2, 1) and holds the third quarter of the second half."""
    whole = release(tmp_path / "released", SPECS["llama"]).state_dict()
    released = open_released(str(tmp_path / "released"))
    model = build_model(released.spec)
    with rank_5_of_8():
        mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
        plan = {"blocks.*.mlp.up": ColwiseParallel(), "blocks.*.mlp.down": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
        fill(model, released, released.spec)
        mlp = model.blocks["1"].mlp
        up, down = mlp.up.weight.to_local().clone(), mlp.down.weight.to_local().clone()

    assert torch.equal(up, whole["blocks.1.mlp.up.weight"][96:][48:72])  # 192 rows: halves of 96, quarters of 24
    assert torch.equal(down, whole["blocks.1.mlp.down.weight"][32:48, 96:])


def test_a_pipeline_stage_reads_its_layers(tmp_path):
    """A model without embedding and first block."""
    whole = release(tmp_path / "released", SPECS["llama"])
    stage = build_model(SPECS["llama"])
    stage.embedding = None
    del stage.blocks["0"]
    fill(stage, open_released(str(tmp_path / "released")), SPECS["llama"])

    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in stage.state_dict().items())


@pytest.mark.parametrize(
    ("rows", "said"), [(257, "rows from 257 on dropped"), (384, "new rows are the mean of the old")]
)
def test_a_vocabulary_is_truncated_or_extended(rows, said, tmp_path):
    """By an import and into a model; the logits of the rows that both have are still compared."""
    whole = release(tmp_path / "released", SPECS["gpt_neox"]).state_dict()
    lines = []
    import_released(str(tmp_path / "released"), tmp_path / "out", vocab_size=rows, log=lines.append)
    spec = open_released(str(tmp_path / "released")).resized(rows)
    imported = state_of(spec, lambda model: load_state(tmp_path / "out", model, None))
    loaded = state_of(spec, lambda model: load_released(model, str(tmp_path / "released"), spec))

    assert said in lines[0]
    assert equal(imported, loaded)
    for name in ("embedding.weight", "head.weight"):
        assert torch.equal(imported[name][:257], whole[name][:257])
        assert imported[name].shape[0] == rows
        if rows > 300:
            torch.testing.assert_close(imported[name][300:], whole[name].mean(0).expand(rows - 300, -1))


def test_another_model_than_the_config_is_refused(tmp_path):
    """With both values, by the keys of [model], and the [model] table that would fit."""
    release(tmp_path / "released", SPECS["llama"])
    wanted = named_size("llama", "debug", 257, overrides={"layers": 3, "rope_base": 500.0})
    with pytest.raises(CheckpointError) as refusal:
        load_released(build_model(wanted), str(tmp_path / "released"), wanted)

    assert "model.layers: 2 -> 3" in str(refusal.value)
    assert "model.rope_base: 10000.0 -> 500.0" in str(refusal.value)
    assert "vocab_size: 300 ->" not in str(refusal.value)
    assert 'size = "debug"' in str(refusal.value)


def test_logits_that_differ_from_transformers_are_refused(tmp_path):
    """Our model has other weights than the Hugging Face model: no checkpoint is written."""
    release(tmp_path / "released", SPECS["llama"])
    released = open_released(str(tmp_path / "released"))
    with pytest.raises(CheckpointError, match="computes other logits"):
        verify_against_transformers(released, released.spec, lambda model: model.init_weights(2))


def test_an_existing_folder_is_never_written_into(tmp_path):
    """Neither by an import nor by an export; its files are kept, and no partial folder is left beside it."""
    release(tmp_path / "released", SPECS["llama"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="already exists; remove it, or give another folder"):
        import_released(str(tmp_path / "released"), tmp_path / "out", log=print)
    with pytest.raises(CheckpointError, match="already exists"):
        export(tmp_path / "released", tmp_path / "out", dtype="float32", log=print)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "released"]


def test_an_import_takes_less_memory_than_two_shards(tmp_path):
    """12 shards of up to 15 MB, 153 MB in all: memory grows by less than two shards while a checkpoint is written."""
    code = f"""
import sys
import torch
from pathlib import Path
from safetensors.torch import save_file
from titan_cpt.checkpoint.hf_release import ReleasedModel, weight_shapes
from titan_cpt.checkpoint.weights_only import save_weights
from titan_cpt.models.huggingface_weights import hub_names
from titan_cpt.models.registry import named_size
from titan_cpt.checkpoint.hf_files import WeightFiles
shape = named_size("gpt_neox", "debug", 257, overrides=dict(layers=12, width=512, heads=8, vocab_size=512))
folder, names, lengths = Path({str(tmp_path)!r}), hub_names(shape), weight_shapes(shape)
import json
if len(sys.argv) > 1:
    index = {{}}
    for number in range(12):
        part = [name for name in names if f".{{number}}." in name or number == 0 and "blocks" not in name]
        save_file({{names[name]: torch.randn(lengths[name]) for name in part}}, folder / f"{{number}}.safetensors")
        index |= {{names[name]: f"{{number}}.safetensors" for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps({{"weight_map": index}}))
    sys.exit()
released = ReleasedModel("x", {{}}, shape, WeightFiles(folder))
small = named_size("gpt_neox", "debug", 257, overrides=dict(layers=1, width=512, heads=8, vocab_size=512))
for name in ("first", "out"):
    (folder / name).mkdir()
save_weights(small, lambda name: released.read(name, small), folder / "first")  # all that is imported on the way, once
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
save_weights(shape, lambda name: released.read(name, shape), folder / "out")
grown = peak() - before
print(grown, released.files.largest_file_bytes, 4 * shape.parameters)
"""
    for arguments in (["write"], []):
        done = python("-W", "ignore", "-c", code, *arguments)
        assert done.returncode == 0, done.stderr
    grown, largest, total = (int(number) for number in done.stdout.split())

    assert grown < 2 * largest < total / 4


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory):
    """The folder that scripts/roundtrip_huggingface.py writes, and its output."""
    folder = tmp_path_factory.mktemp("round_trip")
    script = ROOT / "scripts" / "roundtrip_huggingface.py"
    done = python(script, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_the_round_trip_learns_german_and_generates(family, round_trip):
    """The script compares the loss in transformers with the run's; its last lines are the result."""
    _, printed = round_trip

    assert re.search(
        rf"{family}: loss 5\.\d+ -> [23]\.\d+, in transformers [23]\.\d+; it generates 'Der Hund .+'", printed
    )


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_export_and_import_give_the_same_weights(family, round_trip, tmp_path):
    """The run's checkpoint, its float32 export, and the import of that export."""
    folder, _ = round_trip
    source = folder / "outputs" / family / "german" / "step-00000030"
    import_released(str(folder / f"{family}-exported"), tmp_path / "again", log=print)
    spec = SPECS[family]
    first, again = (
        state_of(spec, lambda model, at=at: load_state(at, model, None)) for at in (source, tmp_path / "again")
    )
    exported = {}
    for file in (folder / f"{family}-exported").glob("*.safetensors"):
        exported |= load_file(file)

    assert equal(first, again)
    assert equal(from_huggingface(exported, spec), first)
    assert manifest.read(tmp_path / "again")["recipe"].items() <= manifest.read(source)["recipe"].items()


def test_an_export_in_bfloat16_is_the_rounded_weights_in_one_file(round_trip, tmp_path, capsys):
    """By the command line with its defaults; config.json has the dtype, and transformers loads it."""
    folder, _ = round_trip
    source = folder / "outputs" / "llama" / "german" / "step-00000030"
    with pytest.raises(SystemExit) as end:
        main(["export", str(source), str(tmp_path / "out")])
    exact = state_of(SPECS["llama"], lambda model: load_state(source, model, None))
    written = from_huggingface(load_file(tmp_path / "out" / "model.safetensors"), SPECS["llama"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")

    assert end.value.code == 0
    assert "read back bit by bit" in capsys.readouterr().out
    assert equal(written, {name: tensor.bfloat16() for name, tensor in exact.items()})
    assert model.dtype is torch.bfloat16


def test_the_exported_tokenizer_gives_the_ids_that_the_run_was_trained_on(round_trip):
    """The byte tokenizer as a tokenizer.json, on all bytes of UTF-8, and the end-of-document token."""
    folder, _ = round_trip
    theirs, ours = AutoTokenizer.from_pretrained(folder / "llama-exported"), load_tokenizer("bytes")
    for text in ("Der Hund läuft über die Straße.", "a\n\tb  c", "\u00e9\u20ac\U0001f600 \x00\x7f", "x" * 50):
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eod_id == 256
    assert len(theirs) == 257


def test_the_model_card_states_what_the_run_recorded(round_trip):
    """Base model, stages, tokens, replay, LR and losses equal those in the run's summary."""
    folder, _ = round_trip
    card = (folder / "llama-exported" / "README.md").read_text()
    (stage,) = json.loads((folder / "outputs" / "llama" / "summary.json").read_text())["stages"]

    assert "| german | german 100 % | 30 | 15,360 | none | cosine, 0.003 to 0.0003 | reset | `hf:" in card
    assert f"| german | german | {stage['before']['german']:.4f} | {stage['after']['german']:.4f} | 30 |" in card
    assert "llama-released" in card
    assert "Learning rate of the last step: german 0.0003" in card


def test_an_export_has_the_longest_sequence_and_the_end_of_document_id(round_trip):
    """max_position_embeddings of the base model (2,048), and one end-of-document id in both files."""
    folder, _ = round_trip
    config, generation = (
        json.loads((folder / "llama-exported" / name).read_text()) for name in ("config.json", "generation_config.json")
    )

    assert config["max_position_embeddings"] == 2048
    assert [config["eos_token_id"], generation["eos_token_id"]] == [256, 256]


def test_a_damaged_checkpoint_is_not_exported(round_trip, tmp_path):
    """One byte of a file is changed: the error names the file, and no file remains."""
    folder, _ = round_trip
    copy = shutil.copytree(folder / "gpt_neox-imported", tmp_path / "copy")
    file = next(copy.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="its content changed since it was saved"):
        export(copy, tmp_path / "out", dtype="float32", log=print)

    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_another_tokenizer_than_the_runs_is_refused(round_trip, tmp_path):
    """Its ids have another meaning. For an import without tokenizer any one with few enough ids is accepted."""
    folder, _ = round_trip
    other = folder / "llama-exported" / "tokenizer.json"
    run = folder / "outputs" / "llama" / "german" / "step-00000030"
    with pytest.raises(DataError, match="is not the tokenizer of the run"):
        export(run, tmp_path / "out", dtype="float32", tokenizer=str(other), log=print)
    said = []
    export(folder / "gpt_neox-imported", tmp_path / "out", dtype="float32", tokenizer=str(other), log=said.append)

    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == other.read_bytes()
    assert said[-1] == f"tokenizer: {other}"


def test_a_run_with_two_ranks_starts_from_the_same_weights(round_trip, tmp_path):
    """`hf:` on two ranks under FSDP2: the losses of step 0 and of the first steps are those of one process."""
    folder, _ = round_trip
    overrides = ["--job.output_dir", tmp_path, "--stages.german.steps", "3", "--training.local_batch_size", "4"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "titan_cpt", "train"]
    done = python(*command, "--config", folder / "llama.toml", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr

    def losses(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line["loss_nats_per_token"] for line in lines if line["kind"] == "validation" and line["step"] == 0] + [
            line["loss_nats_per_token"] for line in lines if line["kind"] == "train" and line["step"] == 1
        ]

    assert losses(tmp_path / "llama") == pytest.approx(losses(folder / "outputs" / "llama"), abs=1e-5)


def test_an_import_has_no_optimizer_state_to_keep(round_trip, tmp_path):
    """The error names the key and the remedy; exit status 2."""
    folder, _ = round_trip
    done = python(
        *("-m", "titan_cpt", "train", "--config", folder / "gpt_neox.toml"),
        *("--job.output_dir", tmp_path, "--stages.german.optimizer_state", "keep"),
    )

    assert done.returncode == 2
    assert (
        "is an import, which has no optimizer state to keep: set stages.german.optimizer_state to reset" in done.stderr
    )


def test_help_does_not_import_torch():
    """--help of the program and of both commands imports neither torch nor transformers."""
    code = """
import sys
from titan_cpt.cli import main
for words in (["--help"], ["import", "--help"], ["export", "--help"]):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0
print([name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules])
"""
    answer = python("-c", code)

    assert answer.stdout.splitlines()[-1] == "[]"


def test_hub_names_cover_every_weight():
    """Every weight of each family's debug model has a name, and no other has."""
    for spec in SPECS.values():
        assert set(hub_names(spec)) == set(build_model(spec).state_dict())
