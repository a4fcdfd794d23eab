"""What is published about releases: every fact has a source, and those that depend on each other agree."""

import pytest

from titan_cpt.models.registry import SIZES, SPECS
from titan_cpt.models.releases import Decay, Fact, Release, ReleaseStage, release_of_hub_name, release_of_size, releases

NOT_RELEASED = {"debug", "tiny", "mini", "405m", "10b"}  # for a CPU, and the paper's
STAGES = [(release, stage) for release in releases() for stage in release.stages]


def facts_in(model):
    """Every fact of a release or a stage, by name."""
    values = {name: getattr(model, name) for name in type(model).model_fields}
    return {name: value for name, value in values.items() if isinstance(value, Fact)}


def test_every_release_is_a_named_size_and_every_other_size_is_none():
    """The table and the sizes of the families name the same models."""
    named = {(family, size) for family, sizes in SIZES.items() for size in sizes if size not in NOT_RELEASED}

    described = [(release.family, size) for release in releases() for size in release.sizes]

    assert sorted(described) == sorted(named)


def test_every_fact_says_where_it_is_published():
    """A paper with its number, a file of a repository at a commit or tag, a page of the hub, or named documentation."""
    found = [fact.source for release, stage in STAGES for fact in facts_in(stage).values()]
    found += [fact.source for release in releases() for fact in (*facts_in(release).values(), *release.remarks)]

    assert len(found) > 200
    known = ("github.com/", "arXiv:", "huggingface.co/", "model card", "documentation")
    assert [source for source in found if not any(part in source for part in known)] == []


@pytest.mark.parametrize(("release", "stage"), STAGES, ids=lambda each: getattr(each, "size", None) or each.name)
def test_the_facts_of_a_stage_agree_with_each_other(release, stage):
    """LRs are ordered; the schedule gives the published LR of the last step, and steps x batch the published tokens."""
    peak, final = stage.peak_lr, stage.final_lr
    assert peak is None or 1e-6 < peak.value < 1e-2
    assert None in (peak, final) or 0 <= final.value <= peak.value
    assert stage.seq_len is None or stage.batch_tokens is None or stage.batch_tokens.value > stage.seq_len.value
    if stage.end is None or (step := stage.step_of(stage.end.value)) is None:
        return
    if stage.decay is not None and stage.decay.value.known_until is None:
        computed = stage.lr_at(step).value
        assert computed == pytest.approx(final.value, rel=2e-3, abs=1e-8)
    first = stage is release.stages[0]
    if first and stage.tokens is not None:
        assert step * stage.batch_tokens.value == pytest.approx(stage.tokens.value, rel=1e-3)


@pytest.mark.parametrize("release", releases(), ids=lambda each: each.size)
def test_the_facts_of_a_release_agree_with_its_model(release):
    """The tokenizer's ids fit the embedding's rows; hub names have an owner; `before_anneal` is a known checkpoint."""
    vocab, _ = SPECS[release.family].size_fields(release.size, {})

    assert release.tokenizer_size is None or vocab is None or release.tokenizer_size.value <= vocab
    assert all(name.count("/") == 1 for name in release.hub)
    assert all(release_of_hub_name(name) is release for name in release.hub)
    if release.before_anneal is not None:
        name, _, revision = release.before_anneal.value.partition("@")
        assert name in release.hub
        assert release.lr_of(revision).value > release.lr_of("main").value


def test_the_lr_of_a_pythia_checkpoint_is_that_of_gpt_neox_1_0():
    """By hand: a cosine to 0 over 143,000 steps after 1,430 of warm-up, never below a tenth of the peak."""
    release = release_of_size("gpt_neox", "410m")
    lr = {step: release.lr_of(f"step{step}").value for step in (715, 1_430, 72_930, 140_000, 143_000)}

    assert lr == pytest.approx({715: 1.5e-4, 1_430: 3e-4, 72_930: 1.5e-4, 140_000: 3e-5, 143_000: 3e-5})
    assert release.lr_of("main").value == 3e-5
    assert release.lr_of("step3000-of-another-run") is None
    assert release.tokens_until("step1000") == 2_097_152_000
    assert release.tokens_until("main") == 299_892_736_000
    assert release.tokens_until("other") is None


def stage_with(**more):
    """A stage of 100 steps with a peak of 1 and a warm-up of 10."""
    facts = {"peak_lr": 1.0, "warmup_steps": 10, **more}
    return ReleaseStage(name="x", **{name: Fact(value=value, source="s") for name, value in facts.items()})


def test_a_linear_decay_is_constant_before_it_and_reaches_its_end():
    """Half of the way down at half of the decay; unknown beyond `known_until`, and without a schedule."""
    decay = Decay(shape="linear", from_step=60, steps=40, to=0.0, known_until=90)
    stage = stage_with(decay=decay)

    assert [stage.lr_at(step).value for step in (5, 10, 60, 80)] == [0.5, 1.0, 1.0, 0.5]
    assert stage.lr_at(91) is None
    assert stage_with().lr_at(5) is None


def test_a_revision_is_found_by_the_pattern_of_its_stage():
    """With the number of the step, whatever the tokens; other names are none."""
    stage = stage_with(checkpoints="stage1-step{step}-tokens{tokens}B, every 1,000 steps")

    assert stage.step_of("stage1-step928646-tokens3896B") == 928_646
    assert stage.step_of("stage1-step928646") is None
    assert stage.step_of("stage2-step1-tokens1B") is None


def test_hub_names_are_found_in_any_case_and_others_are_not():
    """The hub ignores case; a fine-tuned model of another owner is not the release."""
    release = release_of_size("gpt_neox", "410m")

    assert release_of_hub_name("eleutherai/PYTHIA-410m") is release
    assert release_of_hub_name("EleutherAI/pythia-410m-deduped") is release
    assert release_of_hub_name("someone/pythia-410m") is None
    assert release_of_size("gpt_neox", "405m") is None


def test_a_context_extension_gives_the_weights_after_it_another_size():
    """A release of two sizes: revisions before the extension have the first, the end of the training has the last."""
    made = Release(
        family="x",
        size="short",
        hub=("a/b",),
        stages=(
            ReleaseStage(name="first", end=Fact(value="stage1", source="s"), tokens=Fact(value=90, source="s")),
            ReleaseStage(name="long", size="longer", tokens=Fact(value=10, source="s")),
        ),
    )

    assert made.sizes == ("short", "longer")
    assert [made.size_of(revision) for revision in ("stage1", "main", "odd")] == ["short", "longer", "short"]
    assert [made.revision_of(size) for size in made.sizes] == ["stage1", "main"]
    assert [made.tokens_until(revision) for revision in ("stage1", "main")] == [90, 100]
