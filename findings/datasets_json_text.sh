#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1, pandas 3.1.1), JSON lines read with streaming=True: texts come back changed.
#
#   1. One number in a column of strings puts every string of the same 10 MiB piece into JSON's quotation marks, if an
#      earlier piece had only strings. Texts of other pieces are not changed. No error, no warning.
#   2. A file whose texts all look like dates gives datetime objects. As a later piece of a file that began with other
#      texts, it gives strings with a time of day that the file does not have.
#
# Output seen:
#   numbers: 30001 rows, 9358 strings in quotation marks, the first is row 20642
#   dates: datetime.datetime(2024, 1, 1, 0, 0)
#   dates after other texts: '2024-01-01 00:00:00'
#
# Installs into a temporary folder and writes its own input there. Exit status 0 if the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import datasets

datasets.disable_progress_bars()


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(name, content):
    Path(name).write_bytes(content)
    rows = datasets.load_dataset("json", data_files=name, split="train", streaming=True)
    return [row["text"] for row in rows]


texts = [f"text {number:05} " + "x" * 484 for number in range(30_000)]
found = read("numbers.jsonl", lines([*texts, 5]))
quoted = [number for number, text in enumerate(found) if str(text).startswith('"')]
print(f"numbers: {len(found)} rows, {len(quoted)} strings in quotation marks, the first is row {quoted[0]}")
assert len(found) == 30_001 and quoted and quoted[0] > 0 and quoted == list(range(quoted[0], 30_000))
assert json.loads(found[quoted[0]]) == texts[quoted[0]]

dates = read("dates.jsonl", lines(["2024-01-01", "2024-01-02"]))
print(f"dates: {dates[0]!r}")
assert not isinstance(dates[0], str)

later = read("later.jsonl", lines(texts + ["2024-01-01"] * 800_000))
print(f"dates after other texts: {later[-1]!r}")
assert later[-1] == "2024-01-01 00:00:00"
PYTHON
