"""AdamW's kernels compiled for an A100 and an H100, without a GPU. Their results are tested in test_adamw.py."""

import importlib

import interpreted
import pytest

from titan_cpt.training.cuda import adamw

pytestmark = interpreted.NEEDS_TRITON


@pytest.mark.parametrize("architecture", interpreted.ARCHITECTURES)
def test_whole_blocks_are_read_and_written_16_bytes_at_a_time_without_spills(architecture, tmp_path):
    """Weight, two moments and the float32 gradient; registers for at least 24 warps on a multiprocessor."""
    kernels = importlib.import_module("titan_cpt.training.cuda.adamw_kernel")
    ptx, report = interpreted.compiled_for(
        kernels.update_weights,
        architecture,
        tmp_path,
        warps=adamw.WARPS,
        table="*i64",
        scalars="*fp32",
        tensor_of_chunk="*i32",
        first_chunk="*i32",
        clip_factor="*fp32",
        halted="*fp32",
        CHUNK=adamw.CHUNK,
        BLOCK=adamw.BLOCK,
    )
    found = interpreted.accesses(ptx)
    registers = int(report.split("Used ")[1].split()[0])

    assert (found["ld.global.v4.b32"], found["st.global.v4.b32"]) == (4, 3)
    assert (found["ld.global.v2.b32"], found["st.global.v2.b32"]) == (1, 1)  # bf16: 4 elements of a thread
    assert "0 bytes spill stores, 0 bytes spill loads" in report
    assert 65536 // (registers * 32) >= 24


@pytest.mark.parametrize("architecture", interpreted.ARCHITECTURES)
def test_the_step_counter_compiles(architecture, tmp_path):
    """float64 exponentials included."""
    kernels = importlib.import_module("titan_cpt.training.cuda.adamw_kernel")
    _, report = interpreted.compiled_for(
        kernels.advance_steps,
        architecture,
        tmp_path,
        warps=4,
        table="*i64",
        hyperparameters="*fp64",
        scalars="*fp32",
        halted="*fp32",
        tensors="i32",
        BLOCK=128,
    )

    assert "0 bytes spill stores, 0 bytes spill loads" in report
