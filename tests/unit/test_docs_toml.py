"""The TOML of docs/data.md and of two guides loads, and means what the pages say."""

import re
from pathlib import Path

from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import take_inventory
from titan_cpt.planning.plan import StageCheckpoint
from titan_cpt.planning.planner import make_plan

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page):
    return re.findall(r"^```toml\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def test_the_data_page_prepares_text_and_trains_its_tokenizer(write, one_stage):
    """The page's first tables, in a config that has no `german` of its own."""
    tables, *_ = blocks("data.md")
    config = load_config(write(one_stage.replace("german", "other") + tables))
    source = config.datasets["german"].source

    assert config.tokenizer.train.dataset == "german"
    assert (source.text, source.holdout) == (("raw/german/*.jsonl.zst",), 0.01)


def test_the_datasets_of_the_data_page_load(write, one_stage):
    """The tables of tokens that other programs made, beside a stage on another dataset."""
    _, tables, packed, *_ = blocks("data.md")
    config = load_config(write(tables.replace("datasets.pile", "datasets.other") + one_stage))

    assert [config.datasets[name].format for name in ("other", "web")] == ["presequenced", "megatron_order"]
    assert all(config.datasets[name].in_stored_order for name in ("other", "web"))
    config = load_config(write(packed.replace("datasets.german", "datasets.other") + one_stage))
    assert config.datasets["other"].packing == "best_fit"


def test_the_stage_of_the_models_page_extends_a_model(write, one_stage):
    """By the base that the page's message shows, in a model with Llama 3's base."""
    *_, stage = blocks("models.md")
    more = '\n[datasets.books]\ntrain = "data/books"\n'
    config = load_config(write(one_stage.replace('size = "debug"', 'size = "debug"\nrope_base = 5e5') + more + stage))
    first, long = make_plan(config, take_inventory(config)).stages

    assert f"RoPE: {first.spec.rope} -> {long.spec.rope}" in (DOCS / "models.md").read_text()
    assert (long.seq_len, long.batch_sizes.at(0)) == (65_536, 32)


def test_the_config_of_the_guides_is_one_file_that_grows(write):
    """The news starts before the annealing, with replay of both earlier datasets."""
    (first,), (appended,) = blocks("guides/released_model.md"), blocks("guides/new_data.md")
    before, after = (load_config(write(text)) for text in (first, first + appended))
    plan = make_plan(after, take_inventory(after), 8)
    german, news = plan.stages

    assert make_plan(before, take_inventory(before), 8).stages[0].recipe == german.recipe
    assert german.steps == 4769  # 10e9 / (1024 x 2048), rounded up: the checkpoint that is exported
    assert german.pre_anneal_step == 4292  # 0.9 of it: the checkpoint that guides/anneal.md anneals
    assert news.init == StageCheckpoint("german", german.pre_anneal_step)
    assert (news.lr_at(0), news.keep_optimizer) == (german.lr_at(german.pre_anneal_step - 1), True)
    assert {name for name, use in news.use_by_dataset.items() if use.replayed_tokens} == {"pile", "german"}
