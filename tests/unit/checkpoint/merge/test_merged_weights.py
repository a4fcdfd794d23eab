"""Weights of a merge by blocks: progress, and memory."""

from releases import SPECS, python
from torch import ones

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_release import weight_shapes
from titan_cpt.checkpoint.merge.inputs import open_input
from titan_cpt.checkpoint.merge.merged_weights import MergedWeights
from titan_cpt.checkpoint.merge.settings import merge_settings
from titan_cpt.checkpoint.weights_only import record_without_training, save_weights


def test_progress_adds_up(tmp_path):
    """The elements that are reported are those that were announced, with and without trimming."""
    spec = SPECS["llama"]
    shapes = weight_shapes(spec)
    record = record_without_training("made", spec.as_recipe())
    manifest.write(tmp_path, record, save_weights(spec, lambda name: ones(shapes[name]), tmp_path))
    one = open_input(str(tmp_path))
    for options in ({}, {"method": "ties", "has_base": True, "density": 0.5}):
        weights = MergedWeights([one, one], one, merge_settings(2, **options), block_elements=999)
        done = []
        weights.advance = done.append
        weights.find_thresholds()
        for name in shapes:
            weights.read(name)

        assert sum(done) == weights.total_elements


def test_a_merge_takes_the_memory_of_blocks_not_of_models(tmp_path):
    """Two models and a base of 52 MB merged by TIES in blocks of 1 MiB: memory grows by less than half of one."""
    code = f"""
import sys
from pathlib import Path
import torch
from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.merge.merge import merge
from titan_cpt.checkpoint.merge.settings import merge_settings
from titan_cpt.checkpoint.weights_only import record_without_training, save_weights
from titan_cpt.checkpoint.hf_release import weight_shapes
from titan_cpt.models.registry import named_size
folder = Path({str(tmp_path)!r})
spec = lambda layers: named_size("gpt_neox", "debug", 257, dict(layers=layers, width=512, heads=8, vocab_size=512))
def write(name, layers):
    shapes = weight_shapes(spec(layers))
    (folder / name).mkdir()
    sums = save_weights(spec(layers), lambda key: torch.randn(shapes[key]), folder / name)
    manifest.write(folder / name, record_without_training("made", spec(layers).as_recipe()), sums)
settings = merge_settings(2, method="ties", has_base=True)
def merged(names, out):
    names = [str(folder / name) for name in names]
    merge(names[1:], folder / out, settings, base=names[0], log=lambda line: None, block_elements=1 << 17)
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
for number in range(3):
    write(f"small-{{number}}", 1)
    write(f"large-{{number}}", 4)
merged([f"small-{{number}}" for number in range(3)], "first")  # all that is imported on the way, once
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
before = peak()
merged([f"large-{{number}}" for number in range(3)], "out")
print(peak() - before, 4 * spec(4).parameters)
"""
    done = python("-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr
    grown, model = (int(number) for number in done.stdout.split())

    assert grown < model / 2, (grown, model)
