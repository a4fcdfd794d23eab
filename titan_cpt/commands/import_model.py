"""`titan-cpt import`: convert a Hugging Face model, or a checkpoint of another trainer, into one to start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command, positive_int
from titan_cpt.errors import ConfigError

TRAINERS = ("torchtitan", "megatron", "neox", "litgpt", "olmo-core")
"""The keys of `checkpoint.other_trainers.import_trained.READERS`, which imports torch."""


def add_import(subparsers: Subparsers) -> None:
    """The options of `import`."""
    summary = "convert a released model, or another trainer's weights"
    importing = add_command(
        subparsers,
        "import",
        _run,
        summary,
        details='A stage starts from the result with init = "checkpoint:OUT".',
        usage="SOURCE OUT [options]",
        example="titan-cpt import EleutherAI/pythia-70m checkpoints/pythia-70m\n"
        "titan-cpt import --from torchtitan out/step-1000 mine --config config.json",
    )
    importing.add_argument(
        "source",
        metavar="SOURCE",
        help="a model folder, or OWNER/NAME[@REVISION] on the hub; with --from, a checkpoint",
    )
    importing.add_argument("output", type=Path, metavar="OUT", help="the checkpoint folder to write")
    importing.add_argument(
        "--vocab-size",
        type=positive_int,
        metavar="ROWS",
        help="embedding rows (default: the model's); extra rows are dropped, new rows are the mean of all others",
    )
    trainer = importing.add_argument_group("a checkpoint of another trainer")
    trainer.add_argument("--from", dest="trainer", choices=TRAINERS, metavar="TRAINER", help=", ".join(TRAINERS))
    trainer.add_argument(
        "--config", type=Path, metavar="FILE", help="the trainer's config, or a TOML file with [model], for the model"
    )
    trainer.add_argument(
        "--tokenizer", metavar="bytes|PATH", help="the tokenizer of the weights, which later stages are compared with"
    )
    trainer.add_argument("--weights-only", action="store_true", help="do not import AdamW's moments and step count")


def _run(options: argparse.Namespace) -> int:
    only_with = {"--config": options.config, "--tokenizer": options.tokenizer, "--weights-only": options.weights_only}
    if options.trainer is None:
        given = [name for name, value in only_with.items() if value]
        if given:
            raise ConfigError(f"{given[0]} goes with --from TRAINER: a Hugging Face model's folder has all of it")
        from titan_cpt.checkpoint.hf_import import import_released

        import_released(options.source, options.output, vocab_size=options.vocab_size, log=print)
        return 0
    if options.vocab_size is not None:
        raise ConfigError("--vocab-size does not go with --from: the moments have rows for the trained vocabulary")
    from titan_cpt.checkpoint.other_trainers.import_trained import import_from_trainer
    from titan_cpt.checkpoint.other_trainers.trained_checkpoint import ImportRequest

    request = ImportRequest(Path(options.source), options.config, options.weights_only)
    import_from_trainer(options.trainer, request, options.output, tokenizer=options.tokenizer, log=print)
    return 0
