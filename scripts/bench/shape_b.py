"""Shape B of speed/race.py as a config on random tokens, for the benchmarks of the trainer around the step."""

HEAD = """
[job]
name = "bench"
output_dir = "{folder}"
[model]
family = "gpt_neox"
size = "debug"
layers = 8
width = 384
heads = 6
mlp_width = 1536
vocab_size = 8192
[datasets.noise]
train = "{folder}/noise"
[training]
global_batch_size = 8
local_batch_size = 8
seq_len = 512
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
