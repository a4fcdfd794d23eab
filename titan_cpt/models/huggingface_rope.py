"""RoPE settings of a config.json, in the spellings of transformers 4 and 5. Does not import torch.

transformers 4 writes the base (and GPT-NeoX's rotated fraction) as separate keys, and a scaling as `rope_scaling`; 5
writes everything into `rope_parameters`. If a file has several of these, 4.57.3 and 5.24.0 resolve them as follows:

- `rope_scaling` and `rope_parameters`: both versions read `rope_scaling` and ignore `rope_parameters`, even its base.
- base or fraction both as a separate key and in a table: 4 reads the separate key, 5 the table.
- `original_max_position_embeddings` at the top level: 5 prefers it to the table's, 4 ignores it.
- `type` and `rope_type`: 4 reads `type`, 5 `rope_type`.

Contradicting values are rejected. A key that only version 5 knows is read as in version 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_cpt.models.huggingface_keys import Keys
from titan_cpt.models.spec import ROPE_SCALINGS, Rope, RopeScaling

_LENGTH = "original_max_position_embeddings"
_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", _LENGTH, "truncate"}
_KNOWN |= {number for numbers in ROPE_SCALINGS.values() for number in numbers}
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}


def read_rope(keys: Keys, *, base: str, fraction: str) -> tuple[Rope, float]:
    """Read base and scaling, and the fraction of each head that is rotated; adds problems to `keys.problems`.

    Args:
        keys: the whole config.json.
        base: name of the separate key for the base, such as rope_theta.
        fraction: name of the separate key for the rotated fraction, such as rotary_pct.
    """
    tables = {name: keys.object(name) for name in ("rope_scaling", "rope_parameters")}
    given = [name for name, table in tables.items() if table] or ["rope_parameters"]
    read = [read_rope_table(keys, name, tables[name], base=base, fraction=fraction) for name in given]
    if len(read) == 2 and read[0] != read[1] and not keys.problems:
        keys.add_problem(
            "rope_scaling",
            f"is {dict(tables['rope_scaling'])}, but rope_parameters is {dict(tables['rope_parameters'])}: "
            "transformers reads rope_scaling and ignores rope_parameters, including its rope_theta. Remove the one "
            "that the model was not trained with",
        )
    return read[0]


def rope_scaling_keys(scaling: RopeScaling) -> dict[str, Any]:
    """The object `rope_scaling` of config.json, as transformers 4 and 5 read it."""
    common: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return common
    common["original_max_position_embeddings"] = scaling.original_seq_len
    if scaling.kind == "llama3":
        return common | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    rotations = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return common | rotations | {"attention_factor": scaling.attention_factor}


def read_rope_table(keys: Keys, name: str, table: Mapping[str, Any], *, base: str, fraction: str) -> tuple[Rope, float]:
    """The settings from one table, such as rope_scaling, and from the separate keys; see `read_rope`."""
    part = Keys({key: value for key, value in table.items() if value is not None}, _YARN, f"{name}.")
    part.table = {**part.table, **{key: table[key] for key in ("rope_theta", "partial_rotary_factor") if key in table}}
    numbers = []
    for inner, outer in (("rope_theta", base), ("partial_rotary_factor", fraction)):
        at = part if inner in table else keys
        numbers.append(at.number(float, inner if at is part else outer))
        if at is part and outer in keys.table and keys.number(float, outer) != numbers[-1]:
            _contradiction(keys, outer, keys.table[outer], f"{name}.{inner}", table[inner])
    scaling = _scaling(keys, part, name)
    keys.problems += part.problems
    return Rope(numbers[0], scaling), numbers[1]


def _scaling(keys: Keys, part: Keys, name: str) -> RopeScaling | None:
    kinds = [part.table[key] for key in ("rope_type", "type") if key in part.table]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        _contradiction(keys, f"{name}.type", kinds[1], f"{name}.rope_type", kinds[0])
    unknown = sorted(str(key) for key in part.table if key not in _KNOWN)
    kind = kinds[0] if kinds else "default"
    untyped = not kinds and part.table.keys() - {"rope_theta", "partial_rotary_factor"}
    if kind == "default" and not unknown and not untyped:
        return None
    if (
        not isinstance(kind, str)
        or kind not in ROPE_SCALINGS
        or unknown
        or part.table.get("truncate", True) is not True
    ):
        extra = f" with {', '.join(unknown)}" if unknown else ""
        kind = "no rope_type" if untyped else repr(kind)
        keys.add_problem(
            name,
            f"only RoPE scaling of type {', '.join(ROPE_SCALINGS)} is supported, got {kind}{extra}: {dict(part.table)}",
        )
        return None
    own = {number: part.number(float, number) for number in ROPE_SCALINGS[kind] if number != "attention_factor"}
    if kind == "yarn" and "attention_factor" in part.table:
        own["attention_factor"] = part.number(float, "attention_factor")
    length = None if kind == "linear" else _length(keys, part)
    return RopeScaling(kind=kind, factor=part.number(float, "factor"), original_seq_len=length, **own)


def _length(keys: Keys, part: Keys) -> int:
    """Context length before the extension, from the top level, the table, or else max_position_embeddings."""
    at_the_top = keys.number(int, _LENGTH, null=None) if _LENGTH in keys.table else None
    inside = part.number(int, _LENGTH) if _LENGTH in part.table else None
    if at_the_top is not None and inside is not None and at_the_top != inside:
        _contradiction(keys, _LENGTH, at_the_top, part.prefix + _LENGTH, inside)
    longest = keys.number(int, "max_position_embeddings") if at_the_top is inside is None else None
    return int(next(length for length in (at_the_top, inside, longest) if length is not None))


def _contradiction(keys: Keys, first: str, old: Any, second: str, new: Any) -> None:
    keys.add_problem(
        first,
        f"is {old!r}, but {second} is {new!r}, and transformers 4 and 5 do not read the same one. Remove the one that "
        "the model was not trained with",
    )
