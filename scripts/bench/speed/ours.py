"""titan_cpt as one of the compared trainers: its model and train_step. Also writes the inputs that all trainers share.

prepare   write weights (Hugging Face's names) and batches for all trainers, then multiply matrices on request: the
          reference for MFU
otherwise take training steps on request (serve.py)

With PYTHONPATH set to another checkout of titan_cpt, that build runs.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import serve

wanted = serve.arguments()

import numpy as np  # noqa: E402  # after the allocator setting
import tomli_w  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

import titan_cpt  # noqa: E402
from titan_cpt.common.process_settings import keep_freed_memory  # noqa: E402
from titan_cpt.common.signals import StopRequest  # noqa: E402
from titan_cpt.config.load import load_config  # noqa: E402
from titan_cpt.data.formats.indexed_writer import IndexedWriter  # noqa: E402
from titan_cpt.distributed.process_group import init_process_group  # noqa: E402
from titan_cpt.errors import TitanError  # noqa: E402
from titan_cpt.models.huggingface_weights import hub_names  # noqa: E402
from titan_cpt.train import Trainer  # noqa: E402
from titan_cpt.training.build import build  # noqa: E402
from titan_cpt.training.metrics import peak_flops  # noqa: E402
from titan_cpt.training.stage_start import begin_stage  # noqa: E402

folder, shape, device = Path(wanted["folder"]), wanted["shape"], wanted["device"]
DOCUMENT = 2000


def config_file() -> Path:
    """Write the config, and the tokens beside it if they do not exist."""
    prefix = folder / "tokens"
    if not prefix.with_suffix(".idx").exists():
        rng = np.random.default_rng(0)
        tokens = wanted["steps"] * wanted["batch"] * wanted["seq_len"] + 1
        with IndexedWriter(prefix, shape["vocab_size"]) as writer:
            for _ in range(max(600, math.ceil(1.1 * tokens / DOCUMENT))):
                # Zipf's law, so that there is something to learn
                writer.add_document((rng.zipf(1.3, size=DOCUMENT) % 256).tolist())
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


def main() -> None:
    """Build the trainer; prepare or train."""
    if device == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        serve.decline("failed", f"torch {torch.__version__} finds no CUDA device")
    if wanted["allocator"]:
        keep_freed_memory()
    source = wanted["source"]
    if source and not Path(titan_cpt.__file__).is_relative_to(source):
        serve.decline("failed", f"titan_cpt comes from {Path(titan_cpt.__file__).parent}, not from {source}")
    serve.wait_for_load()
    with StopRequest() as stop:
        if wanted["name"] == "prepare":
            facts = prepare(*begun(stop))
            gc.collect()
            serve.say(**facts, **serve.release(device))
            multiply()
        else:
            train(*begun(stop))


def begun(stop: StopRequest) -> tuple[Trainer, Any]:
    """The trainer at the start of its stage."""
    config = load_config(config_file(), list(wanted["overrides"].items()))
    run = folder / config.job.name
    run.mkdir(exist_ok=True)
    trainer, _ = build(Trainer, config, init_process_group(), run, stop)
    stage = trainer.plan.stages[0]
    begin_stage(trainer, stage)
    return trainer, stage


def train(trainer: Trainer, stage: Any) -> None:
    """Take steps on request. After the last step of the stage its batches come again."""
    loader = trainer.open_loader(stage, 0)

    def step(number: int) -> Tensor:
        nonlocal loader
        if number and number % stage.steps == 0:
            loader = trainer.open_loader(stage, 0)
        # A clone, because a CUDA graph writes every step's loss into the same tensor.
        return trainer.train_step(loader, stage, number % stage.steps).loss.clone()

    gc.disable()  # as train_stage does
    serve.serve(step, device)


def prepare(trainer: Trainer, stage: Any) -> dict[str, Any]:
    """Write the shared inputs; returns what the plan and torch know of the shape and the machine."""
    names = hub_names(trainer.plan.spec)
    weights = {names[name]: value.detach().cpu().clone() for name, value in trainer.model.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    reader = trainer.readers[stage.name]
    np.save(
        folder / "batches.npy",
        np.stack([reader.read(trainer.plan.batch(stage, step)).tokens for step in range(wanted["steps"])]),
    )
    machine = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        machine |= {"name": about.name, "memory_gib": about.total_memory / serve.GIB}
    peak = peak_flops(trainer.process.device)
    return {
        "machine": machine,
        "flops_per_token": trainer.plan.spec.flops_per_token(wanted["seq_len"]),
        "parameters": sum(value.numel() for value in weights.values()),
        "datasheet_flops": peak if math.isfinite(peak) else None,  # JSON has no NaN
    }


def multiply() -> None:
    """Multiply matrices on request: the reference for MFU."""
    serve.wait_for_load()
    dtype, size = torch.bfloat16 if wanted["precision"] == "bfloat16" else torch.float32, wanted["product"]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    serve.serve(lambda _: (a @ b)[0, 0], device)


try:
    main()
except TitanError as error:
    serve.decline("not supported", str(error).replace(f"{folder}/", ""))
except torch.OutOfMemoryError as error:
    serve.decline("out of memory", str(error).splitlines()[0])
