"""Sequence lengths in which a run reads each dataset, and the config keys that set them."""

from __future__ import annotations

from titan_cpt.config.schema import Config

_USUAL = "training.seq_len"


def sequence_lengths(config: Config) -> dict[str, dict[int, str]]:
    """The lengths in which sequences of each dataset are drawn, in tokens, with the dotted key that sets each of them.

    A stage draws sequences of its own length from its datasets, and from replayed ones that no earlier stage trains on;
    what was trained on is replayed in parts of the trained sequences. A dataset that no stage draws from has the length
    of [training].
    """
    usual = config.training.seq_len
    lengths: dict[str, dict[int, str]] = {name: {} for name in config.datasets}
    trained: set[str] = set()
    for stage in config.stages:
        replayed = (stage.replay.from_ or ()) if stage.replay else ()
        key = _USUAL if stage.seq_len in (None, usual) else f"stages.{stage.name}.seq_len"
        for name in {*stage.dataset, *(name for name in replayed if name not in trained)}:
            lengths[name].setdefault(stage.seq_len or usual, key)
        trained |= {*stage.dataset}
    return {name: of or {usual: _USUAL} for name, of in lengths.items()}
