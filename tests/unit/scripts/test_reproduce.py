"""The small reproduction: verdicts by the stated rules, the runs that the claims name, its budget, its text."""

import io
import json
import math
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts" / "reproduce"
sys.path.insert(0, str(SCRIPTS))

import fetch_novels  # noqa: E402
import make_vocabulary  # noqa: E402
import reproduce  # noqa: E402
from averages_claims import RAW, annealed, averaged, averages_claims, with_reptile  # noqa: E402
from verdicts import End, Part, claims, judge, verdict_of, verdict_on  # noqa: E402
from vocabulary_claims import AT_ONCE, EXTENDED, FROM_MEAN, FROM_NORMAL, OLD, TEXT, vocabulary_claims  # noqa: E402

from titan_cpt.runs.shared_stages import count_shared_stages  # noqa: E402
from titan_cpt.runs.sweep_runs import read_sweep_runs  # noqa: E402

RESULTS = SCRIPTS.parents[1] / "docs" / "reproduction"
TOKENS_PER_SECOND = 16_000  # of one core, as docs/reproduction.md has it

TEI = """<TEI xmlns="http://www.tei-c.org/ns/1.0"><teiHeader><p>about the file</p></teiHeader><text>
<front><p>a preface</p></front><body><div><head>CHAPTER I</head><p>One  <hi>fine</hi>
day<note>a note<p>of two</p></note> it rained.</p><pb n="2"/><lg><l>A line</l></lg><quote>A <hi>letter</hi></quote>
<quote><p>Another</p></quote><trailer>THE END.</trailer></div></body></text></TEI>"""


def end(english, german=1.0, forgetting=0.0, rise=0.0):
    return End({"english": english, "german": german}, forgetting, rise)


# Verdicts


@pytest.mark.parametrize(
    ("rule", "difference", "error", "margin", "expected"),
    [
        ("above", 0.3, 0.1, 0.0, "shown"),  # 0.3 > 0.2
        ("above", 0.2, 0.1, 0.0, "not shown"),
        ("above", -0.2, 0.1, 0.0, "not shown"),
        ("above", -0.3, 0.1, 0.0, "contradicted"),
        ("within", 0.01, 0.01, 0.04, "shown"),  # 0.03 <= 0.04
        ("within", -1.0, 0.01, 0.04, "shown"),  # better than required
        ("within", 0.03, 0.01, 0.04, "not shown"),  # 0.05 > 0.04 > 0.01
        ("within", 0.07, 0.01, 0.04, "contradicted"),  # 0.05 > 0.04
        ("level", -1.0, 0.01, 0.04, "contradicted"),
        ("level", -0.01, 0.01, 0.04, "shown"),
        ("above", 0.1, None, 0.0, "as claimed"),
        ("above", -0.1, None, 0.0, "not as claimed"),
        ("level", -0.05, None, 0.04, "not as claimed"),
    ],
)
def test_a_verdict_compares_the_difference_with_two_standard_errors(rule, difference, error, margin, expected):
    """Computed by hand; the sign decides for a single seed, which is never "shown"."""
    assert verdict_of(rule, difference, error, margin) == expected


def test_differences_are_paired_by_seed():
    """0.2, 0.3 and 0.4 though the losses spread by 2: mean 0.3, standard error 0.1 / sqrt(3); seed 3 lacks b."""
    runs = {("a", seed): end(4.2 + seed + 0.1 * seed) for seed in (0, 1, 2, 3)}
    runs |= {("b", seed): end(4.0 + seed) for seed in (0, 1, 2)}
    part = Part("a minus b", ["a", "b"], lambda e: e["a"].losses["english"] - e["b"].losses["english"])
    found = judge(part, runs)

    assert (found.seeds, found.difference) == (3, pytest.approx(0.3))
    assert found.error == pytest.approx(0.1 / math.sqrt(3))
    assert found.verdict == "shown"


def test_a_margin_is_one_per_cent_of_the_reference():
    """0.03 over 4.0 is within 0.04."""
    part = Part("x", ["a", "b"], lambda e: 0.03, "within", lambda e: e["b"].losses["english"])
    found = judge(part, {("a", 0): end(4.03), ("b", 0): end(4.0)})

    assert (found.margin, found.verdict) == (pytest.approx(0.04), "as claimed")


def test_a_part_can_require_more_standard_errors():
    """0.3 with a standard error of 0.1 / sqrt(3) is beyond 2 of them (0.12) and 4.3 (0.25), not beyond 6 (0.35)."""
    runs = {("a", seed): end(0.2 + 0.1 * seed) for seed in (0, 1, 2)}

    def verdict(errors):
        return judge(Part("a", ["a"], lambda e: e["a"].losses["english"], errors=lambda _: errors), runs).verdict

    assert [verdict(errors) for errors in (2.0, 4.3, 6.0)] == ["shown", "shown", "not shown"]


def test_the_worst_part_decides_a_claim():
    """One contradicted part contradicts the claim; one that was not run leaves it open."""
    part = Part("x", ["a"], lambda e: e["a"].losses["english"])
    good = judge(part, {("a", seed): end(1.0 + 0.01 * seed) for seed in (0, 1)})
    bad = judge(part, {("a", seed): end(-1.0 - 0.01 * seed) for seed in (0, 1)})
    lacking = judge(part, {})

    assert verdict_on([good, good]) == "shown"
    assert verdict_on([good, lacking, bad]) == "contradicted"
    assert verdict_on([good, lacking]) == "not run"


@pytest.mark.parametrize("chosen", ["full", "quick", "averages", "vocabulary"])
def test_every_run_that_a_claim_names_is_trained(chosen):
    """Under the name of its result; C1 to C10 in the full set, three of them in the short one, others elsewhere.

    The result of a run's average has its own name; a run that makes none has no such result.
    """
    run_set = reproduce.SETS[chosen]
    sweep_runs = read_sweep_runs([SCRIPTS / "configs" / f"{name}.toml" for name in run_set.sweeps])
    names = {
        f"{sweep_run.folder.parent.name}/{sweep_run.folder.name.partition('seed-')[0].rstrip('_')}"
        for sweep_run in sweep_runs
    }
    names |= {f"{sweep_run.folder.parent.name}/{sweep_run.folder.name}" for sweep_run in sweep_runs}
    names = {name if not name.endswith("/") else name + name[:-1] for name in names} | {"english/english"}
    names |= {f"{name}@average" for name in names if name.startswith("averages_window/")}
    needed = {name for claim in run_set.claims for part in claim.parts for name in part.runs}
    expected = {
        "full": [f"C{number}" for number in range(1, 11)],
        "quick": ["C1", "C2", "C6"],
        "averages": [f"{letter}{number}" for letter in "AR" for number in range(1, 6)],
        "vocabulary": [f"V{number}" for number in range(1, 7)],
    }

    assert needed - names == set()
    assert [claim.name for claim in run_set.claims] == expected[chosen]


@pytest.mark.parametrize(
    ("sweeps", "hours"),
    [
        (reproduce.FULL, 2.5),
        (reproduce.QUICK, 0.25),
        (reproduce.AVERAGES, 0.25),
        (reproduce.SETS["vocabulary"].all_sweeps, 0.25),
    ],
)
def test_the_runs_fit_their_budget(sweeps, hours):
    """On two cores at the measured speed, shared stages counted once; no run over 20 minutes."""
    sweep_runs = read_sweep_runs([SCRIPTS / "configs" / f"{name}.toml" for name in sweeps])
    own, shared = 0, {}
    for sweep_run in sweep_runs:
        count = count_shared_stages(sweep_run, sweep_runs)
        seconds = [stage.steps * sweep_run.plan.step_tokens / TOKENS_PER_SECOND for stage in sweep_run.plan.stages]
        own += sum(seconds[count:])
        if count:
            shared[json.dumps(sweep_run.plan.recipe_until(count - 1))] = sum(seconds[:count])
        assert sum(seconds) < 20 * 60

    assert (own + sum(shared.values())) / 2 / 3600 < hours


def test_every_claim_gets_a_seed_before_any_gets_one_more():
    """25 runs of seed 0, enough for a verdict on every claim, then those of seed 1; joint training and replay first."""
    sweep_runs = read_sweep_runs([SCRIPTS / "configs" / f"{name}.toml" for name in reproduce.FULL])
    order = [sweep_run for _, sweep_run in reproduce.in_turn(list(enumerate(sweep_runs)))]

    assert [sweep_run.config.job.seed for sweep_run in order] == [0] * 25 + [1] * 25 + [2] * 25
    assert [sweep_run.folder.parent.name for sweep_run in order[25:34]] == ["union"] + ["replay"] * 6 + ["constant"] * 2


# Averages and Reptile

COSINE = {share: f"averages_cosine/fraction-{share}" for share in ("0.05", "0.25")}
SEEDS = (0, 1, 2)


def verdicts_of(ends):
    """The verdict on each claim about averages and Reptile, if every seed has the numbers `ends`, up to a hundredth."""
    runs = {
        (name, seed): End({d: loss + 0.01 * seed for d, loss in each.losses.items()}, each.forgetting, each.rise)
        for name, each in ends.items()
        for seed in SEEDS
    }
    return {claim.name: verdict_on([judge(part, runs) for part in claim.parts]) for claim in averages_claims()}


def good_ends():
    """Losses by hand: annealing gains 0.2 in the mean, averages 0.15; Reptile keeps English and loses little German."""
    shapes = ("linear", "sqrt", "cosine")
    ends = {RAW: end(4.2, 3.2), COSINE["0.05"]: end(4.0, 3.0, 1.0), COSINE["0.25"]: end(3.7, 3.3, 0.7)}
    ends |= {annealed(shape): end(4.0, 3.0) for shape in shapes}
    ends |= {averaged(kind): end(4.05, 3.05) for kind in (*shapes, "ema")}
    for step in ("0.1", "0.5"):
        ends |= {with_reptile("0.05", step): end(3.9, 3.01, 0.9), with_reptile("0.25", step): end(3.6, 3.31, 0.6)}
    return ends


def test_the_claims_about_averages_and_reptile_are_shown_by_results_that_have_them():
    """3.55 against 3.5 is 1.4 % of it: an average 0.05 above annealing is not its replacement, nor the cosine's."""
    found = verdicts_of(good_ends())
    shown = {name for name, verdict in found.items() if verdict == "shown"}

    assert {name for name, verdict in found.items() if verdict == "contradicted"} == {"A2", "A4"}
    assert shown == {"A1", "A3", "A5", "R1", "R2", "R3", "R4", "R5"}


@pytest.mark.parametrize(
    ("run", "result", "contradicted"),
    [
        (averaged("sqrt"), end(4.3, 3.2), {"A1", "A2", "A3", "A4", "A5"}),  # worse than the last weights
        (averaged("cosine"), end(4.13, 3.1), {"A2", "A3", "A4", "A5"}),  # gains 0.085 of 0.2
        (with_reptile("0.25", "0.1"), end(3.6, 3.5, 0.6), {"A2", "A4", "R2", "R3"}),  # pays with German
        (with_reptile("0.05", "0.1"), end(4.1, 3.0, 1.1), {"A2", "A4", "R1", "R3", "R4"}),  # forgets more
        (with_reptile("0.05", "0.5"), end(3.9, 3.1, 0.9), {"A2", "A4", "R5"}),
    ],
)
def test_a_result_against_a_claim_contradicts_it(run, result, contradicted):
    """One run is changed; A2 and A4 are contradicted already."""
    found = verdicts_of(good_ends() | {run: result})

    assert {name for name, verdict in found.items() if verdict == "contradicted"} == contradicted


# An extended vocabulary


def verdicts_on_vocabulary(ends):
    """The verdict on each claim about the vocabulary, if every seed has these bits per byte, up to a hundredth."""
    runs = {
        (name, seed): End({d: bits + 0.01 * seed for d, bits in each.losses.items()}, each.forgetting, 0.0)
        for name, each in ends.items()
        for seed in SEEDS
    }
    return {claim.name: verdict_on([judge(part, runs) for part in claim.parts]) for claim in vocabulary_claims()}


GOOD_VOCABULARY = {
    OLD: end(2.0, 2.5),
    TEXT: end(2.1, 2.4),
    EXTENDED: end(2.01, 2.41),  # 0.5 % more English than OLD, 0.4 % more German than TEXT
    AT_ONCE: end(2.05, 2.42),
    FROM_MEAN: end(2.01, 2.43),
    FROM_NORMAL: end(2.01, 2.45),
}


@pytest.mark.parametrize(
    ("changed", "contradicted"),
    [
        ({}, set()),
        ({OLD: end(2.0, 2.3)}, {"V1"}),
        ({OLD: end(1.9, 2.5)}, {"V2"}),  # 5.8 % more English
        ({TEXT: end(2.1, 2.2)}, {"V3"}),
        ({AT_ONCE: end(2.05, 2.4)}, {"V4"}),
        ({AT_ONCE: end(2.0, 2.42)}, {"V5"}),
        ({FROM_NORMAL: end(2.0, 2.4)}, {"V6"}),  # one of two parts
        ({EXTENDED: end(2.2, 2.6)}, {f"V{number}" for number in range(1, 7)}),
    ],
)
def test_the_claims_about_the_vocabulary_are_decided_by_bits_per_byte(changed, contradicted):
    """One run is changed; every claim that is not contradicted is shown."""
    found = verdicts_on_vocabulary(GOOD_VOCABULARY | changed)

    assert {name for name, verdict in found.items() if verdict == "contradicted"} == contradicted
    assert set(found.values()) <= {"shown", "contradicted"}


def stored(folder, bits, stage="german"):
    """A result whose last stage has 20 steps and ends with these bits per byte; its losses per token are others."""
    folder.mkdir(parents=True)
    stages = [
        {"name": name, "steps": steps, "tokens": steps, "union_tokens": steps, "new_datasets": [], "final_window": []}
        | {"datasets": {}}
        for name, steps in (("warmup", 5), (stage, 20))
    ]
    plan = {"name": folder.name, "fingerprint": "f", "step_tokens": 1, "stages": stages}
    (folder / "plan.json").write_text(json.dumps(plan))
    line = {"kind": "validation", "loss_nats_per_token": 9.0}
    places = [("warmup", 20, 8.0), (stage, 0, 7.0), (stage, 20, 0.0)]  # what is added to the bits there
    lines = [
        line | {"stage": name, "step": step, "dataset": dataset, "bits_per_byte": value + more}
        for name, step, more in places
        for dataset, value in bits.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))


def test_results_in_bits_forget_what_the_continued_run_of_their_seed_knew(tmp_path):
    """Seed 1: 2.25 at the end and 2.0 before it; the weights that a run continues are no part of its name."""
    stored(tmp_path / "vocabulary_english" / "seed-1", {"english": 2.0, "german": 5.0}, "english")
    stored(tmp_path / "vocabulary_english" / "seed-0", {"english": 1.0, "german": 5.0}, "english")
    stored(tmp_path / "vocabulary_old" / "steps-150_seed-1_init-checkpoint-x-seed-1", {"english": 2.25, "german": 3.0})
    stored(tmp_path / "vocabulary_at_once" / "seed-1_init-checkpoint-x-seed-1", {"english": 2.5, "german": 2.75})
    found = reproduce.results_in_bits(tmp_path, "vocabulary_english", ("vocabulary_old", "vocabulary_at_once"))

    assert found[OLD, 1] == end(2.25, 3.0, 0.25)
    assert found[AT_ONCE, 1] == end(2.5, 2.75, 0.5)
    assert {name for name, _ in found} == {OLD, AT_ONCE, "vocabulary_english/vocabulary_english"}


@pytest.mark.parametrize("chosen", [name for name, each in reproduce.SETS.items() if (RESULTS / each.file).exists()])
def test_the_committed_tables_follow_from_the_committed_results(chosen):
    """What `--tables-only` writes is the file in docs/reproduction."""
    run_set = reproduce.SETS[chosen]
    text = reproduce.tables(run_set.claims, reproduce.results_of(run_set, RESULTS), run_set.unit)

    assert (RESULTS / run_set.file).read_text() == reproduce.head_of(run_set) + text


def test_every_document_is_as_likely_to_be_selected(tmp_path):
    """One line of three: 1, 4, 7 of 0 to 8."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{number}\n" for number in range(9)))

    assert make_vocabulary.one_line_of(path, 3) == "1\n4\n7\n"


# Final numbers of a run


@pytest.fixture
def finished(tmp_path):
    """A run folder: English, then German; English rises from 4.0 to 4.7 and ends at 4.5."""

    def line(stage, step, dataset, loss, forgetting=None):
        place = {"kind": "validation", "stage": stage, "step": step, "dataset": dataset}
        return {**place, "loss_nats_per_token": loss, "bits_per_byte": 1.0, "forgetting_nats_per_token": forgetting}

    stages = [
        {"name": name, "steps": 40, "tokens": 40, "union_tokens": 40, "new_datasets": [new], "final_window": []}
        | {"datasets": {new: {"tokens": 40, "replayed_tokens": 0, "epochs": None}}}
        for name, new in (("english", "english"), ("german", "german"))
    ]
    folder = tmp_path / "outputs" / "replay" / "fraction-0_seed-1"
    folder.mkdir(parents=True)
    plan = {"name": folder.name, "fingerprint": "f", "step_tokens": 1, "stages": stages}
    (folder / "plan.json").write_text(json.dumps(plan))
    trains = [{"kind": "train", "stage": "german", "step": step, "batch_hash": "x"} for step in range(1, 41)]
    trains = [each | {"tokens_per_s": 1.0, "loss_nats_per_token": 3.0} for each in trains]
    lines = [
        {"kind": "event", "name": "checkpoint", "folder": "f"},
        *trains,
        *[line("english", 40, "english", 4.0), line("english", 40, "german", 8.0)],
        *[line("german", 0, "english", 4.0, 0.0), line("german", 20, "english", 4.7, 0.7)],
        *[line("german", 40, "english", 4.5, 0.5), line("german", 40, "german", 3.0)],
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


def test_a_result_is_stored_thinned_and_read_again(finished, tmp_path):
    """Every 20th step, all validations, no checkpoints; its final numbers are those of the whole run."""
    kept = tmp_path / "results" / "replay" / finished.name
    reproduce.store_result(finished, kept)
    lines = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    found = reproduce.results(tmp_path / "results", ("replay",))

    assert [line["step"] for line in lines if line["kind"] == "train"] == [20, 40]
    assert [line for line in lines if line["kind"] == "event" or "batch_hash" in line] == []
    assert found["replay/fraction-0", 1] == End({"english": 4.5, "german": 3.0}, 0.5, pytest.approx(0.7))
    assert found["english/english", 1].losses == {"english": 4.0, "german": 8.0}
    assert found == {**reproduce.results(tmp_path / "outputs", ("replay",))}


def test_an_average_has_a_result_of_its_own(finished, tmp_path):
    """English 4.3 and German 2.9 beside 4.5 and 3.0: forgetting is 4.3 - 4.0, as English ended with 4.0."""
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    of_weights = [json.loads(line) for line in lines[-2:]]
    for line, loss, forgetting in zip(of_weights, (4.3, 2.9), (0.3, None), strict=True):
        line |= {"dataset": f"{line['dataset']}@average", "loss_nats_per_token": loss}
        line |= {"forgetting_nats_per_token": forgetting}
        lines.append(json.dumps(line))
    (finished / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    reproduce.store_result(finished, tmp_path / "results" / "replay" / finished.name)
    found = reproduce.results(tmp_path / "results", ("replay",))

    assert found["replay/fraction-0", 1].losses == {"english": 4.5, "german": 3.0}
    assert found["replay/fraction-0@average", 1].losses == {"english": 4.3, "german": 2.9}
    assert found["replay/fraction-0@average", 1].forgetting == pytest.approx(0.3)


def test_the_tables_say_what_was_not_run(finished):
    """All ten claims, the run's numbers, and no verdict if runs are missing."""
    text = reproduce.tables(claims(), reproduce.results(finished.parents[1], ("replay",)))

    assert text.count("**not run**") == 10
    assert "| replay/fraction-0 | 4.5000 | 3.0000 | 3.7500 | 0.5000 | 1 |" in text


# Text


def test_a_tei_file_is_read_as_a_reader_would():
    """Headings, paragraphs and verse of the body; no header, preface or note, white space as one space."""
    assert fetch_novels.text_of(TEI.encode()).split("\n\n") == [
        *("CHAPTER I", "One fine day it rained.", "A line"),
        *("A letter", "Another", "THE END."),
    ]


def test_pieces_are_cut_between_paragraphs_and_lose_nothing():
    """Three paragraphs of 12,000 characters: two of them pass 20,000, the third is the rest."""
    text = "\n\n".join(letter * 12_000 for letter in "abc")
    found = list(fetch_novels.pieces(text))

    assert [len(piece) for piece in found] == [24_002, 12_000]
    assert "\n\n".join(found) == text


def archive_of(path, files):
    with tarfile.open(path, "w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_an_archive_of_tei_is_split_by_whole_novels(tmp_path, monkeypatch, capsys):
    """Fifty a language: no novel is in both parts, about one in twenty is validation; only level 1 is read."""
    names = [f"{code}{number:03d}" for code in ("ENG", "DEU") for number in range(50)]
    files = {f"ELTeC/level1/{name}.xml": TEI.encode() for name in names}
    path = archive_of(tmp_path / "a.tar.xz", files | {"ELTeC/level0/ENG999.xml": TEI.encode()})
    monkeypatch.setattr(sys, "argv", ["fetch_novels.py", str(tmp_path / "out"), "--archive", str(path)])
    status = fetch_novels.main()

    def novels(name):
        lines = (tmp_path / "out" / name).read_text().splitlines()
        return {json.loads(line)["id"].partition("@")[0] for line in lines}

    assert status == 0
    assert novels("english.jsonl") | novels("english-heldout.jsonl") == set(names[:50])
    assert not novels("english.jsonl") & novels("english-heldout.jsonl")
    assert 1 <= len(novels("german-heldout.jsonl")) <= 8


def test_an_archive_of_jsonl_is_copied(tmp_path):
    """Validation files by their names."""
    line = b'{"text": "x", "id": "n@000"}\n'
    names = [f"novels/{language}_c{part}.jsonl" for language in ("english", "german") for part in ("", ".heldout")]
    fetch_novels.from_archive(archive_of(tmp_path / "a.tar.xz", dict.fromkeys(names, line)), tmp_path)

    assert [(tmp_path / f"{name}.jsonl").read_bytes() for name in ("english", "german-heldout")] == [line, line]


def test_an_archive_without_novels_is_refused(tmp_path, monkeypatch, capsys):
    """Status 2 with the reason, and no empty file left to be taken for text."""
    path = archive_of(tmp_path / "a.tar.xz", {"readme": b"nothing"})
    monkeypatch.setattr(sys, "argv", ["fetch_novels.py", str(tmp_path / "out"), "--archive", str(path)])

    assert fetch_novels.main() == 2
    assert "english: found 0 novels for training and 0 for validation" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_an_interrupted_download_leaves_no_text_files(tmp_path, monkeypatch, capsys):
    """German ends in the middle: status 2, its files are not there, and the next call fetches it again."""
    for language, code in (("eng", "ENG"), ("deu", "DEU")):
        files = {f"ELTeC-{language}-master/level1/{code}{number:03d}.xml": TEI.encode() for number in range(50)}
        whole = archive_of(tmp_path / "whole.tar.xz", files).read_bytes()
        (tmp_path / f"ELTeC-{language}.tar").write_bytes(whole if language == "eng" else whole[: len(whole) // 2])
    monkeypatch.setattr(
        fetch_novels, "_ADDRESS", (tmp_path / "{name}.tar").as_uri().replace("%7B", "{").replace("%7D", "}")
    )
    monkeypatch.setattr(sys, "argv", ["fetch_novels.py", str(tmp_path / "out")])
    broken = fetch_novels.main()
    left = {path.name for path in (tmp_path / "out").glob("*.jsonl")}
    (tmp_path / "ELTeC-deu.tar").write_bytes(whole)
    mended = fetch_novels.main()

    assert (broken, mended) == (2, 0)
    assert "fetch_novels: " in capsys.readouterr().err
    assert left == {"english.jsonl", "english-heldout.jsonl"}
    assert (tmp_path / "out" / "german.jsonl").stat().st_size > 0
