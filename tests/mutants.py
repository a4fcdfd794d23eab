"""Hand-made faults, applied one at a time to a copy of the repository: the named tests must fail on each of them.

    python tests/mutants.py            # all of them, a few minutes; exit status 1 if any survives
    python tests/mutants.py schedules  # those of files whose path holds the word

A mutant that survives shows a test that is missing, or code that nothing needs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("titan_cpt", "tests", "train_configs", "pyproject.toml")

SCHEDULES, MIXTURE, PERMUTATION, PLAN, CONFIG, CONFIG_FILE, CLI = (
    f"unit/test_{name}.py"
    for name in ("schedules", "mixture", "permutation", "plan*", "config", "config_file", "cli_plan")
)
SWEEP, PAGE, BASELINES, ADVICE = (f"unit/test_{name}.py" for name in ("sweep", "report_page", "baselines", "advice"))
INFERENCE, SCORES = "unit/test_inference.py", "unit/test_scores.py"
FILES, DISK, NUMBERS, CRASHES, UNTRUSTED = (
    f"unit/test_{name}.py"
    for name in ("checkpoint_files", "disk_faults", "numeric_faults", "crash_matrix", "untrusted_input_is_refused")
)
RULES, FOOTPRINT = "unit/test_layout_rules.py", "unit/test_footprint.py"
PIPELINES, FLOAT8 = "unit/test_pipeline_costs.py", "unit/test_float8.py"
FORMATS, ORDER, MADE_BY = (
    f"unit/test_{name}.py" for name in ("indexed_formats", "indexed_megatron_order", "tokenizer_of_data")
)


@dataclass(frozen=True)
class Mutant:
    """One fault: the text of a file that is replaced, and the tests that must notice.

    Attributes:
        what: the fault in words.
        file: path below titan_cpt/.
        old: text that stands in the file exactly once.
        new: what stands there instead.
        tests: files below tests/, each of which must fail; of the files that a pattern matches, one must.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    # Learning rates
    Mutant(
        "the LR of the step before", "plan.py", "lr_at(self.schedule, step + 1)", "lr_at(self.schedule, step)", (PLAN,)
    ),
    Mutant(
        "a phase's last step counts as the next one's",
        "schedules.py",
        "for phase in schedule if t <= phase.end)",
        "for phase in schedule if t < phase.end)",
        (SCHEDULES,),
    ),
    Mutant(
        "the LR goes on after the end",
        "schedules.py",
        "return _value(schedule[-1], schedule[-1].end)",
        "return _value(schedule[-1], t)",
        (SCHEDULES,),
    ),
    Mutant(
        "the last step only comes near the final LR",
        "schedules.py",
        "if t >= phase.end:",
        "if t > phase.end:",
        (SCHEDULES,),
    ),
    Mutant(
        "a duration for an end point",
        "schedules.py",
        "end=cooldown_until,",
        "end=warmup_until + cooldown_until,",
        (SCHEDULES,),
    ),
    Mutant(
        "a straight line for the annealing",
        "schedules.py",
        'shape="exponential", start=constant_until',
        'shape="linear", start=constant_until',
        (SCHEDULES,),
    ),
    Mutant(
        "alpha forgotten", "schedules.py", "1 / math.sqrt(1 + alpha * x) - 1", "1 / math.sqrt(1 + x) - 1", (SCHEDULES,)
    ),
    Mutant(
        "the warm-up starts at a tenth of the peak",
        "schedules.py",
        "lr_from=0.0, lr_to=peak",
        "lr_from=peak / 10, lr_to=peak",
        (SCHEDULES,),
    ),
    Mutant("sqrt(1 - x) for 1 - sqrt(x)", "schedules.py", "1 - math.sqrt(x)", "math.sqrt(1 - x)", (SCHEDULES,)),
    Mutant("no floor", "schedules.py", "max(phase.lr_to, phase.lr_from", "max(0.0, phase.lr_from", (SCHEDULES,)),
    Mutant(
        "a quarter of a cosine for a half",
        "schedules.py",
        "(1 + math.cos(math.pi * x)) / 2",
        "math.cos(math.pi * x / 2)",
        (SCHEDULES,),
    ),
    Mutant(
        "the timescale counts from the stage's start",
        "schedules.py",
        "max(t - phase.start, 0.0)",
        "max(t, 0.0)",
        (SCHEDULES,),
    ),
    Mutant(
        "end points out of order are let through",
        "schedules.py",
        "if points[earlier] > points[later]:",
        "if False:",
        (SCHEDULES,),
    ),
    Mutant("min a hundredth of max", "planning.py", "DEFAULT_MIN_DIVISOR = 10", "DEFAULT_MIN_DIVISOR = 100", (PLAN,)),
    Mutant(
        "0.29 as the float it is", "planning.py", "Fraction(str(value)) * steps", "Fraction(value) * steps", (PLAN,)
    ),
    Mutant(
        "tokens of an end point in sequences",
        "planning.py",
        "Fraction(parse_tokens(value), step_tokens)",
        "Fraction(parse_tokens(value), 1)",
        (PLAN,),
    ),
    Mutant("--lr-at off by one", "plan_view.py", "str(t): lr_at(stage.schedule, t)", "str(t): stage.lr_at(t)", (CLI,)),
    Mutant("the first LR told as the peak", "plan_view.py", '"peak_lr": max(lrs)', '"peak_lr": lrs[0]', (PLAN,)),
    # Which sequence comes when
    Mutant(
        "floor for the nearest",
        "mixture.py",
        "share.numerator + share.denominator) //",
        "share.numerator) //",
        (MIXTURE,),
    ),
    Mutant(
        "the walk starts half a sequence off",
        "mixture.py",
        "step * start + tree.share.denominator",
        "step * start",
        (MIXTURE,),
    ),
    Mutant(
        "the right side starts where the left one ends",
        "mixture.py",
        "start - left_start",
        "start - left_stop",
        (MIXTURE,),
    ),
    Mutant(
        "rounded shares", "mixture.py", "Fork(light / both,", "Fork((light / both).limit_denominator(1000),", (MIXTURE,)
    ),
    Mutant(
        "ties go by the order of the file",
        "mixture.py",
        "[(weight, leaf.source, leaf) for leaf, weight in weights.items()]",
        '[(weight, f"{i:04}", leaf) for i, (leaf, weight) in enumerate(weights.items())]',
        (MIXTURE,),
    ),
    Mutant(
        "the heaviest source deepest in the tree",
        "mixture.py",
        "[(weight, leaf.source, leaf)",
        "[(-weight, leaf.source, leaf)",
        (MIXTURE,),
    ),
    Mutant("new data starts over in every stage", "mixture.py", "return leaf.first + k", "return k", (MIXTURE,)),
    Mutant(
        "replay starts over in every stage",
        "mixture.py",
        "divmod(leaf.first + k, leaf.seen)",
        "divmod(k, leaf.seen)",
        (MIXTURE,),
    ),
    Mutant(
        "every round of reshuffled replay the same",
        "mixture.py",
        'f"{leaf.reshuffle_key}/{rounds}"',
        "leaf.reshuffle_key",
        (MIXTURE,),
    ),
    Mutant(
        "modulo for walking on",
        "permutation.py",
        "images[outside] = _network(images[outside], half_bits, round_keys)",
        "images[outside] %= np.uint64(size)",
        (PERMUTATION,),
    ),
    Mutant("two rounds", "permutation.py", "_ROUNDS = 6", "_ROUNDS = 2", (PERMUTATION,)),
    Mutant(
        "half a bit short",
        "permutation.py",
        "((size - 1).bit_length() + 1) // 2",
        "(size - 1).bit_length() // 2",
        (PERMUTATION,),
    ),
    Mutant(
        "one position too many", "permutation.py", "positions.max() >= size", "positions.max() > size", (PERMUTATION,)
    ),
    Mutant(
        "the next batch starts one sequence late",
        "plan.py",
        "draws(stage.tree, step * self.global_batch_size,",
        "draws(stage.tree, step * self.global_batch_size + 1,",
        (PLAN,),
    ),
    # Budgets, lineage and cursors
    Mutant(
        "floor for ceil",
        "planning.py",
        "math.ceil(Fraction(stage.tokens or 0,",
        "math.floor(Fraction(stage.tokens or 0,",
        (PLAN,),
    ),
    Mutant(
        "a sequence of seq_len + 1 tokens",
        "planning.py",
        "Fraction(stage.tokens or 0, self.batch * self.seq_len)",
        "Fraction(stage.tokens or 0, self.batch * (self.seq_len + 1))",
        (PLAN,),
    ),
    Mutant("a window too many", "planning.py", "(tokens - 1) // self.seq_len", "tokens // self.seq_len", (PLAN,)),
    Mutant(
        "the pre-anneal point a step late", "planning.py", "else math.floor(point)", "else math.ceil(point)", (PLAN,)
    ),
    Mutant(
        "previous means the end of an infinite stage",
        "planning.py",
        "last.steps if last.pre_anneal_step is None or not infinite else",
        "last.steps if True else",
        (PLAN,),
    ),
    Mutant(
        "previous means the start of a wsd stage's decay",
        "planning.py",
        "last.pre_anneal_step is None or not infinite",
        "last.pre_anneal_step is None",
        (PLAN,),
    ),
    Mutant(
        "cursors count this stage only",
        "planning.py",
        "[leaf.source] = leaf.first + count",
        "[leaf.source] = count",
        (PLAN,),
    ),
    Mutant(
        "the steps of this stage only",
        "planning.py",
        "stage.before.steps + init.steps_done",
        "init.steps_done",
        (PLAN,),
    ),
    Mutant(
        "replay does not count as training",
        "planning.py",
        "for name, share in stage.shares.items():",
        "for name, share in ((name, stage.shares[name]) for name in stage.datasets):",
        (PLAN,),
    ),
    Mutant(
        "the last stage alone is weighed",
        "planning.py",
        "exposure.get(name, Fraction(0)) + share * items",
        "share * items",
        (PLAN,),
    ),
    Mutant("the replay's cursor is dropped", "planning.py", "first=before.replayed.get(source, 0)", "first=0", (PLAN,)),
    Mutant(
        "the cursor of new data is dropped", "planning.py", "first=before.trained.get(source, 0)", "first=0", (PLAN,)
    ),
    Mutant(
        "replay of what was never seen",
        "planning.py",
        "before.trained[source] if source in before.trained else self.sequences.get(source)",
        "self.sequences.get(source) or before.trained.get(source)",
        (PLAN,),
    ),
    Mutant(
        "the last seen sequence cannot be replayed",
        "planning.py",
        "leaf.first + count <= leaf.seen",
        "leaf.first + count < leaf.seen",
        (PLAN,),
    ),
    Mutant(
        "replay that runs out wraps silently",
        "planning.py",
        'if stage.replay.on_exhausted == "error":',
        "if False:",
        (PLAN,),
    ),
    Mutant("what is new is replayed too", "planning.py", "if seen and name not in stage.dataset}", "if seen}", (PLAN,)),
    Mutant("replay on top of the budget", "planning.py", "(new, 1 - fraction)", "(new, Fraction(1))", (PLAN,)),
    Mutant(
        "the fraction as the float it is",
        "planning.py",
        "Fraction(str(stage.replay.fraction))",
        "Fraction(stage.replay.fraction)",
        (PLAN,),
    ),
    Mutant(
        "replay is forgotten in epochs",
        "planning.py",
        "DatasetUse(tokens, old.get(name, 0), tokens / size if size else None)",
        "DatasetUse(tokens, old.get(name, 0), new.get(name, 0) / size if size else None)",
        (PLAN,),
    ),
    Mutant("eleven samples for ten", "planning.py", "range(0, span, every)", "range(0, span + 1, every)", (PLAN,)),
    Mutant(
        "accumulation forgets the ranks",
        "planning.py",
        "accumulation=config.training.global_batch_size // per_step",
        "accumulation=config.training.global_batch_size // config.training.local_batch_size",
        (PLAN,),
    ),
    Mutant(
        "a batch that does not divide is let through",
        "planning.py",
        "if config.training.global_batch_size % per_step:",
        "if False:",
        (PLAN,),
    ),
    Mutant(
        "forgetting is counted from a stage too early",
        "plan.py",
        "if name in parent.datasets:\n                return stage.name",
        "if name in parent.datasets:\n                return parent.name",
        (PLAN,),
    ),
    Mutant(
        "tokens of one rank",
        "plan.py",
        "return self.global_batch_size * self.seq_len",
        "return self.local_batch_size * self.seq_len",
        (PLAN,),
    ),
    # The fingerprint
    Mutant(
        "a key is missing from the recipe",
        "planning.py",
        '        "optimizer_state": stage.optimizer_state,\n',
        "",
        (PLAN,),
    ),
    Mutant(
        "the layout is part of the recipe",
        "planning.py",
        '"job.seed": config.job.seed,',
        '"job.seed": config.job.seed + 1000 * config.training.local_batch_size,',
        (PLAN,),
    ),
    Mutant("the future is part of the past", "plan.py", "self.stages[: index + 1]", "self.stages", (PLAN,)),
    Mutant(
        "names in the order of the file",
        "planning.py",
        "weight in sorted(_mix(stage.dataset).items())}",
        'weight in _mix(stage.dataset).items()} | {"first": next(iter(stage.dataset))}',
        (PLAN,),
    ),
    # Configs
    Mutant(
        "the first base wins",
        "config_file.py",
        "_merge(merged, read_with_bases(path.parent / base, (*_seen, here)))",
        "_merge(read_with_bases(path.parent / base, (*_seen, here)), merged)",
        (CONFIG_FILE,),
    ),
    Mutant(
        "bases are looked for in the working directory",
        "config_file.py",
        "read_with_bases(path.parent / base,",
        "read_with_bases(Path(base),",
        (CONFIG_FILE,),
    ),
    Mutant("a circle is walked for ever", "config_file.py", "if here in _seen:", "if False:", (CONFIG_FILE,)),
    Mutant(
        "stages are replaced and not merged",
        "config_file.py",
        'if key == "stages" and',
        'if key == "" and',
        (CONFIG_FILE,),
    ),
    Mutant("keys of the old schedule stay", "config_file.py", " and not _is_choice(old, value)", "", (CONFIG_FILE,)),
    Mutant(
        "a string key is parsed", "config_file.py", "if any(is_string(", "if False and any(is_string(", (CONFIG_FILE,)
    ),
    Mutant(
        "a second line is a second key",
        "config_file.py",
        'return read["value"] if len(read) == 1 else text',
        'return read["value"]',
        (CONFIG_FILE,),
    ),
    Mutant(
        "an override of no stage makes one",
        "config_file.py",
        "            if not found:",
        "            if False:",
        (CONFIG_FILE,),
    ),
    Mutant(
        "a list of one for a name",
        "config_types.py",
        "return list(value) if len(value) > 1 else value[0]",
        "return list(value)",
        (CONFIG_FILE,),
    ),
    Mutant(
        "faults of references are told another time",
        "config_file.py",
        "faults += list(reference_faults(raw))\n        raise",
        "raise",
        (CONFIG,),
    ),
    Mutant("a share above 1", "config_types.py", "not 0.0 <= value <= 1.0", "not 0.0 <= value", (CONFIG,)),
    Mutant("M is 2^20", "config_types.py", '"M": 10**6', '"M": 2**20', (CONFIG,)),
    Mutant(
        "both budgets",
        "config_faults.py",
        'if ("steps" in stage) == ("tokens" in stage):',
        'if "steps" not in stage and "tokens" not in stage:',
        (CONFIG,),
    ),
    Mutant("what is not there yet is ignored", "config_faults.py", "if value != allowed:", "if False:", (CONFIG,)),
    Mutant("hints of another table", "config_faults.py", "        if named:  #", "        if False:  #", (CONFIG,)),
    Mutant("min above max", "config.py", "low is not None and high is not None and low > high", "False", (CONFIG,)),
    Mutant(
        "a fraction of 1",
        "config_types.py",
        "Fraction01 = Annotated[float, Field(ge=0, lt=1)]",
        "Fraction01 = Annotated[float, Field(ge=0, le=1)]",
        (CONFIG,),
    ),
    Mutant("status 1 for a user's mistake", "cli.py", "status = error.exit_status", "status = 1", (CLI,)),
    Mutant("the last override is lost", "cli.py", "    while rest:", "    while len(rest) > 2:", (CLI,)),
    # Layouts
    Mutant("heads of keys may be cut", "layout_rules.py", "shape.kv_heads % tp == 0 or", "shape.kv_heads or", (RULES,)),
    Mutant(
        "zero bubbles that never idle",
        "pipeline_costs.py",
        "idle = max(p - 1, 4 * p - 2 * m - 2)",
        "idle = 0",
        (PIPELINES,),
    ),
    Mutant("pairs of passes cost one", "pipeline_costs.py", "idle = 2 * (p - 1)", "idle = p - 1", (PIPELINES,)),
    Mutant(
        "micro-batches that are missing", "pipeline_costs.py", "missing = max(0, p - m)", "missing = 0", (PIPELINES,)
    ),
    Mutant("one activation less", "pipeline_costs.py", "v * p + 1)", "v * p)", (PIPELINES,)),
    Mutant(
        "a rank's share not asked", "footprint.py", "(_FLOAT8_MULTIPLE * tp) == 0", "_FLOAT8_MULTIPLE == 0", (FLOAT8,)
    ),
    Mutant("gathered as before the cast", "footprint.py", "(1 if cast else work.bytes_per_number)", "2", (FLOAT8,)),
    Mutant("offloaded and kept", "footprint.py", "0 if work.offloaded else", "", (FLOAT8,)),
    Mutant("a tied head is counted", "footprint.py", "if not shape.tied:", "if shape.vocab_size:", (FOOTPRINT,)),
    Mutant("biases are not counted", "footprint.py", "if shape.qkv_bias else ()", "if False else ()", (FOOTPRINT,)),
    Mutant("head norms keep nothing", "footprint.py", "if shape.qk_norm else 0)", "if False else 0)", (FOOTPRINT,)),
    Mutant("a sample without its last token", "data/megatron_order.py", "until + 1 if", "until if", (ORDER,)),
    Mutant(
        "samples unshuffled",
        "data/megatron_order.py",
        "sample = int(self._order.shuffle.read(number, 1)[0])",
        "sample = number",
        (ORDER,),
    ),
    Mutant(
        "later documents not whole", "data/megatron_order.py", "offset if place == first else 0", "offset", (ORDER,)
    ),
    Mutant("indices unchecked on open", "data/megatron_order.py", "        self._order.check()\n", "", (ORDER,)),
    Mutant("overlapping sequences", "data/presequenced.py", "number * (seq_len + 1)", "number * seq_len", (FORMATS,)),
    Mutant("rest of a sequence taken", "data/presequenced.py", "if tokens % (seq_len + 1):", "if False:", (FORMATS,)),
    Mutant("halves of ids", "data/raw.py", "(vocab_size - 1) >> 16", "-1", (FORMATS,)),
    Mutant("odd lengths", "data/raw.py", "if size_bytes % asked.itemsize:", "if False:", (FORMATS,)),
    Mutant("order outside the recipe", "planning.py", "        **_own_orders(config, weighed),\n", "", (FORMATS,)),
    Mutant("stored order shuffled", "data/loader.py", "within if stored else permuted", "permuted", (FORMATS, ORDER)),
    Mutant("any tokenizer", "data/inventory.py", "made.fingerprint != ours", "False", (MADE_BY,)),
    # Comparisons
    Mutant(
        "arms measured on other windows share their stages",
        "arms.py",
        "return same and ours.validation == theirs.validation and ours.tokenizer.path == theirs.tokenizer.path",
        "return same and ours.tokenizer.path == theirs.tokenizer.path",
        (SWEEP,),
    ),
    Mutant(
        "keys are not crossed",
        "config_sweep.py",
        "for parts in itertools.product(*axes)]",
        "for parts in zip(*axes)]",
        (SWEEP,),
    ),
    Mutant(
        "the turn to train what is shared is never waited for",
        "sweep.py",
        "fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n            break",
        "break",
        (SWEEP,),
    ),
    Mutant(
        "the last measurement in place of the final window",
        "comparison.py",
        'losses = {**stage["after"], **stage["final_loss"]}',
        'losses = dict(stage["after"])',
        (PAGE,),
    ),
    Mutant(
        "a stage's tokens are counted from its own beginning",
        "report.py",
        'return int((before + step) * self.plan["step_tokens"])',
        'return int(step * self.plan["step_tokens"])',
        (PAGE,),
    ),
    Mutant(
        "the union has the last stage's steps",
        "baselines.py",
        "steps = sum(stage.steps for stage in plan.stages)",
        "steps = plan.stages[-1].steps",
        (BASELINES,),
    ),
    Mutant("a tenth of the peak has not decayed", "advice.py", "_DECAYED = 0.5", "_DECAYED = 0.05", (ADVICE,)),
    # Evaluation
    Mutant(
        "a cached query sees itself not",
        "models/cached.py",
        "seen_BLS = behind_BLS >= 0",
        "seen_BLS = behind_BLS > 0",
        (INFERENCE,),
    ),
    Mutant(
        "a window one longer with a cache",
        "models/cached.py",
        "behind_BLS < plain.window",
        "behind_BLS <= plain.window",
        (INFERENCE,),
    ),
    Mutant(
        "finished sequences keep the others' keys",
        "models/cached.py",
        "getattr(core, name)[rows]",
        "getattr(core, name)[: len(rows)]",
        (INFERENCE,),
    ),
    Mutant(
        "scored from one position too early",
        "inference.py",
        "for position in range(len(tokens) - scored, len(tokens))",
        "for position in range(len(tokens) - scored - 1, len(tokens) - 1)",
        (INFERENCE,),
    ),
    Mutant(
        "a context cut at its end",
        "inference.py",
        "(context + continuation)[-(opened.max_length + 1) :]",
        "(context + continuation)[: opened.max_length + 1]",
        (INFERENCE,),
    ),
    Mutant(
        "top_p without the token that reaches it",
        "generation.py",
        "(reached_BV < sampling.top_p).sum(-1) + 1)",
        "(reached_BV < sampling.top_p).sum(-1)).clamp(min=1)",
        (INFERENCE,),
    ),
    Mutant(
        "draws that depend on the batch",
        "generation.py",
        "[_draws(sampling.seed, prompt) for prompt in prompts]",
        "[_draws(sampling.seed, prompts[0]) for prompt in prompts]",
        (INFERENCE,),
    ),
    Mutant(
        "pairs of other samples",
        "scores.py",
        "before.documents == after.documents and",
        "",
        (SCORES,),
    ),
    Mutant("error of a sum, not of a mean", "scores.py", "* (len(changes) - 1)))", "))", (SCORES,)),
    # Checkpoints and faults
    Mutant(
        "an index that names any file", "checkpoint_files.py", "Path(part.file).name != part.file", "False", (FILES,)
    ),
    Mutant(
        "a tensor with a gap",
        "checkpoint_files.py",
        "if sum(math.prod(part.shape) for part in parts) != math.prod(shape):",
        "if False:",
        (FILES,),
    ),
    Mutant(
        "another dtype is cast in silence",
        "checkpoint_files.py",
        "if (found.dtype, found.shape) != (target.dtype, target.shape):",
        "if found.shape != target.shape:",
        (FILES,),
    ),
    Mutant(
        "the last byte of each block is not hashed",
        "checkpoint_files.py",
        "self._digest.update(block)",
        "self._digest.update(block[:-1])",
        (FILES,),
    ),
    Mutant("files are not synced", "checkpoint_files.py", "os.fsync(self._descriptor)", "pass", (DISK,)),
    Mutant(
        "a run goes on past a stage's end that it could not save",
        "checkpoint.py",
        'self._needed = record["kind"] != INTERVAL',
        "self._needed = False",
        (DISK,),
    ),
    Mutant(
        "a vanished folder is made anew",
        "checkpoint.py",
        "folder.parent.mkdir(exist_ok=True)",
        "folder.parent.mkdir(parents=True, exist_ok=True)",
        (DISK,),
    ),
    Mutant("some files are nobody's share", "manifest.py", "[share::of]", "[share :: of + 1]", (CRASHES,)),
    Mutant(
        "a bad gradient behind a good loss",
        "optimizer.py",
        "torch.isfinite(loss) & torch.isfinite(grad_norm)",
        "torch.isfinite(loss)",
        (NUMBERS,),
    ),
    Mutant(
        "skips are forgotten by a resume",
        "train.py",
        'parts.skips.recall(found.manifest.get("skipped"))',
        "pass",
        (NUMBERS,),
    ),
    Mutant("an id without limit", "data/tokenizer.py", "not 0 <= number < _IDS", "False", (UNTRUSTED,)),
    Mutant(
        "determinism is promised to any torch",
        "parts.py",
        '"torch": torch.__version__}\n    changed',
        "}\n    changed",
        (DISK,),
    ),
)


def main(words: list[str]) -> int:
    """Apply each mutant, run its tests, tell what survived; returns the exit status."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.file for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            _copy(ROOT / name, copy / name)
        for tests in sorted({tests for mutant in chosen for tests in mutant.tests}):
            if not _pass(copy, tests):
                print(f"tests/{tests} fails without any mutant: mend that first")
                return 2
        survivors = [mutant for mutant in chosen if not _killed(copy, mutant)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    return 1 if survivors else 0


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def _killed(copy: Path, mutant: Mutant) -> bool:
    path = copy / "titan_cpt" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        print(
            f"STALE     {mutant.file}: {mutant.what}: the text stands there {text.count(mutant.old)} times", flush=True
        )
        return False
    path.write_text(text.replace(mutant.old, mutant.new))
    blind = [tests for tests in mutant.tests if _pass(copy, tests)]
    path.write_text(text)
    print(f"{'SURVIVED ' if blind else 'killed   '} {mutant.file}: {mutant.what}", *blind, flush=True)
    return not blind


def _pass(copy: Path, tests: str) -> bool:
    """Whether the tests pass on the copy. No byte code is written: it would outlive a fault made in the same second."""
    command = [sys.executable, "-c", "import pytest; raise SystemExit(pytest.main())"]
    command += ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--hypothesis-profile", "mutants"]
    command += [str(path) for path in sorted((copy / "tests").glob(tests))]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run tests/{tests}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
