"""Tests of scripts/gpu/check.sh: a dry run on the CPU, and how a trace of the profiler becomes a table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "scripts" / "gpu"


def check(*options, **environment):
    """Run check.sh with this Python."""
    return subprocess.run(
        [str(SCRIPTS / "check.sh"), *map(str, options)],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def kinds(monkeypatch):
    """The module kernel_kinds."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import kernel_kinds

    return kernel_kinds


def test_a_dry_run_makes_every_check_but_those_that_need_a_compiler_or_a_gpu(tmp_path):
    """It runs what a GPU machine runs, on tiny shapes: losses, kill -9 and resume, saves, profile, table and JSON."""
    done = check("--dry-run", "--out", tmp_path, "--jobs", 1, "--skip", "compile,tests,races,suite")
    found = json.loads((tmp_path / "check.json").read_text())
    rows = {(row["section"], row["check"]): row for row in found["rows"]}

    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 FAILED" in done.stdout
    assert rows["resume", "deterministic bf16: 1 x kill -9, resumed"]["value"].startswith("0 of 24 records differ")
    assert rows["resume", "async saves in one run"]["value"] == "6 saved, 0 failed"
    assert rows["losses", "bfloat16 against float32"]["status"] == "ok"
    assert rows["offload", "one rank"]["value"] == "refused"
    assert {"products", "attention forward", "optimizer"} <= {check for section, check in rows if section == "profile"}
    assert found["checked_on"] == "cpu"
    assert found["dry_run"]
    assert {path.name for path in tmp_path.iterdir()} == {"check.json", "check.md", "logs.txt"}


def test_what_no_longer_fits_into_the_limit_is_skipped_and_named(tmp_path):
    """Nothing is trained, and nothing failed."""
    done = check("--dry-run", "--out", tmp_path, "--limit", 1, "--only", "losses,resume")

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("s left, needs 30") == 4  # as it happens, and in the table


def test_a_second_call_keeps_the_results_of_the_first(monkeypatch, tmp_path):
    """And a third those of both."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import check_report as report

    for number in range(3):
        results = report.Report(tmp_path, [], about={"number": number})
        results.keep_earlier()
        results.write()

    found = {path.name: json.loads(path.read_text())["number"] for path in tmp_path.glob("*.json")}
    assert found == {"check-1.json": 0, "check-2.json": 1, "check.json": 2}
    assert (tmp_path / "check-2.md").exists()


def test_an_output_folder_that_is_a_file_is_an_error_before_anything_runs(tmp_path):
    """One line, status 2."""
    (tmp_path / "out").touch()

    done = check("--dry-run", "--out", tmp_path / "out")

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"check.sh: --out {tmp_path / 'out'}: File exists"


def test_ctrl_c_ends_all_processes_and_prints_the_table(tmp_path):
    """The sections that were running are named as failed, and the files are written."""
    command = [sys.executable, str(SCRIPTS / "check.py"), "--dry-run", "--out", str(tmp_path), "--only"]
    known = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": known, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([*command, "resume,losses"], env=environment, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("gpu-check-*/losses/*.log")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        out, _ = process.communicate(timeout=60)

    assert process.returncode == 130
    assert time.monotonic() - begin < 30
    assert "2 FAILED" in out
    assert json.loads((tmp_path / "check.json").read_text())["rows"][0]["status"] == "FAILED"


def test_every_goal_has_a_line_though_no_race_ran(monkeypatch, tmp_path):
    """A goal that was not measured is named as not run, with its bound."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import speed
    from check import Context
    from check_report import Report, Row

    report = Report(tmp_path, ["races"])
    until, races = time.monotonic() + 20, ("G405", "L1B")
    speed.races(Context("races", "cuda", False, tmp_path, None, None, until, report, races=races))

    skipped = [row.check for row in report.rows if row.status == "skipped"]
    found = [row for row in report.rows if row.check.startswith("goal ")]
    assert skipped == ["G405", "L1B"]
    assert len(found) == len(speed.goals.GOALS)
    assert Row("races", "goal G405: speed", "-", "not run", ">= 1.8x HF Trainer") in found


def test_an_unknown_section_is_an_error_that_names_the_sections(tmp_path):
    """Status 2."""
    done = check("--dry-run", "--out", tmp_path, "--only", "speeds")

    assert done.returncode == 2
    assert "no section speeds; there are ceilings, quickstart" in done.stderr


def test_without_a_gpu_the_check_says_so(tmp_path):
    """And how to try it on the CPU."""
    done = check("--out", tmp_path)

    assert done.returncode == 2
    assert "sees no GPU; --dry-run runs on the CPU" in done.stderr


def test_a_table_of_a_hundred_checks_fits_into_12000_characters(monkeypatch, tmp_path):
    """However long their names and values are: only the end of the output may be visible."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import check_report as report

    full = report.Report(tmp_path, [])
    full.rows = [report.Row(f"s{n // 10}", "c" * 99, "FAILED", "v" * 500, "e" * 99) for n in range(80)]

    assert len(full.table()) < 12_000


def event(category, name, begin, duration, *, thread=1, **arguments):
    """An event of a Chrome trace."""
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration, "tid": thread, "args": arguments}


def test_kernels_are_sorted_by_their_name_their_operator_and_the_phase_of_their_launch(kinds):
    """By hand: two steps of 100 us, of which the device is busy for 45 us; the autograd thread launches one kernel."""
    events = [event("user_annotation", "step", 0, 200), event("user_annotation", "before", -50, 10)]
    for start in (0, 100):
        number = start * 10
        events += [
            event("user_annotation", "backward", start + 10, 20),
            event("user_annotation", "clip", start + 31, 5),
            event("user_annotation", "optimizer", start + 40, 9),
            event("user_annotation", "Optimizer.step#AdamW.step", start + 41, 7),
            event("cpu_op", "aten::mm", start + 2, 3),
            event("cpu_op", "aten::_to_copy", start + 12, 4, thread=7),
            event("cpu_op", "aten::copy_", start + 13, 2, thread=7),
            event("cpu_op", "aten::_foreach_mul_", start + 32, 2),
        ]
        launches = [(3, 1), (14, 7), (33, 1), (42, 1), (45, 1)]
        kernels = [
            ("kernel", "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", 20),
            ("kernel", "void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", 10),
            ("kernel", "void multi_tensor_apply_kernel<BinaryOpScalarFunctor>", 5),
            ("kernel", "void multi_tensor_apply_kernel<FusedAdamMathFunctor>", 8),
            ("gpu_memset", "Memset (Device)", 2),
        ]
        moment = start + 50
        for n, ((launch, thread), (category, name, duration)) in enumerate(zip(launches, kernels, strict=True)):
            events.append(
                event("cuda_runtime", "cudaLaunchKernel", start + launch, 1, thread=thread, correlation=number + n)
            )
            events.append(event(category, name, moment, duration, thread=99, correlation=number + n))
            moment += duration
    events.append(event("kernel", "of the step before", -20, 5, thread=99, correlation=12345))

    found = kinds.table_of(kinds.kernels_of({"traceEvents": events}), wall_us=200, steps=2)

    assert {kind: (row["ms"], row["launches"]) for kind, row in found["kinds"].items()} == {
        "products": (0.020, 1),
        "casts of gradients": (0.010, 1),
        "optimizer": (0.008, 1),
        "clip: scaling": (0.005, 1),
        "memset": (0.002, 1),
    }
    assert found["busy_ms"] == pytest.approx(0.045)
    assert found["gaps_ms"] == pytest.approx(0.055)
    assert found["launches"] == 4


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x64x64", "attention backward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x64", "attention forward"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention backward"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention forward"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80", "attention backward"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention forward"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "products"),
        ("triton_poi_fused__to_copy_gelu_gelu_backward_7", "GELU, SiLU"),
        ("triton_red_fused_native_layer_norm_native_layer_norm_backward_3", "norms"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "other elementwise"),
    ],
)
def test_names_of_kernels_tell_their_kind(kinds, kernel, kind):
    """Names as torch 2.11 to 2.14 have them on Hopper and Ampere."""
    assert kinds.Kernel(kernel, "", "", "kernel", 0, 1).kind == kind
