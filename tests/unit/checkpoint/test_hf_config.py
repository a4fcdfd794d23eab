"""config.json of a Hugging Face model is read, or refused with the path and what to do."""

import pytest

from titan_cpt.checkpoint.hf_config import read_config
from titan_cpt.errors import CheckpointError


def test_a_config_is_read_or_refused(tmp_path):
    """A missing file, damaged JSON, and JSON that is not an object."""
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=r"config\.json: is missing; it describes the model"):
        read_config(tmp_path)
    for text, said in (("{", "cannot be read as JSON"), ("[1]", "must hold a JSON object")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=said):
            read_config(tmp_path)
    path.write_text('{"model_type": "llama"}')

    assert read_config(tmp_path) == {"model_type": "llama"}
