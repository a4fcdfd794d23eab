"""config.json and other JSON files of a Hugging Face model. Does not import torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from titan_cpt.errors import CheckpointError
from titan_cpt.models.huggingface_config import text_part

REMEDY = "Download all files of the model again"
"""What to do if a file of a Hugging Face model is missing or damaged."""


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face model; of a multimodal one, that of its text part.

    Raises:
        CheckpointError: it is missing, or is not a JSON object.
    """
    return text_part(read_release_json(folder / "config.json", "it describes the model"))


def read_release_json(path: Path, what_for: str) -> dict[str, Any]:
    """The parsed JSON file of a Hugging Face model.

    Args:
        what_for: what the file is needed for, for the message if it is missing.

    Raises:
        CheckpointError: it is missing, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; {what_for}. Give the folder of a Hugging Face model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}. {REMEDY}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object. {REMEDY}")
    return content
