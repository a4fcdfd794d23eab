"""Runs on packed documents: the loss, a kill and a resume, the index in the cache, and what the plan prints."""

import json
import shutil
import signal
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
from token_formats import write_pair
from training import Fault, train

from titan_cpt.cli import main
from titan_cpt.data.formats.indexed import TokenStream
from titan_cpt.models.gpt_neox.model import GPTNeoX
from titan_cpt.training.stage_start import begin_stage

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture
def raw(data, tmp_path):
    """English packed, then German, packed at another length, with English as replay."""
    raw = training.two_stages(data, tmp_path)
    raw["storage"] = {"cache_dir": str(tmp_path / "cache")}
    raw["training"]["seq_len"] = 64
    for dataset in raw["datasets"].values():
        dataset["packing"] = "best_fit"
    return raw


def first_step(trainer):
    """A second model with the initial weights, the sequences of the first step, and a function that takes the step."""
    stage = trainer.plan.stages[0]
    begin_stage(trainer, stage)
    model = GPTNeoX(trainer.plan.spec)
    model.init_weights(trainer.plan.seed)
    rows = trainer.readers[stage.name].read(trainer.plan.batch(stage, 0))
    return model, rows, lambda: trainer.train_step(training.loader_of(trainer, stage), stage, 0)


def test_the_loss_is_the_mean_over_the_positions_that_have_a_target(raw):
    """In micro-batches of different fill: that of torch's cross-entropy with ignored positions over the whole batch."""
    with training.built_trainer(training.config_of(raw)) as trainer:
        model, rows, take_step = first_step(trainer)
        logits = model(torch.from_numpy(rows.tokens[:, :-1])).flatten(0, 1)
        expected = F.cross_entropy(logits, torch.from_numpy(rows.targets).flatten(), ignore_index=-1)
        expected.backward()
        norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
        result = take_step()

    assert (rows.targets == -1).sum() > 4
    assert result.loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert result.grad_norm.item() == pytest.approx(norm.item(), rel=2e-6)


@pytest.mark.parametrize("positions", [False, True])
def test_with_a_document_mask_the_loss_is_that_of_the_documents_one_by_one(raw, positions):
    """Each document, or piece of one, is a sequence of its own length, without padding: loss and gradients."""
    raw["training"] |= {"document_mask": True, "document_positions": positions}
    with training.built_trainer(training.config_of(raw)) as trainer:
        model, rows, take_step = first_step(trainer)
        targets = torch.from_numpy(rows.targets)
        counted, total, documents = int((targets >= 0).sum()), 0.0, 0
        for row, starts in enumerate(rows.starts):
            for begin, end in pairwise([0, *starts, 64]):
                predicted = targets[row, begin:end]
                if (predicted >= 0).any():
                    logits = model(torch.from_numpy(rows.tokens[row : row + 1, begin:end]))[0]
                    loss = F.cross_entropy(logits, predicted, ignore_index=-1, reduction="sum") / counted
                    loss.backward()
                    total += loss.item()
                    documents += 1
        result = take_step()
        norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()

    assert documents > 4
    assert result.loss.item() == pytest.approx(total, rel=2e-6)
    assert result.grad_norm.item() == pytest.approx(norm.item(), rel=2e-5)


def test_a_killed_run_resumes_to_the_same_numbers_with_its_index_built_again(raw, tmp_path):
    """Every loss, gradient norm and hash of both stages, and the final weights."""
    whole = training.write_config(training.changed(raw, job={"name": "whole"}), tmp_path / "whole.toml")
    broken = training.write_config(training.changed(raw, job={"name": "broken"}), tmp_path / "broken.toml")
    done = train(whole)
    assert done.status == 0, done.output
    assert "packs documents into sequences of 64 tokens" in done.output
    killed = train(broken, fault=Fault("titan_cpt.train:Trainer.train_step", call=17))
    assert killed.status == -9, killed.output
    assert "packs documents" not in killed.output, "the first run's index is used"
    shutil.rmtree(tmp_path / "cache")
    resumed = train(broken)

    assert resumed.status == 0, resumed.output
    assert training.numbers_of(tmp_path / "broken") == training.numbers_of(tmp_path / "whole")
    assert training.same_bits(
        *(training.tensors_of(tmp_path / name / "german" / "step-00000010") for name in ("broken", "whole"))
    )


def test_a_signal_while_documents_are_packed_stops_the_run_at_once(raw, tmp_path):
    """Nothing half-written stays in the cache, and the same command trains."""
    config = training.write_config(raw, tmp_path / "c.toml")
    signaled = Fault("titan_cpt.data.packing.packed_documents:write_index", number=signal.SIGTERM)
    stopped = train(config, fault=signaled)
    left = [path.suffix for path in (tmp_path / "cache" / "packing").iterdir()]
    resumed = train(config)

    assert stopped.status == 75, stopped.output
    assert stopped.output.endswith("stopped by SIGTERM before training: the same command resumes\n")
    assert left == [".lock"]
    assert resumed.status == 0, resumed.output


def test_a_run_does_not_resume_with_another_packing_or_other_borders(raw, data, tmp_path):
    tokens = TokenStream([data / "en"]).read(0, 4000)
    borders = [*range(0, 4000, 50), 4000]
    write_pair(tmp_path / "en", np.diff(borders), tokens)
    raw["stages"] = [{"name": "only", "dataset": "en", "steps": 2, "lr": {"schedule": "constant", "max": 1e-3}}]
    raw["datasets"] = {"en": {"train": str(tmp_path / "en"), "packing": "best_fit"}}
    config = training.write_config(raw, tmp_path / "c.toml")
    assert train(config).status == 0
    other_packing = train(config, "--datasets.en.packing", "concat")
    borders[7] += 1
    write_pair(tmp_path / "en", np.diff(borders), tokens)
    other_borders = train(config)

    assert other_packing.status == other_borders.status == 2
    assert "packing.en: best_fit -> not set" in other_packing.output
    assert "was trained with other data than the config names now" in other_borders.output


def test_the_plan_counts_packed_sequences_and_writes_nothing(raw, tmp_path, capsys):
    config = str(training.write_config(raw, tmp_path / "c.toml"))
    printed = []
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit, match="0"):
            main(["plan", config, *options])
        printed.append(capsys.readouterr().out)
    text = " ".join(printed[0].split())
    found = json.loads(printed[1])["packing"]

    assert "packing: en, 67 documents in 65 sequences of 64, 96.15% full; 41.79% of the documents are longer" in text
    english, german = found
    assert (english["source"], english["seq_len"], german["source"]) == ("en", 64, "de")
    assert english["tokens"] == 4000
    assert english["fill"] == 4000 / (english["sequences"] * 64)
    assert english["targets"] == 4000 - english["documents"]
    assert not (tmp_path / "cache").exists()
