"""scripts/bench/speed/contest.py with stand-ins for the trainers: heats on a device too small for all, and failures.

A stand-in speaks the protocol of serve.py and pretends to use a GPU of 50 GiB that it shares with the others.
"""

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

SPEED = Path(__file__).resolve().parents[3] / "scripts" / "bench" / "speed"
STAND_IN = """
import json, os, sys, time
from pathlib import Path

def say(**fields):
    print(json.dumps(fields), flush=True)

wanted = json.loads(sys.argv[1])
acts, folder = wanted["overrides"], Path(wanted["folder"])
sys.stdin.readline()
if wanted["name"] == "prepare":
    say(machine={"torch": "0"}, flops_per_token=10, parameters=1, datasheet_flops=1000.0)
    sys.stdin.readline()
if "crash" in acts:
    sys.exit("RuntimeError: " + acts["crash"])
if "silent" in acts:
    time.sleep(60)
if "status" in acts:
    say(status=acts["status"], reason="a reason")
    sys.exit()

def free():
    kept = [path for path in folder.glob("kept-*") if Path("/proc", path.name[5:]).exists()]
    return 50 - sum(float(path.read_text()) for path in kept)

peak, keeps = float(acts.get("peak", 0)), float(acts.get("keeps", 0))
if free() < peak:
    say(status="out of memory", reason="no room")
    sys.exit()
(folder / f"kept-{os.getpid()}").write_text(str(keeps))
memory = {"peak_gib": peak - 1, "peak_reserved_gib": peak, "free_gib": free()}
say(first_loss=float(acts.get("loss", 2.0)), first_step_s=1.0, torch="0", **memory)
for line in sys.stdin:
    if "dies" in acts:
        sys.exit("RuntimeError: died")
    count = int(line)
    say(seconds=count / float(acts.get("steps_per_s", 1)), cpu_s=1.0, losses=[1.5] * count, **memory)
"""


@pytest.fixture
def contest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """contest.py, whose trainers' programs are the stand-in."""
    monkeypatch.syspath_prepend(str(SPEED))
    module = importlib.import_module("contest")
    for program in ("ours.py", "peers.py"):
        (tmp_path / program).write_text(STAND_IN)
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def result_of(contest: ModuleType, trainers: dict[str, dict[str, str]], **settings: object) -> dict:
    """The result of a race of one step of 1,000 tokens, and its rows by name."""
    shapes = importlib.import_module("shapes")
    spec = shapes.Race("X", "X", "cuda", "llama", {}, "bfloat16", 10, 100, 1, (), ())
    chosen = {"turns": 3, "dry_run": True, "budget_s": math.inf, "patience_s": 20.0, **settings}
    entries = [contest.Entry(name, "ours", name, overrides=acts) for name, acts in trainers.items()]
    everything = contest.Settings(device="cuda", target="cuda", peers=sys.executable, wheels="", **chosen)
    result = contest.race(spec, entries, everything)
    return {**result, "rows": {row["name"]: row for row in result["contestants"]}}


def test_trainers_that_do_not_fit_run_in_a_later_heat_beside_the_reference(contest: ModuleType) -> None:
    """50 GiB, each keeps 5 and needs up to 1.5 x 20: five are loaded while 30 GiB are free, the sixth comes after."""
    trainers = {name: {"peak": "20", "keeps": "5", "steps_per_s": str(2 + i)} for i, name in enumerate("abcdef")}

    result = result_of(contest, trainers)

    rows = result["rows"]
    assert [rows[name]["heat"] for name in "abcdef"] == [0, 0, 0, 0, 0, 1]
    assert len(rows["a"]["turns"]) == 6
    assert {len(rows[name]["turns"]) for name in "bcdef"} == {3}
    assert rows["f"]["tokens_per_s"] == pytest.approx(7000)
    assert rows["f"]["reference_tokens_per_s"] == pytest.approx(2000)
    assert rows["a"]["peak_gib"] == 19
    assert rows["a"]["peak_reserved_gib"] == 20


def test_a_trainer_that_finds_too_little_memory_gets_a_second_try(contest: ModuleType) -> None:
    """It needs 45 GiB, more than the reference's peak suggests; with the reference only there are 45."""
    small = {"peak": "10", "keeps": "5"}

    rows = result_of(contest, {"a": small, "b": small, "large": {"peak": "45", "keeps": "5"}})["rows"]

    assert rows["large"]["status"] == "ran"
    assert rows["large"]["heat"] == 1


def test_a_trainer_larger_than_the_device_is_named(contest: ModuleType) -> None:
    """Its second try fails too; the others have their figures."""
    rows = result_of(contest, {"a": {"peak": "10"}, "b": {"peak": "10"}, "huge": {"peak": "60"}})["rows"]

    assert (rows["huge"]["status"], rows["huge"]["reason"]) == ("out of memory", "no room")
    assert rows["b"]["status"] == "ran"


def test_several_load_at_once_if_they_fit(contest: ModuleType) -> None:
    """Three at once after the reference: the same heats as one by one."""
    trainers = {name: {"peak": "10", "keeps": "2"} for name in "abcde"}

    rows = result_of(contest, trainers, parallel=3)["rows"]

    assert {row["heat"] for row in rows.values()} == {0}


@pytest.mark.parametrize(
    ("acts", "status", "reason"),
    [
        ({"crash": "no kernel"}, "failed", "exited: RuntimeError: no kernel"),
        ({"dies": "1"}, "failed", "exited: RuntimeError: died"),
        ({"silent": "1"}, "failed", "no answer within 2 s"),
        ({"status": "not installed"}, "not installed", "a reason"),
        ({"loss": "2.1"}, "disagrees", "loss at step 1 is 0.1000 from that of a"),
        ({"loss": "nan"}, "disagrees", "loss at step 1 is nan from that of a"),
    ],
    ids=["crash", "crash in a turn", "hang", "not installed", "other loss", "NaN"],
)
def test_a_trainer_without_valid_figures_is_named_and_the_others_run(
    contest: ModuleType, acts: dict[str, str], status: str, reason: str
) -> None:
    """Status and reason of each kind of failure."""
    rows = result_of(contest, {"a": {}, "bad": acts, "c": {}}, patience_s=2.0)["rows"]

    assert (rows["bad"]["status"], rows["bad"]["reason"]) == (status, reason)
    assert len(rows["c"]["turns"]) == len(rows["a"]["turns"]) == 3


def test_a_float8_variant_may_differ_more(contest: ModuleType) -> None:
    """0.04 is within the tolerance of float8, not of bfloat16."""
    other = {"loss": "2.04"}
    rows = result_of(contest, {"a": {}, "b": other, "float8": {**other, "float8.recipe_name": "rowwise"}})["rows"]

    assert rows["b"]["status"] == "disagrees"
    assert rows["float8"]["status"] == "ran"


def test_without_its_first_variant_the_next_trainer_is_the_reference(contest: ModuleType) -> None:
    """The ratios remain those of trainers that ran in turns."""
    result = result_of(contest, {"a": {"crash": "x"}, "b": {}, "c": {}})

    assert result["reference"] == "b"
    assert result["rows"]["c"]["reference_tokens_per_s"] == result["rows"]["b"]["tokens_per_s"]


def test_a_used_up_budget_leaves_two_turns_of_the_reference(contest: ModuleType) -> None:
    """Trainers after it are named as not run."""
    rows = result_of(contest, {"a": {}, "b": {}}, budget_s=0.0)["rows"]

    assert len(rows["a"]["turns"]) == 2
    assert (rows["b"]["status"], rows["b"]["reason"]) == ("not run", "--budget was used up")


def test_mfu_is_relative_to_the_product_and_to_the_data_sheet(contest: ModuleType) -> None:
    """10 FLOPs a token, 1,000 tokens a step, 2 steps a second: 20,000 FLOP/s of 1,000; 10 products a second."""
    row = result_of(contest, {"a": {"steps_per_s": "2"}})["rows"]["a"]

    assert row["mfu_datasheet"] == pytest.approx(20.0)
    assert row["mfu_product"] == pytest.approx(20_000 / (2 * 256**3))
