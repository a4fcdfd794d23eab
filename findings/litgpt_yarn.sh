#!/usr/bin/env bash
# litgpt 0.5.13, rope_adjustments with beta_fast and beta_slow (YaRN): the short wavelengths are scaled, not the long ones.
#
# YaRN (arXiv:2309.00071, section 3.2) keeps the frequencies of features that rotate at least beta_fast times within the
# original length, and divides by the factor those of features that rotate at most beta_slow times. build_rope_cache has
# the ramp between the two the other way round: it divides those that YaRN keeps, and keeps those that YaRN divides. No
# error, no warning. A model that was trained with YaRN elsewhere gets other angles; one that is extended with it sees
# unscaled angles in the features that do not complete a rotation within the original length.
#
# Output seen (head size 64, base 10,000, factor 4, original length 4,096; frequency with YaRN over the one without it):
#   feature           0      8     12     16     20     31
#   transformers  1.000  1.000  0.885  0.654  0.423  0.250
#   litgpt        0.250  0.250  0.365  0.596  0.827  1.000
#
# Installs into a temporary folder (2 GB). Exit status 0 if the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-input "torch==2.13.0"
"$folder/venv/bin/pip" install --quiet --no-input litgpt==0.5.13 transformers==4.57.3 requests
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
from litgpt import GPT, Config
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HEAD, BASE, FACTOR, LENGTH = 64, 10_000, 4.0, 4096
plain = BASE ** -(torch.arange(0, HEAD, 2) / HEAD)

shape = {"n_layer": 1, "n_head": 1, "n_embd": HEAD, "padded_vocab_size": 8, "block_size": LENGTH, "rope_base": BASE}
adjustments = {"factor": FACTOR, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": LENGTH}
model = GPT(Config(**shape, rotary_percentage=1.0, rope_adjustments=adjustments))
litgpt = torch.atan2(model.sin[1], model.cos[1])[: HEAD // 2] / plain  # the angle of position 1 is the frequency

yarn = {"rope_type": "yarn", "factor": FACTOR, "beta_fast": 32.0, "beta_slow": 1.0}
config = LlamaConfig(
    hidden_size=HEAD, num_attention_heads=1, rope_theta=BASE, max_position_embeddings=int(FACTOR * LENGTH),
    rope_scaling={**yarn, "original_max_position_embeddings": LENGTH},
)
transformers = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[0] / plain

shown = [0, 8, 12, 16, 20, 31]
print("feature     ", *(f"{feature:6}" for feature in shown))
for name, ratios in (("transformers", transformers), ("litgpt      ", litgpt)):
    print(name, *(f"{float(ratios[feature]):6.3f}" for feature in shown))

rotations = LENGTH * plain / (2 * torch.pi)
many, few = rotations >= 40, rotations <= 0.7  # outside of the ramp, whose ends are rounded to whole features
assert many.any() and few.any()
for ratios, kept, divided in ((transformers, many, few), (litgpt, few, many)):
    torch.testing.assert_close(ratios[kept], torch.ones(int(kept.sum())))
    torch.testing.assert_close(ratios[divided], torch.full((int(divided.sum()),), 1 / FACTOR))
torch.testing.assert_close(litgpt + transformers, torch.full((HEAD // 2,), 1 + 1 / FACTOR))
PYTHON
