"""Loss on fixed windows, by hand: which windows, nats per token, bits per byte, and no trace left in the model."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from titan_cpt.data.documents import DocumentSettings
from titan_cpt.data.formats.indexed import TokenStream
from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer
from titan_cpt.distributed.device_mesh import build_mesh
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.errors import DataError
from titan_cpt.models.gpt_neox.model import GPTNeoX
from titan_cpt.models.registry import named_size
from titan_cpt.training.forward_backward import SingleStageRunner
from titan_cpt.training.validation import ValidationWindows, Validator

SEQ_LEN, WINDOWS = 8, 23
ONE = build_mesh(ProcessInfo(0, 1, torch.device("cpu")), ParallelDims())


@pytest.fixture
def tokens():
    """Bytes with an end of document now and then; three more than 23 windows need."""
    ids = np.random.default_rng(5).integers(0, 256, size=SEQ_LEN * WINDOWS + 1 + 3)
    ids[::11] = 256
    return ids


@pytest.fixture
def stream(tmp_path, tokens):
    """The tokens as a stream, in one document."""
    with IndexedWriter(tmp_path / "held-out", 257) as writer:
        writer.add_document(tokens)
    return TokenStream([tmp_path / "held-out"], 257)


@pytest.fixture(scope="module")
def model():
    """The debug model with its initial weights."""
    model = GPTNeoX(named_size("gpt_neox", "debug", 257))
    model.init_weights(0)
    return model


def validator_of(stream, *, sequences=7, local_batch=2, seq_len=SEQ_LEN, further=None):
    """Of a run with the stage "usual", and further stages with windows of their own."""
    windows = ValidationWindows(seq_len, local_batch)
    by_stage = {"usual": windows, **(further or {})}
    lengths = load_tokenizer("bytes").token_byte_lengths()
    return Validator({"x": stream}, lengths, sequences=sequences, windows=windows, by_stage=by_stage, mesh=ONE)


def test_the_loss_is_that_of_the_windows_by_hand(model, stream, tokens):
    """Seven of 23 windows are 1, 4, 8, 11, 14, 18, 21: (2p + 1) * 23 / 14 rounded down. A window is nine tokens."""
    rows = np.stack([tokens[w * 8 : w * 8 + 9] for w in (1, 4, 8, 11, 14, 18, 21)])
    inputs, targets = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
    with torch.no_grad():
        mean = F.cross_entropy(model(inputs).double().flatten(0, 1), targets.flatten()).item()
    target_bytes = int((targets != 256).sum())
    found = validator_of(stream).measure(SingleStageRunner(model, ONE), "usual")["x"]

    assert target_bytes < 56
    assert found.nats_per_token == pytest.approx(mean, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(mean * 56 / math.log(2) / target_bytes, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)


@pytest.mark.parametrize("local_batch", [1, 2, 3, 7, 64])
def test_the_size_of_a_pass_does_not_change_the_loss(model, stream, local_batch):
    """Seven windows, in forward passes of which the last is often smaller."""
    alone = validator_of(stream, local_batch=1).measure(SingleStageRunner(model, ONE), "usual")["x"]
    found = validator_of(stream, local_batch=local_batch).measure(SingleStageRunner(model, ONE), "usual")["x"]

    assert found.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-6)


def test_measuring_twice_gives_the_same_bits_and_leaves_no_trace(model, stream):
    """No gradient, no change of a weight, no change of the random numbers."""
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    random = torch.get_rng_state()
    first, second = (validator_of(stream).measure(SingleStageRunner(model, ONE), "usual")["x"] for _ in range(2))

    assert first == second
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(random, torch.get_rng_state())


def test_the_loss_of_a_uniform_model_is_the_log_of_the_vocabulary_size(stream):
    """A head of zeros: log 384 nats for each token, whatever the text."""

    class Nothing(nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, 384)

    assert validator_of(stream).measure(SingleStageRunner(Nothing(), ONE), "usual")[
        "x"
    ].nats_per_token == pytest.approx(math.log(384), rel=1e-6)


def test_text_without_a_byte_has_no_bits_per_byte(model, tmp_path):
    """Nothing but ends of documents."""
    with IndexedWriter(tmp_path / "empty", 257) as writer:
        writer.add_document(np.full(33, 256))
    found = validator_of(TokenStream([tmp_path / "empty"], 257)).measure(SingleStageRunner(model, ONE), "usual")["x"]

    assert math.isfinite(found.nats_per_token)
    assert math.isnan(found.bits_per_byte)


def test_a_validation_set_shorter_than_a_sequence_is_refused_before_training(tmp_path):
    """It cannot be measured; the message says which and why. One window is enough to measure."""
    with IndexedWriter(tmp_path / "short", 257) as writer:
        writer.add_document(np.arange(8))
    stream = TokenStream([tmp_path / "short"], 257)

    with pytest.raises(DataError, match=r"datasets.x.validation: 8 tokens are fewer than one sequence of 8 \+ 1"):
        validator_of(stream, seq_len=8)
    validator_of(stream, seq_len=7)


MASKED = DocumentSettings(256, mask=True, positions=False)
RESTARTED = DocumentSettings(256, mask=False, positions=True)


@pytest.mark.parametrize(
    ("own", "usual", "label"),
    [
        (ValidationWindows(8, 4), ValidationWindows(8, 1), "x"),
        (ValidationWindows(16, 4), ValidationWindows(8, 4), "x@16"),
        (ValidationWindows(8, 4, MASKED), ValidationWindows(8, 4), "x@8-masked"),
        (ValidationWindows(8, 4), ValidationWindows(8, 4, MASKED), "x@8-unmasked"),
        (ValidationWindows(16, 4, MASKED), ValidationWindows(8, 4, MASKED), "x@16"),
        (ValidationWindows(8, 4, RESTARTED), ValidationWindows(8, 4), "x@8-document-positions"),
    ],
)
def test_a_label_names_what_differs_from_the_windows_of_the_run(own, usual, label):
    """The length always, once anything differs; the batch size never."""
    assert own.label("x", usual) == label


def test_a_stage_of_another_length_is_measured_on_windows_of_its_own_too(model, stream, tokens):
    """The loss on the run's windows keeps its bits; that on longer ones is the mean over the same text by hand."""
    validator = validator_of(stream, further={"long": ValidationWindows(4 * SEQ_LEN, 3)})
    runner = SingleStageRunner(model, ONE)
    usual, long = (validator.measure(runner, stage) for stage in ("usual", "long"))
    rows = torch.from_numpy(np.stack([tokens[32 * k : 32 * k + 33] for k in range(5)]))
    with torch.no_grad():
        expected = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    assert validator.labels("usual") == ["x"]
    assert validator.labels("long") == ["x", "x@32"]
    assert long["x"] == usual["x"]
    assert long["x@32"].nats_per_token == pytest.approx(expected.item(), rel=1e-5)
    assert validator.identities["x"] == validator_of(stream).identities["x"] != validator.identities["x@32"]


def test_a_dataset_shorter_than_a_window_of_a_stage_is_measured_on_those_of_the_run_only(model, stream):
    """187 + 1 tokens; the reason is known."""
    validator = validator_of(stream, further={"long": ValidationWindows(188, 1)})

    assert list(validator.measure(SingleStageRunner(model, ONE), "long")) == ["x"]
    assert validator.lacking == {"x@188": "datasets.x.validation: 188 tokens are fewer than one sequence of 188 + 1"}
    assert not validator_of(stream, further={"long": ValidationWindows(187, 1)}).lacking


def test_batches_for_a_metric_have_each_window_once_and_ignore_the_filling(stream, tokens):
    """Seven windows in batches of two: the eighth row repeats a window, and its targets do not count."""
    validator = validator_of(stream)
    inputs, targets = (torch.cat(parts) for parts in zip(*validator.batches("x"), strict=True))
    counted = (targets != -100).all(dim=1)

    assert len(inputs) == 8
    assert counted.tolist() == [True] * 7 + [False]
    assert (targets[7] == -100).all()
    assert len({tuple(row.tolist()) for row in inputs[:7]}) == 7
    assert inputs[7].tolist() == inputs[0].tolist()
    assert (inputs[:7, 1:] == targets[:7, :-1]).all()
