#!/usr/bin/env bash
# transformers 5.24.0, config.json with original_max_position_embeddings at the top level and in the rotary table.
#
# The table's value is read when the config is made, and the top level's replaces it when the model is built (every
# scaled rotary module calls standardize_rope_params once more). 4.57.3 ignores the top level. So one file with 16 in the
# table and 32 at the top level means other frequencies in the two versions, without a warning.
#
# Output seen:
#   5.24.0: 16 when the config is made, 32 once a model is built from it
#   4.57.3: 16
#
# Installs into a temporary folder. Exit status 0 if the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.3; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --no-input "transformers==$version"
  "$folder/$version/bin/python" - "$version" <<'PYTHON'
import sys

from transformers import LlamaConfig

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
config = LlamaConfig(max_position_embeddings=64, rope_scaling=YARN, original_max_position_embeddings=32)
first = config.rope_scaling["original_max_position_embeddings"]
if sys.argv[1].startswith("5."):
    config.standardize_rope_params()  # as _compute_yarn_parameters and _compute_llama3_parameters do
    second = config.rope_parameters["original_max_position_embeddings"]
    print(f"5.24.0: {first} when the config is made, {second} once a model is built from it")
    assert (first, second) == (16, 32)
else:
    print(f"4.57.3: {first}")
    assert first == 16
    assert config.original_max_position_embeddings == 32  # an attribute that nothing reads
PYTHON
done
