"""Open the training data of every source: windows of a token stream, or packed documents."""

from __future__ import annotations

from collections.abc import Callable

from titan_cpt.config.schema import Config
from titan_cpt.data.formats.indexed import TokenStream
from titan_cpt.data.formats.token_files import open_source, resolve_paths
from titan_cpt.data.formats.token_source import TokenSource
from titan_cpt.data.inventory import source_table, training_files
from titan_cpt.data.packing.packed_documents import PackedDocuments
from titan_cpt.data.packing.packed_tokens import PackedTokens
from titan_cpt.data.sequence_lengths import sequence_lengths

TrainingSource = TokenSource | PackedTokens


def open_training_sources(
    config: Config, *, vocab_size: int, eod_id: int, log: Callable[[str], None]
) -> dict[str, TrainingSource]:
    """Open and check the training files of every source (`dataset` or `dataset.domain`).

    The packing indices of all sequence lengths in which the run reads a source are opened, or built, at once.

    Args:
        config: names the files and says how documents fill sequences.
        vocab_size: ids are in [0, vocab_size).
        eod_id: the end-of-document id.
        log: prints a line for the user while documents are packed.

    Raises:
        DataError: a file is missing or damaged, or contains an id outside the vocabulary.
    """
    lengths = sequence_lengths(config)
    sources: dict[str, TrainingSource] = {}
    for name, files in training_files(config):
        sources[name] = stream = open_source(files, vocab_size)
        if files.best_fit:
            assert isinstance(stream, TokenStream), "the config allows packing for token streams only"
            where = f"{source_table(name)}.train"
            documents = PackedDocuments(where, files, resolve_paths(files), eod_id)
            sources[name] = packed = PackedTokens(stream, documents, log=log)
            for seq_len in lengths[name.partition(".")[0]]:
                packed.windows(seq_len)
    return sources
