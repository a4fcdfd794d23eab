"""titan_cpt as one of the compared trainers: its model and train_step. Also writes the inputs that all trainers share.

prepare   write weights (Hugging Face's names) and batches for all trainers
otherwise take training steps on request (serve.py)
"""

from __future__ import annotations

from pathlib import Path

import serve

wanted = serve.arguments()

import numpy as np  # noqa: E402  # after the allocator setting
import tomli_w  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from titan_cpt.common.allocator import keep_freed_memory  # noqa: E402
from titan_cpt.common.signals import StopRequest  # noqa: E402
from titan_cpt.config.load import load_config  # noqa: E402
from titan_cpt.data.formats.indexed_writer import IndexedWriter  # noqa: E402
from titan_cpt.distributed.process_group import init_process_group  # noqa: E402
from titan_cpt.models.huggingface_weights import hub_names  # noqa: E402
from titan_cpt.train import Trainer  # noqa: E402
from titan_cpt.training.build import build  # noqa: E402
from titan_cpt.training.stage_start import begin_stage  # noqa: E402

folder, shape = Path(wanted["folder"]), wanted["shape"]
torch.set_num_threads(1)


def config_file(compiled: bool) -> Path:
    """Write the config, and the tokens beside it if they do not exist."""
    prefix = folder / "tokens"
    if not prefix.with_suffix(".idx").exists():
        rng = np.random.default_rng(0)
        with IndexedWriter(prefix, shape["vocab_size"]) as writer:
            for _ in range(600):
                # Zipf's law, so that there is something to learn
                writer.add_document((rng.zipf(1.3, size=2000) % 256).tolist())
    raw = {
        "job": {"name": f"{wanted['name']}", "output_dir": str(folder)},
        "model": {"family": wanted["family"], "size": "mini", **shape},
        "datasets": {"text": {"train": str(prefix)}},
        "training": {
            "global_batch_size": wanted["batch"],
            "local_batch_size": wanted["batch"],
            "seq_len": wanted["seq_len"],
            "mixed_precision_param": wanted["precision"],
        },
        "compile": {"enable": compiled},
        "metrics": {"enable_tensorboard": False},
        "stages": [
            {
                "name": "race",
                "dataset": "text",
                "steps": wanted["steps"],
                "lr": {"schedule": "constant", "max": wanted["lr"]},
            }
        ],
    }
    path = folder / f"{wanted['name']}.toml"
    path.write_text(tomli_w.dumps(raw))
    return path


if wanted["allocator"]:
    keep_freed_memory()
config = load_config(config_file(wanted["compiled"]))
run = folder / config.job.name
run.mkdir(exist_ok=True)
with StopRequest() as stop:
    trainer, _ = build(Trainer, config, init_process_group(), run, stop)
    stage = trainer.plan.stages[0]
    begin_stage(trainer, stage)
    if wanted["name"] == "prepare":
        names = hub_names(trainer.plan.spec)
        weights = {names[name]: value.detach().clone() for name, value in trainer.model.state_dict().items()}
        save_file(weights, folder / "weights.safetensors")
        np.save(
            folder / "batches.npy",
            np.stack([trainer.reader.read(trainer.plan.batch(stage, step)) for step in range(wanted["steps"])]),
        )
        serve.say(flops_per_token=trainer.plan.spec.flops_per_token(wanted["seq_len"]))
    else:
        loader = trainer.open_loader(stage, 0)
        serve.serve(lambda step: trainer.train_step(loader, stage, step).loss)
