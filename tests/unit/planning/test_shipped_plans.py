"""Every shipped config still trains what it did: the recipe's fingerprint, and the sequences of its batches."""

import hashlib
from pathlib import Path

import pytest

from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import DataInventory, training_files, validation_files
from titan_cpt.planning.parallel import min_world_size
from titan_cpt.planning.planner import make_plan

CONFIGS = Path(__file__).parents[3] / "train_configs"

TRAINED = {  # "fingerprint batches", computed with commit 3848756, except four that are newer
    "10b_german": "609b523d 82311be1",
    "10b_pile": "dbe80016 24b3dba7",
    "10b_pile_to_german": "f384d834 cabd7671",
    "10b_pile_to_german_replay": "f384d834 cabd7671",
    "10b_pile_to_slimpajama": "bf504ba3 ae96f366",
    "10b_pile_to_slimpajama_replay": "bf504ba3 ae96f366",
    "10b_slimpajama": "d1d47c34 4e986e28",
    "10b_union_pile_german": "1ff1bfdd 93d9fb08",
    "10b_union_pile_slimpajama": "0ec29b49 45da81e6",
    "405m_german": "617d91a6 82311be1",
    "405m_iid_splits_average": "530b7a39 40dedf52",
    "405m_iid_splits_cosine": "7080262e 40dedf52",
    "405m_iid_splits_infinite_cosine": "530b7a39 40dedf52",
    "405m_iid_splits_infinite_inv_sqrt": "13028d66 40dedf52",
    "405m_pile": "cb2c5b1d 24b3dba7",
    "405m_pile_to_german": "9211d6a0 cabd7671",
    "405m_pile_to_german_constant": "538888f8 a9994b05",
    "405m_pile_to_german_lr": "538888f8 a9994b05",
    "405m_pile_to_german_replay": "9211d6a0 cabd7671",
    "405m_pile_to_german_warmup": "538888f8 a9994b05",
    "405m_pile_to_pile_lr": "56948f07 fbd96cf7",
    "405m_pile_to_slimpajama": "ef3323c5 ae96f366",
    "405m_pile_to_slimpajama_constant": "d8f2506e 7377660c",
    "405m_pile_to_slimpajama_domains": "4b673917 50a9490c",
    "405m_pile_to_slimpajama_lr": "d8f2506e 7377660c",
    "405m_pile_to_slimpajama_replay": "ef3323c5 ae96f366",
    "405m_pile_to_slimpajama_splits": "94289b3c b396de87",
    "405m_pile_to_slimpajama_warmup": "d8f2506e 7377660c",
    "405m_slimpajama": "71b08942 4e986e28",
    "405m_slimpajama_infinite": "71b08942 4e986e28",
    "405m_union_pile_german": "aa37bdab 93d9fb08",
    "405m_union_pile_slimpajama": "36b6d082 45da81e6",
    "410m_pythia_to_8k": "3fc56583 58ff9127",
    "410m_pythia_to_german_vocabulary": "d9995889 4a99525b",
    "olmo3_7b_to_german": "fef34c6e 5800de0a",
    "quickstart": "f5c31b6a 99aa3fd5",
    "quickstart_long": "ec29a8e6 9e89f3db",
}


def plan_of(path):
    """The plan with 300 billion tokens in every source and 50,277 ids."""
    config = load_config(path)
    tokens = dict.fromkeys((source for source, _ in training_files(config)), 300_000_000_000)
    validation = dict.fromkeys((source for source, _ in validation_files(config)), 1_000_000)
    vocab_size, base = (50_277, None) if config.tokenizer.extend is None else (58_469, 50_277)
    inventory = DataInventory(tokens=tokens, vocab_size=vocab_size, validation_tokens=validation, base_vocab_size=base)
    return make_plan(config, inventory, min_world_size(config))


def described(path):
    """Fingerprint, and a hash of source, ordinal and kind of every sequence in batches of all stages."""
    plan = plan_of(path)
    digest = hashlib.sha256()
    for stage in plan.stages:
        for step in (0, 1, stage.steps // 3, stage.steps - 1):
            for draw in plan.batch(stage, step):
                digest.update(f"{draw.source} {draw.ordinal} {draw.replayed}\n".encode())
    return f"{plan.fingerprint} {digest.hexdigest()[:8]}"


@pytest.mark.parametrize("name", TRAINED)
def test_a_shipped_config_trains_what_it_did(name):
    """Fingerprints and batches are those of the last version without lengths and batches of stages."""
    assert described(CONFIGS / f"{name}.toml") == TRAINED[name]


def test_every_shipped_config_is_in_the_table():
    """A new config gets a line with the values that it has then."""
    assert TRAINED.keys() == {path.stem for path in CONFIGS.glob("*.toml")}
