"""scripts/bench/speed: races of the GPU's shapes run on a CPU as a dry run; tables and goals come from result files."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
SPEED = ROOT / "scripts" / "bench" / "speed"


@pytest.fixture(scope="module")
def bench() -> dict[str, ModuleType]:
    """The driver's modules, which import each other from their own folder and do not import torch."""
    sys.path.insert(0, str(SPEED))
    try:
        return {name: importlib.import_module(name) for name in ("goals", "report", "shapes")}
    finally:
        sys.path.remove(str(SPEED))


def contestant(name: str, tokens_per_s: float, **more: object) -> dict:
    """A row of a result file."""
    kind = "ours" if name.startswith(("titan_cpt", "baseline")) else "peer"
    variant = name.replace("baseline build, ", "baseline-").removeprefix("titan_cpt, ") if kind == "ours" else ""
    return {
        "name": name,
        "kind": kind,
        "variant": variant,
        "overrides": {"float8.recipe_name": "rowwise"} if "float8" in name else {},
        "status": "ran",
        "reason": "",
        "tokens_per_s": tokens_per_s,
        "turns": [tokens_per_s],
        "tokens_per_cpu_s": 1.0,
        "reference_tokens_per_s": 100.0,
        "peak_gib": 10.0,
        "peak_reserved_gib": 11.0,
        "mfu_product": 0.5,
        "first_loss": 1.0,
        "first_step_s": 2.0,
        **more,
    }


def race_of(key: str, *rows: dict) -> dict:
    """A race of a result file."""
    return {"key": key, "device": "cuda", "contestants": list(rows)}


def verdict(bench: dict, text: str, *races: dict, dry_run: bool = False) -> dict:
    """The line of the goal whose text contains `text`."""
    (line,) = [line for line in bench["goals"].verdicts(races, dry_run=dry_run) if text in line["goal"]]
    return line


class TestGoals:
    """The verdicts on the speed goals."""

    def test_without_a_race_every_goal_is_not_run(self, bench) -> None:
        """A goal that was not measured is not reached."""
        assert {line["verdict"] for line in bench["goals"].verdicts([])} == {"not run"}

    def test_the_fastest_bfloat16_variant_counts(self, bench) -> None:
        """120 / 100 is 1.2; the float8 variant and the other build, faster still, do not count."""
        rows = [
            contestant("titan_cpt, compiled", 110.0),
            contestant("titan_cpt, triton", 120.0),
            contestant("titan_cpt, float8", 500.0),
            contestant("baseline build, eager", 600.0),
            contestant("plain loop, compiled", 100.0),
        ]

        line = verdict(bench, "speed >= 1.12x the plain", race_of("G405", *rows))

        assert line["ratio"] == pytest.approx(1.2)
        assert line["of"] == "titan_cpt, triton / plain loop, compiled"
        assert line["verdict"] == "reached"

    def test_a_ratio_below_the_bound_is_missed(self, bench) -> None:
        """1.11 is below 1.12."""
        rows = [contestant("titan_cpt, compiled", 111.0), contestant("torchtitan, compiled", 100.0)]

        assert verdict(bench, "torchtitan", race_of("L1B", *rows))["verdict"] == "missed"

    def test_memory_has_an_upper_bound(self, bench) -> None:
        """9 GiB over 10 GiB is 0.9: reached; 9.1 is not."""
        plain = contestant("plain loop, compiled", 1.0, peak_gib=10.0)

        for peak, expected in ((9.0, "reached"), (9.1, "missed")):
            ours = contestant("titan_cpt, compiled", 1.0, peak_gib=peak)
            assert verdict(bench, "memory", race_of("G405", ours, plain))["verdict"] == expected

    def test_speeds_of_different_heats_compare_through_the_reference(self, bench) -> None:
        """Both twice as fast as the reference of their own heat: the ratio is 1, whatever the device did between."""
        eight = contestant("titan_cpt, float8", 100.0, reference_tokens_per_s=50.0)
        half = contestant("titan_cpt, compiled", 300.0, reference_tokens_per_s=150.0)

        assert verdict(bench, "W4096", race_of("W4096", eight, half))["ratio"] == pytest.approx(1.0)

    def test_the_quick_starts_goal_is_against_the_other_build(self, bench) -> None:
        """400 over 100 is 4."""
        rows = [contestant("titan_cpt, compiled", 400.0), contestant("baseline build, eager", 100.0)]

        assert verdict(bench, "Q:", race_of("Q", *rows))["verdict"] == "reached"

    def test_a_trainer_that_did_not_run_leaves_the_goal_not_run(self, bench) -> None:
        """A disagreeing loss has no figures that count; nor has a dry run."""
        ours = contestant("titan_cpt, compiled", 500.0)
        wrong = contestant("torchtitan, compiled", 100.0, status="disagrees")
        right = contestant("torchtitan, compiled", 100.0)

        assert verdict(bench, "torchtitan", race_of("L1B", ours, wrong))["verdict"] == "not run"
        assert verdict(bench, "torchtitan", race_of("L1B", ours, right), dry_run=True)["verdict"] == "not run"


class TestShapes:
    """The compared shapes."""

    def test_the_variants_consist_of_keys_of_the_schema(self, bench) -> None:
        """Every variant is a config that loads; whether a device supports it is found out by the race."""
        from titan_cpt.config.load import load_config

        for overrides in bench["shapes"].VARIANTS.values():
            load_config(ROOT / "train_configs" / "quickstart.toml", list(overrides.items()))

    def test_the_papers_shape_has_405m_parameters(self, bench) -> None:
        """24 layers of 12 D^2 + 13 D, two matrices of V x D, and the last norm's 2 D."""
        shape = bench["shapes"].RACES["G405"].shape
        width, layers, vocabulary = shape["width"], shape["layers"], shape["vocab_size"]
        parameters = layers * (12 * width**2 + 13 * width) + 2 * vocabulary * width + 2 * width

        assert round(parameters / 1e6) == 405


def driver(*words: str) -> subprocess.CompletedProcess[str]:
    """Run race.py."""
    command = [sys.executable, str(SPEED / "race.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_dry_run_races_every_kind_of_trainer_and_names_those_without_figures(tmp_path: Path) -> None:
    """On a CPU: equal first losses, figures of every turn, a reason for what cannot run, and no verdict on goals."""
    done = driver(
        *("--device", "cuda", "--dry-run", "--races", "G405", "--variants", "compiled,all", "--only", "plain,litgpt"),
        *("--variant", "unknown:optimizer.no_such_key=1", "--json", str(tmp_path / "races.json")),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "races.json").read_text())
    rows = {row["name"]: row for row in result["races"][0]["contestants"]}
    ours, plain = rows["titan_cpt, compiled"], rows["plain loop, compiled"]
    assert ours["first_loss"] == pytest.approx(plain["first_loss"], abs=0.02)
    assert ours["last_loss"] == pytest.approx(plain["last_loss"], abs=0.05)
    assert len(ours["turns"]) == len(plain["turns"]) == 2
    assert rows["titan_cpt, unknown"]["status"] == "not supported"
    assert "no_such_key" in rows["titan_cpt, unknown"]["reason"]
    assert rows["titan_cpt, all"]["reason"].startswith("not supported on a CPU")  # its options fit together otherwise
    assert rows["litgpt, compiled"]["status"] in ("ran", "not installed")
    assert {line["verdict"] for line in result["goals"]} == {"not run"}
    assert result["dry_run"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--races", "G405", "--device", "cpu"], "G405: meant for a GPU; on a CPU only with --dry-run"),
        (["--races", "Z"], "unknown race Z: choose from A, B"),
        (["--races", "Q", "--variants", "fast"], "unknown variant fast: choose from eager, compiled"),
        (["--races", "Q", "--only", "keras"], "unknown trainer keras: choose from hf_trainer"),
        (["--races", "Q", "--baseline", "/nowhere"], "--baseline /nowhere: not a checkout of titan_cpt"),
        (["--turns", "0"], "--turns, --steps and --parallel must be at least 1"),
    ],
    ids=["no GPU", "race", "variant", "trainer", "checkout", "turns"],
)
def test_a_wrong_option_is_one_clear_message(words: list[str], message: str) -> None:
    """Exit status 2 before any process starts."""
    done = driver(*words)

    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_needs_no_environment(tmp_path: Path) -> None:
    """scripts/bench/run.sh --help in a clone without .venv, with a Python that has no torch."""
    done = subprocess.run(
        [str(ROOT / "scripts" / "bench" / "run.sh"), "--help"],
        cwd=tmp_path,
        env={"PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin", "PYTHON": "no-such-python"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "--wheels FOLDER" in done.stdout
    assert "--dry-run" in done.stdout
