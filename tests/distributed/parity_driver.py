"""Run under torchrun: several runs of the real trainer, one after another, inside one process group.

`parity_driver.py JSON`: the file holds a list of overrides by dotted key, one a run; "toml" names its base, "seal_s"
holds every manifest back by that many seconds.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titan_cpt.checkpoint import manifest
from titan_cpt.config.load import load_config
from titan_cpt.distributed.process_group import destroy_process_group, init_process_group
from titan_cpt.train import run_with_process_group


@contextmanager
def slow_seals(seconds: float) -> Iterator[None]:
    """Each manifest takes `seconds` longer to write, as those of large models do."""
    write = manifest.write

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return write(*args, **kwargs)

    manifest.write = slowly
    try:
        yield
    finally:
        manifest.write = write


def main(runs: Path) -> None:
    """Train every run; one that fails on any rank ends the process, since its peers would wait for ever."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ranks = init_process_group()
    try:
        for overrides in json.loads(runs.read_text()):
            toml = Path(f"{overrides.pop('toml', 'gpt_neox')}.toml")
            seal_s = float(overrides.pop("seal_s", 0))
            began = time.perf_counter()
            try:
                with slow_seals(seal_s):
                    run_with_process_group(ranks, load_config(toml, list(overrides.items())))
            except BaseException:
                print(f"FAILED {overrides['job.name']} on rank {ranks.rank}\n{traceback.format_exc()}", file=sys.stderr)
                raise
            if ranks.rank == 0:
                print(f"ran {overrides['job.name']} in {time.perf_counter() - began:.1f} s", flush=True)
            if dist.is_initialized():
                dist.barrier()
    finally:
        destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
