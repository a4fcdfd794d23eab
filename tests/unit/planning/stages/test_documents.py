"""Document mask and positions of a stage: which keys count, in the recipe, in FLOPs, and what the plan says of them."""

from fractions import Fraction

import pytest
import training
from plans import stage

from titan_cpt.data.document_sample import DocumentSample
from titan_cpt.data.inventory import DataInventory, take_inventory
from titan_cpt.data.mixture import Leaf, huffman_tree
from titan_cpt.errors import PlanError
from titan_cpt.planning.plan_json import plan_as_json
from titan_cpt.planning.planner import make_plan
from titan_cpt.planning.stages.documents import attended_spans

MASKED = ("seq_len = 16\n", "seq_len = 16\ndocument_mask = true\n")


def test_a_stage_replaces_the_keys_of_training(head, make):
    """By default there are neither; the recipe has only what is true."""
    text = head.replace(*MASKED) + stage("a", "pile", 10) + stage("b", "pile", 10, document_mask="false")
    text += stage("c", "pile", 10, document_positions="true")
    plan = make(text)
    recipe = plan.recipe_until(2)

    assert [(one.document_mask, one.document_positions) for one in plan.stages] == [
        (True, False),
        (False, False),
        (True, True),
    ]
    assert {key for key in recipe if "document" in key} == {
        "stages.a.document_mask",
        "stages.c.document_mask",
        "stages.c.document_positions",
    }
    plain = make(head + stage("a", "pile", 10))
    assert not [key for key in plain.recipe_until(0) if "document" in key]
    assert make(head + stage("a", "pile", 10, document_mask="false")).fingerprint == plain.fingerprint


def test_the_span_of_a_mixture_weighs_its_sources(make, head):
    """A quarter of the sequences in documents of 4 tokens, three quarters unknown: (4 + 3 x 16) / 4 = 13 of 16."""
    plan = make(head + stage("a", "pile", 10))
    tree = huffman_tree({Leaf("known", replayed=False): Fraction(1), Leaf("unknown", replayed=False): Fraction(3)})
    sample = DocumentSample((4,), (8,), sequences=2, available=2)
    inventory = training_inventory({("known", 16): sample})

    assert attended_spans(inventory, plan.spec, tree, 16) == pytest.approx([13.0] * plan.spec.layers, abs=1e-5)


def training_inventory(documents):
    return DataInventory(tokens={}, vocab_size=257, documents=documents)


def masked_plan(tmp_path, **keys):
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["training"] |= {"seq_len": 128, **keys}
    config = training.config_of(raw)
    return make_plan(config, take_inventory(config))


def test_flops_of_a_masked_stage_are_the_sum_over_documents(tmp_path):
    """The mask saves 12 x layers x attention width x (128 - mean length of a token's document) per token."""
    plain, masked = (masked_plan(tmp_path, document_mask=mask) for mask in (False, True))
    lengths, cut = [], []
    ids = (tmp_path / "en.bin").read_bytes()
    values = [int.from_bytes(ids[at : at + 2], "little") for at in range(0, len(ids), 2)]
    for begin in range(0, (len(values) - 1) // 128 * 128, 128):
        length = 0
        for value in values[begin : begin + 128]:
            length += 1
            if value == training.END_OF_DOCUMENT:
                lengths.append(length)
                length = 0
        cut.append(length)
    documents = [length for length in [*lengths, *cut] if length]
    span = sum(length**2 for length in documents) / sum(documents)
    first, masked_first = plain.stages[0], masked.stages[0]
    spec = plain.spec
    saved = 12 * spec.layers * spec.attention_width * (128 - span)

    assert masked_first.attended_span == pytest.approx(span)
    assert first.flops_per_token - masked_first.flops_per_token == pytest.approx(saved)
    entry = plan_as_json(masked)["stages"][0]
    assert (entry["document_mask"], entry["attended_span"]) == (True, masked_first.attended_span)
    assert entry["flops"] == pytest.approx(masked_first.flops_per_token * masked_first.tokens)


def test_the_plan_says_what_was_read(tmp_path):
    """All sequences of both languages; nothing about documents in a plan without a mask."""
    notes = [note for note in masked_plan(tmp_path, document_mask=True).notes if "document_mask" in note]

    assert len(notes) == 2
    assert "a token attends to a document of 52 tokens on average" in notes[0]
    assert "(read: all 31 sequences of en)" in notes[0]
    assert "(read: all 31 sequences of de, all 31 sequences of en)" in notes[1]
    assert not [note for note in masked_plan(tmp_path, document_positions=True).notes if "document_mask" in note]


def test_data_without_ends_of_documents_is_noted(tmp_path, head, make):
    """Files that do not exist count with whole sequences, and documents that never end make the mask useless."""
    plan = make(head.replace(*MASKED) + stage("a", "pile", 10))
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["training"] |= {"seq_len": 8, "document_mask": True}
    raw["stages"] = raw["stages"][:1]
    endless = tmp_path / "en.bin"
    endless.write_bytes(b"a\0" * (endless.stat().st_size // 2))
    config = training.config_of(raw)
    notes = make_plan(config, take_inventory(config)).notes

    assert [note for note in plan.notes if "the documents of pile are not known before training" in note]
    assert plan.stages[0].attended_span == 16
    assert [note for note in notes if "no document ends in all" in note and "has no effect there" in note]


def test_ring_attention_has_no_mask(tmp_path):
    """The message names the key of the mask."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["training"] |= {"document_mask": True}
    ring = {"context_parallel_degree": 2, "context_parallel_method": "ring"}
    config = training.config_of(training.changed(raw, parallelism=ring))
    with pytest.raises(PlanError) as refusal:
        make_plan(config, take_inventory(config), 2)

    assert "torch's ring attention has no document mask (training.document_mask): use" in str(refusal.value)
