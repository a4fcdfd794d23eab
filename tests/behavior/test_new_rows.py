"""Rows of new tokens: a run with an extended tokenizer starts from weights of its base, is resumed and exported.

The base is a byte tokenizer with a released model of 300 rows; the extension has three more ids. Stage "first" computes
their rows from their pieces; stage "again" starts from an average, in which it replaces them by the mean.
"""

import json
import shutil
import signal

import pytest
import torch
import training
from extensions import base_spec, extended
from releases import SPECS, release
from training import Fault, built_trainer, config_of, events_of, tensors_of, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from titan_cpt.checkpoint.hf_export import export
from titan_cpt.checkpoint.hf_import import import_released
from titan_cpt.distributed.process_group import init_process_group
from titan_cpt.evaluation.inference import open_checkpoint
from titan_cpt.models.build import build_model
from titan_cpt.training.stage_start import load_initial

pytestmark = training.THEIR_WARNINGS_IGNORED
TOKENS_BL = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(5))
PIECES = (b"th", b"the", b" the")  # of ids 257, 258, 259
MADE = "3 new rows of embedding and head, each the mean of "
WEIGHTS = ("embedding.weight", "head.weight")
CARD = (("first", "its pieces' rows"), ("again", "the old rows"))
LAST = "again/step-00000003"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tokenizers, a released model of the base and its import, and token files."""
    folder = tmp_path_factory.mktemp("new-rows")
    (folder / "base.json").write_text(json.dumps(base_spec()))
    (folder / "new.json").write_text(json.dumps(extended(base_spec())))
    release(folder / "released", SPECS["gpt_neox"])
    shutil.copy(folder / "base.json", folder / "released" / "tokenizer.json")
    import_released(str(folder / "released"), folder / "imported", log=lambda line: None)
    import_released(str(folder / "released"), folder / "larger", vocab_size=512, log=lambda line: None)
    training.write_languages(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder):
    """The model of the base, with the released weights."""
    model = build_model(SPECS["gpt_neox"])
    model.load_state_dict(tensors_of(folder / "imported"))
    return model


def raw_of(folder, name="run", **first):
    """The config of both stages; `first`: other keys of the first."""
    raw = training.two_stages(folder, folder)
    one = {"dataset": "en", "steps": 3, "lr": {"schedule": "constant", "max": 1e-3}}
    stages = [
        {"name": "first", "init": f"checkpoint:{folder / 'imported'}", **one, **first},
        {"name": "again", "init": "stage:first@average", "new_rows": "mean", **one},
    ]
    return training.changed(
        raw,
        job={"name": name},
        tokenizer={"path": str(folder / "new.json"), "extend": {"base": str(folder / "base.json")}},
        checkpoint={"interval": 2},
        averaging={"kind": "mean", "last": 2, "every": 1},
        stages=stages,
    )


@pytest.fixture(scope="module")
def run(folder):
    """A run to its end, and the same one killed before step 2 of the second stage, which then begins again."""
    configs = {name: training.write_config(raw_of(folder, name), folder / f"{name}.toml") for name in ("run", "broken")}
    outcomes = [train(configs["run"])]
    outcomes.append(train(configs["broken"], fault=Fault("titan_cpt.train:Trainer.train_step", 5)))
    outcomes.append(train(configs["broken"]))
    outputs = "\n".join(each.output for each in outcomes)
    assert [each.status for each in outcomes] == [0, -signal.SIGKILL, 0], outputs
    return folder / "run"


def initial(raw, stage=0):
    """A stage's initial weights, and what the log says of them."""
    with built_trainer(config_of(raw)) as trainer:
        said = load_initial(trainer, trainer.plan.stages[stage])
        return {name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()}, said


@pytest.mark.parametrize("init", ["checkpoint:imported", "hf:released"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_old_rows_are_kept_to_the_bit_and_new_rows_are_made_of_pieces(folder, base, init, precision):
    """With bfloat16 compute too, where the float32 weights have a copy. The model has 384 rows, the source 300."""
    kind, _, name = init.partition(":")
    raw = raw_of(folder, f"initial-{name}-{precision}", init=f"{kind}:{folder / name}")
    state, said = initial(training.changed(raw, training={"mixed_precision_param": precision}))
    assert f"{name}; {MADE}its pieces' rows; 124 padding rows: the mean of the old rows" in said
    for weight, old in base.state_dict().items():
        assert torch.equal(state[weight][: 257 if weight in WEIGHTS else None], old[:257] if weight in WEIGHTS else old)
    for weight in WEIGHTS:
        old = base.state_dict()[weight][:257].double()
        made = torch.stack([old[list(each)].mean(0) for each in PIECES])
        torch.testing.assert_close(state[weight][257:260].double(), made, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(state[weight][260:].double(), old.mean(0).expand(124, -1), rtol=1e-6, atol=1e-9)


def test_text_of_the_base_has_the_same_logits_and_a_loss_that_rises_by_the_mass_of_the_new_ids(folder, base):
    """loss' - loss = log(1 + Z_new / Z_old), where Z is a sum of exp(logit): nothing else of the model changes."""
    with built_trainer(config_of(raw_of(folder, "logits"))) as trainer:
        load_initial(trainer, trainer.plan.stages[0])
        with torch.no_grad():
            new_BLV, old_BLV = trainer.model(TOKENS_BL), base(TOKENS_BL)[..., :257]
    torch.testing.assert_close(new_BLV[..., :257], old_BLV, rtol=1e-5, atol=1e-6)
    before, after = (-each.log_softmax(-1)[:, :-1].gather(-1, TOKENS_BL[:, 1:, None]) for each in (old_BLV, new_BLV))
    rise = torch.log1p(new_BLV[..., 257:].exp().sum(-1) / new_BLV[..., :257].exp().sum(-1))[:, :-1]
    torch.testing.assert_close((after - before)[..., 0], rise, rtol=1e-4, atol=1e-5)


def test_a_later_stage_replaces_the_rows_of_the_weights_that_it_starts_from(folder, run):
    """The mean of the old rows of the average in the checkpoint of the first stage; the log says it."""
    average = tensors_of(run / "first/step-00000003", "average")
    state, said = initial(raw_of(folder), stage=1)
    assert f"@average; {MADE}the old rows; 124 padding rows" in said
    assert [MADE in event["weights"] for event in events_of(run, "transition")] == [True, True]
    for weight in WEIGHTS:
        old = average[weight][:257]
        assert torch.equal(state[weight][:257], old)
        torch.testing.assert_close(
            state[weight][257:].double(), old.double().mean(0).expand(127, -1), rtol=1e-6, atol=1e-9
        )
    assert not torch.equal(state["embedding.weight"], average["embedding.weight"])


def test_a_killed_run_ends_with_the_same_bits(folder, run):
    assert training.same_bits(tensors_of(run / LAST), tensors_of(folder / "broken" / LAST))
    assert training.numbers_of(run) == training.numbers_of(folder / "broken")


def test_an_export_agrees_with_its_tokenizer_and_with_transformers(folder, run, tmp_path):
    """384 rows, 260 ids: transformers encodes new tokens and computes our logits; the card says how rows were made."""
    export(run / LAST, tmp_path / "export", dtype="float32", log=lambda line: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    loaded = open_checkpoint(run / LAST, init_process_group(), tokenizer=None, precision="float32")
    tokens_BL = torch.tensor([[*tokenizer("in the", add_special_tokens=False)["input_ids"], 258, 257, 97]])
    assert tokens_BL[0, :3].tolist() == [*b"in", 259]
    assert (model.config.vocab_size, len(tokenizer)) == (384, 260)
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"- Tokenizer extends: `{folder / 'base.json'}`, whose ids it keeps\n" in card
    made = [f"{stage}: {MADE}{rows}; 124 padding rows: the mean of the old rows" for stage, rows in CARD]
    assert f"- New rows, stage {'; '.join(made)}\n" in card
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens_BL), model(tokens_BL).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "first", "message"),
    [
        ("keep", {"optimizer_state": "keep"}, "were trained with tokenizer.extend.base, or with an unknown"),
        ("large", {"init": "checkpoint:larger"}, "its model differs from the config's: model.vocab_size: 512 -> 384"),
    ],
)
def test_weights_that_cannot_be_used_are_refused_in_one_message(folder, name, first, message):
    first = {key: value.replace(":larger", f":{folder / 'larger'}") for key, value in first.items()}
    refused = train(training.write_config(raw_of(folder, name, **first), folder / f"{name}.toml"))
    assert refused.status == 2
    assert message in " ".join(refused.output.split())
    assert "Traceback" not in refused.output
