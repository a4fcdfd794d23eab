#!/usr/bin/env bash
# transformers 5.24.0, an OLMo 3 whose config.json has rope_theta other than 500,000, as 4.57.3 writes it: the layers with
# a sliding window get the base 500,000, without a warning; those with full attention get rope_theta.
#
# Olmo3Config.convert_rope_params_to_dict takes rope_theta out of the arguments for the first kind of layers, and takes it
# once more, with the default, for the second. 4.57.3 computes all layers with rope_theta, and 10,000 without that key,
# where 5.24.0 takes 500,000. The releases have 500,000.
#
# Output seen:
#   4.57.3: rope_theta 10000.0 for all layers; without the key 10000.0
#   5.24.0: full_attention 10000.0, sliding_attention 500000.0; without the key 500000.0
#
# Installs into a temporary folder. Exit status 0 if the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 4.57.3 5.24.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --no-input "transformers==$version"
  "$folder/$version/bin/python" - "$version" <<'PYTHON'
import sys

from transformers import Olmo3Config

config, without = Olmo3Config(rope_theta=10_000.0), Olmo3Config()
if sys.argv[1].startswith("5."):
    bases = {kind: config.rope_parameters[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention")}
    default = without.rope_parameters["full_attention"]["rope_theta"]
    print(f"5.24.0: {', '.join(f'{kind} {base}' for kind, base in bases.items())}; without the key {default}")
    assert bases == {"full_attention": 10_000.0, "sliding_attention": 500_000.0}
    assert default == 500_000.0
else:
    print(f"4.57.3: rope_theta {config.rope_theta} for all layers; without the key {without.rope_theta}")
    assert config.rope_theta == without.rope_theta == 10_000.0
PYTHON
done
