"""A stage's RoPE: the run, its checkpoints and its exports compute with it, as transformers does with the same keys.

Each family's run has four stages: the RoPE of [model], another base, YaRN, and Llama 3's scaling with a third base and
sequences twice as long. It is killed in the last stage and resumed.
"""

import json
import signal
from dataclasses import replace

import pytest
import torch
import training
from training import Fault, train
from transformers import AutoConfig, AutoModelForCausalLM

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_export import export
from titan_cpt.checkpoint.hf_import import import_released
from titan_cpt.common.signals import StopRequest
from titan_cpt.data.batch import Batch
from titan_cpt.distributed.process_group import init_process_group
from titan_cpt.errors import CheckpointError
from titan_cpt.evaluation.inference import logits_at, open_checkpoint
from titan_cpt.models.huggingface_weights import to_huggingface
from titan_cpt.models.spec import Rope, RopeScaling
from titan_cpt.train import Trainer
from titan_cpt.training.build import build
from titan_cpt.training.stage_start import begin_stage, load_initial, resume_stage, set_rope

pytestmark = [
    *training.THEIR_WARNINGS_IGNORED,
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # raised inside torch's compiler
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # in its tracing
]
FAMILIES = ("gpt_neox", "llama")
STAGES = {  # stage -> its key `rope`, and transformers' rope_parameters
    "plain": ({}, {"rope_type": "default", "rope_theta": 10_000.0}),
    "base": ({"base": 300.0}, {"rope_type": "default", "rope_theta": 300.0}),
    "yarn": (
        {"kind": "yarn", "factor": 4.0, "original_seq_len": 16, "beta_fast": 8.0},
        {
            "rope_type": "yarn",
            "rope_theta": 300.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 8.0,
        },
    ),
    "llama3": (
        {"base": 700.0, "kind": "llama3", "factor": 8.0, "original_seq_len": 32},
        {
            "rope_type": "llama3",
            "rope_theta": 700.0,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
}
TOKENS_BL = torch.randint(0, 257, (2, 48), generator=torch.Generator().manual_seed(5))
BATCH = Batch(TOKENS_BL, TOKENS_BL)


def config_of(data, folder, family):
    raw = training.two_stages(data, folder)
    one = {"dataset": "en", "steps": 3, "lr": {"schedule": "constant", "max": 3e-3}}
    stages = [{"name": name, **one, **({"rope": rope} if rope else {})} for name, (rope, _) in STAGES.items()]
    stages[-1] |= {"seq_len": 32, "global_batch_size": 2, "local_batch_size": 1}
    fraction = {"rotary_fraction": 0.5} if family == "gpt_neox" else {}
    return training.changed(raw, model={"family": family, "size": "debug", **fraction}, stages=stages)


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, data, tmp_path_factory):
    """The folder of a run that was killed in its last stage and resumed, and the family."""
    folder = tmp_path_factory.mktemp(request.param)
    config = training.write_config(config_of(data, folder, request.param), folder / "c.toml")
    killed = train(config, "--checkpoint.interval", "1", fault=Fault("titan_cpt.train:Trainer.train_step", 12))
    resumed = train(config, "--checkpoint.interval", "1")

    assert killed.status == -signal.SIGKILL, killed.output
    assert resumed.status == 0, resumed.output
    return folder / "run", request.param, killed.output


def transformers_logits(family, stage, spec, state):
    """The logits of transformers' model with these weights and the stage's rope_parameters, written by hand."""
    rope = dict(STAGES[stage][1])
    common = {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.mlp_width,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "gpt_neox":
        rope["partial_rotary_factor"] = 0.5
        config = AutoConfig.for_model("gpt_neox", **common, rope_parameters=rope)
    else:
        kv = {"num_key_value_heads": spec.kv_heads, "head_dim": spec.head_width, "rms_norm_eps": spec.norm_eps}
        config = AutoConfig.for_model("llama", **common, **kv, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config).eval()
    names = {key.replace("embed_out", "lm_head"): tensor for key, tensor in to_huggingface(state, spec).items()}
    model.load_state_dict(names, strict=False)
    with torch.no_grad():
        return model(TOKENS_BL).logits


def assert_close(ours_BLV, theirs_BLV):
    torch.testing.assert_close(ours_BLV, theirs_BLV, rtol=1e-4, atol=1e-4)


def loaded_logits(checkpoint):
    """The logits that eval and generate compute from a checkpoint."""
    loaded = open_checkpoint(checkpoint, init_process_group(), tokenizer="bytes", precision="float32")
    rows, positions = (part.flatten() for part in torch.meshgrid(torch.arange(2), torch.arange(48), indexing="ij"))
    with torch.no_grad():
        return logits_at(loaded.model, TOKENS_BL, rows, positions).view(2, 48, -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_that_trains_has_the_rope_of_its_stage(family, data, tmp_path):
    """From the moment when a stage begins; later positions differ from those of the stage before."""
    with training.built_trainer(training.config_of(config_of(data, tmp_path, family))) as trainer:
        trainer.model.init_weights(3)
        state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        seen = []
        for stage in trainer.plan.stages:
            begin_stage(trainer, trainer.plan.stages[0])  # random weights, and the RoPE of the first stage
            trainer.model.load_state_dict(state)
            set_rope(trainer, stage.spec.rope)
            seen.append(trainer.runner.logits(BATCH))
            assert_close(seen[-1], transformers_logits(family, stage.name, stage.spec, state))
            assert_close(trainer.runner.logits(replace(BATCH, positions_BL=torch.arange(48).expand(2, 48))), seen[-1])
    differences = [(later - seen[0]).abs().amax((0, 2)) for later in seen[1:]]

    assert all(difference[0] < 0.1 * difference[-1] for difference in differences)
    assert all(difference[-1] > 1e-3 for difference in differences)


def test_a_resumed_stage_computes_with_its_rope(run, data, tmp_path):
    """Trained steps after a kill too: the runner of a resumed trainer, and every checkpoint, match transformers."""
    folder, family, _ = run
    config = training.config_of(config_of(data, folder.parent, family))
    with StopRequest() as stop:
        trainer, checkpoint = build(Trainer, config, init_process_group(), folder, stop)
        resume_stage(trainer, checkpoint)
        ours_BLV = trainer.runner.logits(BATCH)
        state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.log.close()

    assert checkpoint.manifest["stage"] == "llama3"
    assert training.events_of(folder, "resume")
    assert_close(ours_BLV, transformers_logits(family, "llama3", trainer.plan.spec, state))
    assert_close(ours_BLV, loaded_logits(checkpoint.folder))


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_each_stage_is_read_with_the_stages_rope(run, stage):
    """By eval and generate; its manifest has the RoPE only if that is not the one of [model]."""
    folder, family, _ = run
    checkpoint = folder / stage / "step-00000003"
    record = manifest.read(checkpoint)
    loaded = open_checkpoint(checkpoint, init_process_group(), tokenizer="bytes", precision="float32")

    assert ("rope" in record) == (stage != "plain")
    assert loaded.max_length == (32 if stage == "llama3" else 16)
    assert record["recipe"]["model.rope_base"] == 10_000.0
    assert_close(
        loaded_logits(checkpoint),
        transformers_logits(family, stage, loaded.model.spec, loaded.model.state_dict()),
    )


@pytest.mark.parametrize("stage", ["base", "yarn", "llama3"])
def test_an_export_and_its_import_have_the_stages_rope(run, stage, tmp_path):
    """transformers reads it from config.json; the imported checkpoint has the same logits."""
    folder, _family, _ = run
    checkpoint = folder / stage / "step-00000003"
    export(checkpoint, tmp_path / "out", dtype="float32", log=lambda line: None)
    lines = []
    import_released(str(tmp_path / "out"), tmp_path / "again", log=lines.append)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs_BLV = model(TOKENS_BL).logits
    parameters = json.loads(model.config.to_json_string())["rope_parameters"]

    assert {key: parameters[key] for key in STAGES[stage][1]} == STAGES[stage][1]
    assert model.config.max_position_embeddings == (32 if stage == "llama3" else 16)
    assert f"- RoPE: base {STAGES[stage][1]['rope_theta']:g}" in (tmp_path / "out" / "README.md").read_text()
    assert_close(loaded_logits(checkpoint), theirs_BLV)
    assert torch.equal(loaded_logits(checkpoint), loaded_logits(tmp_path / "again"))
    assert any(line.startswith("logits are those of transformers") for line in lines)


def test_a_run_says_where_the_rope_changes(run):
    """At the start of each stage that changes it, old and new."""
    *_, output = run
    text = " ".join(output.split())

    assert "RoPE: base 10,000 without scaling -> base 300 without scaling" in text
    assert "RoPE: base 300 without scaling -> base 300, yarn x 4 of 16 tokens (beta_fast 8)" in text
    assert "-> base 700, llama3 x 8 of 32 tokens" in text
    assert text.count("RoPE:") == 3


def test_a_rope_that_changed_under_a_run_is_refused(run, data):
    """With the stage's key, the old and the new value; a stage that has lost its RoPE too."""
    folder, family, _ = run
    raw = config_of(data, folder.parent, family)
    raw["stages"][1].pop("rope")
    raw["stages"][2]["rope"]["factor"] = 8.0
    with StopRequest() as stop, pytest.raises(CheckpointError) as refusal:
        build(Trainer, training.config_of(raw), init_process_group(), folder, stop)

    assert "stages.base.rope.base: 300.0 -> not set" in str(refusal.value)
    assert "stages.yarn.rope.factor: 4.0 -> 8.0" in str(refusal.value)


FOREIGN = ("checkpoint", "hf")


@pytest.fixture(scope="module", params=FOREIGN)
def foreign(request, run, tmp_path_factory):
    """`init` of the weights of the run's last stage, as a checkpoint and as a release; and the family."""
    folder, family, _ = run
    checkpoint = folder / "llama3" / "step-00000003"
    if request.param == "checkpoint":
        return f"checkpoint:{checkpoint}", family
    out = tmp_path_factory.mktemp("released") / "out"
    export(checkpoint, out, dtype="float32", log=lambda line: None)
    return f"hf:{out}", family


def started(data, folder, family, init, *, model=None, **rope):
    """The text about the initial weights of a stage with this `init` and `rope`, and the RoPE that then trains."""
    raw = config_of(data, folder, family)
    stage = {**raw["stages"][0], "init": init, **({"rope": rope} if rope else {})}
    raw = training.changed(raw, model=model or {}, stages=[stage])
    with training.built_trainer(training.config_of(raw)) as trainer:
        text = load_initial(trainer, trainer.plan.stages[0])
        return text, trainer.runner.models[0].spec.rope


OWN = Rope(700.0, RopeScaling(kind="llama3", factor=8.0, original_seq_len=32))


def test_weights_from_outside_must_have_the_rope_of_the_model_or_the_stage_changes_it(foreign, data, tmp_path):
    """Refused with both values and the remedy, key by key; accepted with the change in the log."""
    init, family = foreign
    with pytest.raises(CheckpointError) as refusal:
        started(data, tmp_path, family, init)
    with pytest.raises(CheckpointError) as half:
        started(data, tmp_path, family, init, base=9000.0)
    text, rope = started(data, tmp_path, family, init, base=9000.0, kind="none")

    assert "model.rope_base: 700.0 -> 10000.0" in str(refusal.value)
    assert "model.rope_scaling" in str(half.value)
    assert "rope_base" not in str(half.value).partition("It is")[0]
    for message in (str(refusal.value), str(half.value)):
        assert "rope = { base = ... } in its [[stages]]" in message
    assert rope == Rope(9000.0)
    assert "RoPE: base 700, llama3 x 8 of 32 tokens -> base 9,000 without scaling" in text


def test_weights_from_outside_with_the_rope_of_the_model_keep_it(foreign, data, tmp_path):
    """The log does not mention RoPE."""
    init, family = foreign
    scaling = {"kind": "llama3", "factor": 8.0, "original_seq_len": 32}
    text, rope = started(data, tmp_path, family, init, model={"rope_base": 700.0, "rope_scaling": scaling})

    assert rope == OWN
    assert "RoPE" not in text


def test_the_first_weights_of_a_later_stage_are_measured_with_its_rope(run, data, tmp_path):
    """As for a baseline of forgetting: from the path of the stage before's checkpoint, whose RoPE is not [model]'s."""
    folder, family, _ = run
    raw = config_of(data, tmp_path, family)
    with training.built_trainer(training.config_of(raw)) as trainer:
        stage = trainer.plan.stage("yarn")
        text = load_initial(trainer, replace(stage, init=f"checkpoint:{folder}/base/step-00000003"))

        assert trainer.runner.models[0].spec.rope == stage.spec.rope
        assert text.endswith("RoPE: base 300 without scaling -> base 300, yarn x 4 of 16 tokens (beta_fast 8)")


def test_the_bf16_copy_and_the_compiled_blocks_compute_with_the_stages_rope(data, tmp_path):
    """A compiled step after a change of RoPE gives the bits of a process that has only seen the later one."""
    raw = config_of(data, tmp_path, "llama")
    raw = training.changed(raw, training={"mixed_precision_param": "bfloat16"}, compile={"enable": True})
    losses = []
    for names in (("plain", "base"), ("base",)):
        torch.compiler.reset()
        with training.built_trainer(training.config_of(raw)) as trainer:
            copy = trainer.runner.models[0]
            for name in names:
                stage = trainer.plan.stage(name)
                set_rope(trainer, stage.spec.rope)
                trainer.model.init_weights(3)
                batch = training.loader_of(trainer, stage).batch(0, 0)
                losses.append(trainer.runner.backward(batch, 64).item())
            assert copy is not trainer.model
            assert copy.spec.rope == trainer.model.spec.rope == Rope(300.0)

    assert losses[0] != losses[1] == losses[2]
