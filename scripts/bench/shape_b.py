"""Shapes of speed/race.py as a config on random tokens, for the benchmarks of the trainer around the step."""

SHAPES = {
    "B": {"layers": 8, "width": 384, "heads": 6, "mlp_width": 1536, "vocab_size": 8192, "seq_len": 512},
    "G405": {"layers": 24, "width": 1024, "heads": 16, "mlp_width": 4096, "vocab_size": 50304, "seq_len": 2048},
}
HEAD = """
[job]
name = "bench"
output_dir = "{folder}"
[model]
family = "gpt_neox"
size = "debug"
layers = {layers}
width = {width}
heads = {heads}
mlp_width = {mlp_width}
vocab_size = {vocab_size}
[datasets.noise]
train = "{folder}/noise"
[training]
global_batch_size = 8
local_batch_size = 8
seq_len = {seq_len}
[checkpoint]
interval = {interval}
"""
STAGE = """
[[stages]]
name = "stage-{number}"
dataset = "noise"
steps = {steps}
lr = {{ schedule = "constant", max = 1e-3 }}
"""
