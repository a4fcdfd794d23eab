"""How a plan is made: from a config, a world size and what is known of the data.

Pure. Only here do tokens turn into steps, shares of a stage into positions, and stages into a lineage of weights and
cursors. Faults are gathered over all stages and raised together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from titan_cpt.common.numbers import parse_steps, parse_tokens
from titan_cpt.config.datasets import OWN_ORDER, DatasetConfig
from titan_cpt.config.lr import ConstantLR, CosineLR, InfiniteCosineLR, InfiniteInvSqrtLR, InvSqrtLR, LinearLR, WsdLR
from titan_cpt.config.schema import Config, StageConfig
from titan_cpt.data.inventory import DataInventory
from titan_cpt.data.mixture import Fork, Leaf, Tree, huffman_tree, leaf_counts, round_fraction
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.errors import PlanError
from titan_cpt.models.registry import named_size
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning import lr_schedules
from titan_cpt.planning.input_notes import input_notes
from titan_cpt.planning.memory import footprint
from titan_cpt.planning.parallel import MemoryInputs, parallel_dims_of
from titan_cpt.planning.parallel_rules import parallel_problems
from titan_cpt.planning.plan import AdamWHyperparameters, DatasetUse, Plan, StageCheckpoint, StagePlan, TrainingHistory
from titan_cpt.planning.stage_notes import stage_notes

DEFAULT_MIN_DIVISOR = 10  # the paper's eta_min = 0.1 * eta_max


def make_plan(config: Config, inventory: DataInventory, world_size: int = 1) -> Plan:
    """Work the config out for `world_size` ranks.

    Raises:
        ConfigError: a model that cannot be.
        PlanError: every stage or batch that cannot be carried out as asked, all at once.
    """
    spec = named_size(
        config.model.family,
        config.model.size,
        inventory.vocab_size or 1,
        config.parallelism.tensor_parallel_degree,
        config.model.model_dump(exclude={"family", "size"}, exclude_none=True),
    )
    faults: list[str] = list(parallel_problems(config, spec, world_size))
    notes = list(input_notes(config, inventory, spec))
    layout = (
        ParallelDims() if faults else parallel_dims_of(config, world_size)
    )  # a layout that cannot be has no accumulation
    per_step = layout.data_parallel * config.training.local_batch_size
    if config.training.global_batch_size % per_step:
        faults.append(
            f"training.global_batch_size: {config.training.global_batch_size} is not a multiple of data-parallel ranks "
            f"({layout.data_parallel}) x training.local_batch_size ({config.training.local_batch_size}) = {per_step}: "
            "change one of the two, or the number of ranks"
        )
    planner = _Planner(config, inventory, faults, notes)
    stages = planner.stages()
    notes += [] if faults else stage_notes(stages)
    if faults:
        raise PlanError(
            "\n".join(
                [
                    f"{len(faults)} problem{'s' * (len(faults) > 1)} in the plan of {config.job.name!r}:",
                    *(f"  - {fault}" for fault in faults),
                ]
            )
        )
    return Plan(
        name=config.job.name,
        spec=spec,
        stages=stages,
        seed=config.job.seed,
        seq_len=config.training.seq_len,
        global_batch_size=config.training.global_batch_size,
        local_batch_size=config.training.local_batch_size,
        parallel_dims=layout,
        footprint=footprint(spec, layout, _work(config, layout, config.training.global_batch_size // per_step)),
        gradient_accumulation_steps=config.training.global_batch_size // per_step,
        sequences=planner.sequences,
        base_recipe=_base_recipe(config, spec),
        notes=tuple(notes),
    )


def _work(config: Config, layout: ParallelDims, accumulation: int) -> MemoryInputs:
    kept = config.activation_checkpoint
    rows = config.training.local_batch_size // layout.microbatches
    return MemoryInputs(
        microbatch_tokens=rows * config.training.seq_len // layout.cp,
        accumulation=accumulation,
        bytes_per_number=2 if config.training.mixed_precision_param == "bfloat16" else 4,
        recompute=kept.mode,
        selection=kept.selective_ac_option,
        memory_budget=kept.memory_budget,
        offloaded=config.training.enable_cpu_offload,
        float8_filter_fqns=config.float8.filter_fqns if config.float8.enable_fsdp_float8_all_gather else None,
    )


def _base_recipe(config: Config, spec: ModelSpec) -> dict[str, Any]:
    kept_out = sorted({*config.float8.filter_fqns})
    return {
        **spec.as_recipe(),
        "job.seed": config.job.seed,
        "training.global_batch_size": config.training.global_batch_size,
        "training.seq_len": config.training.seq_len,
        "training.max_norm": config.training.max_norm,
        "training.mixed_precision_param": config.training.mixed_precision_param,
        **({"tokenizer.add_bos": True} if config.tokenizer.add_bos else {}),
        **({"float8.recipe_name": config.float8.recipe_name} if config.float8.recipe_name else {}),
        **({"float8.filter_fqns": kept_out} if config.float8.recipe_name and kept_out else {}),
    }


class _Planner:
    """Walks the stages in order, carrying each one's lineage; faults are gathered, not raised."""

    def __init__(self, config: Config, inventory: DataInventory, faults: list[str], notes: list[str]) -> None:
        self.config, self.faults, self.notes = config, faults, notes
        self.tokens = inventory.tokens
        self.batch = config.training.global_batch_size
        self.seq_len = config.training.seq_len
        self.own_sequences = inventory.sequences
        self.sequences = {name: self._windows(name, tokens) for name, tokens in inventory.tokens.items()}
        for name, held_out in inventory.validation_tokens.items():
            if held_out is not None and held_out <= self.seq_len:
                faults.append(
                    f"{_table(name)}.validation: {held_out} tokens are fewer than one sequence of {self.seq_len} + 1; "
                    "give it more, or leave it out"
                )
        self.done: dict[str, StagePlan] = {}

    def stages(self) -> tuple[StagePlan, ...]:
        for stage in self.config.stages:
            self.done[stage.name] = self._stage(stage)
            self._note_orders_that_end(self.done[stage.name])
        return tuple(self.done.values())

    def _note_orders_that_end(self, stage: StagePlan) -> None:
        """An order that somebody trained in is followed once; what comes behind its end is our own repetition."""
        for leaf, count in leaf_counts(stage.tree, stage.steps * self.batch).items():
            sequences = self.own_sequences.get(leaf.source, 0)
            if not leaf.replayed and leaf.first < sequences < leaf.first + count:
                self.notes.append(
                    f"stages.{stage.name}: the stored order of {leaf.source} ends after {sequences} sequences, "
                    f"{leaf.first + count} are asked for: it begins again"
                )

    def _windows(self, source: str, tokens: int | None) -> int | None:
        if self.own_sequences.get(source):
            return self.own_sequences[source]
        if tokens is not None and tokens <= self.seq_len:
            self.faults.append(
                f"{_table(source)}.train: {tokens} tokens are fewer than one sequence of {self.seq_len} + 1"
            )
            return None
        return None if tokens is None else (tokens - 1) // self.seq_len

    def _stage(self, stage: StageConfig) -> StagePlan:
        steps = stage.steps or math.ceil(Fraction(stage.tokens or 0, self.batch * self.seq_len))
        end_points = _end_points(stage, steps, self.batch * self.seq_len)
        schedule = self._schedule(stage, steps, end_points)
        init = self._init(stage)
        before = self._history(init)
        new = self._spread(_mix(stage.dataset), replayed=False, before=before, stage=stage)
        replay = self._replay(stage, before, init)
        tree, shares = _tree(stage, new, replay)
        plan = StagePlan(
            name=stage.name,
            steps=steps,
            datasets=tuple(stage.dataset),
            schedule=schedule,
            init=init,
            keep_optimizer=stage.optimizer_state == "keep",
            optimizer=_adamw_numbers(self.config, stage),
            pre_anneal_step=_pre_anneal_step(stage, steps, end_points),
            history=before,
            tree=tree,
            shares=shares,
            use_by_dataset=self._use(tree, steps, by_dataset=True),
            use_by_source=self._use(tree, steps, by_dataset=False),
            final_window=final_window(
                steps, self.config.validation.final_window_steps, self.config.validation.final_window_every
            ),
            recipe=_stage_recipe(stage, self.config, steps, end_points, init),
        )
        self._check_replay_lasts(plan, stage)
        return plan

    def _schedule(self, stage: StageConfig, steps: int, end_points: Mapping[str, Fraction]) -> lr_schedules.Schedule:
        try:
            return _schedule(stage, steps, end_points)
        except ValueError as error:
            self.faults.append(f"stages.{stage.name}.lr: {error}")
            return lr_schedules.constant(warmup_until=0, end=steps, peak=1.0)

    def _init(self, stage: StageConfig) -> StageCheckpoint | str:
        """Where the stage's weights come from; references were checked with the config."""
        earlier = list(self.done.values())
        init = stage.init or ("previous" if earlier else "random")
        if init == "previous":
            last = earlier[-1]
            infinite = next(s for s in self.config.stages if s.name == last.name).lr.schedule.startswith("infinite")
            return StageCheckpoint(
                last.name, last.steps if last.pre_anneal_step is None or not infinite else last.pre_anneal_step
            )
        if not init.startswith("stage:"):
            return init
        name, _, point = init.removeprefix("stage:").partition("@")
        base = self.done[name]
        if not point:
            return StageCheckpoint(name, base.steps)
        if base.pre_anneal_step is None:
            self.faults.append(
                f"stages.{stage.name}.init: stage {name!r} has no annealing, so no pre-anneal point: write "
                f"stage:{name} for its end, or give it an infinite or wsd schedule"
            )
            return StageCheckpoint(name, base.steps)
        return StageCheckpoint(name, base.pre_anneal_step)

    def _history(self, init: StageCheckpoint | str) -> TrainingHistory:
        if isinstance(init, str):
            return TrainingHistory(0, {}, {}, {})
        stage = self.done[init.stage]
        items = init.steps_done * self.batch
        trained, replayed = dict(stage.history.trained), dict(stage.history.replayed)
        for leaf, count in leaf_counts(stage.tree, items).items():
            (replayed if leaf.replayed else trained)[leaf.source] = leaf.first + count
        exposure = dict(stage.history.exposure)
        for name, share in stage.shares.items():
            exposure[name] = round_fraction(exposure.get(name, Fraction(0)) + share * items)
        return TrainingHistory(stage.history.steps + init.steps_done, trained, replayed, exposure)

    def _spread(
        self, weights: Mapping[str, Fraction], *, replayed: bool, before: TrainingHistory, stage: StageConfig
    ) -> dict[Leaf, Fraction]:
        """Leaves of the datasets, those with domains spread over them; the weights' sum is kept."""
        leaves: dict[Leaf, Fraction] = {}
        for name in sorted(weights):
            for source, share in _domain_shares(name, self.config.datasets[name]).items():
                leaves[self._leaf(source, replayed, before, stage)] = weights[name] * share
        return leaves

    def _leaf(self, source: str, replayed: bool, before: TrainingHistory, stage: StageConfig) -> Leaf:
        if not replayed:
            return Leaf(source, False, first=before.trained.get(source, 0))
        assert stage.replay is not None, "a replayed leaf needs a replay table"
        key = f"{self.config.job.seed}/replay/{source}" if stage.replay.order == "reshuffled" else ""
        # A dataset that these weights never met here (a hub model's) counts as seen once, whole.
        seen = before.trained[source] if source in before.trained else self.sequences.get(source)
        return Leaf(source, True, first=before.replayed.get(source, 0), seen=seen, reshuffle_key=key)

    def _replay(self, stage: StageConfig, before: TrainingHistory, init: StageCheckpoint | str) -> dict[Leaf, Fraction]:
        if stage.replay is None or stage.replay.fraction == 0:
            return {}
        self._check_was_seen(stage, before, init)
        weights = self._replay_weights(stage, before)
        return self._spread(weights, replayed=True, before=before, stage=stage) if weights else {}

    def _replay_weights(self, stage: StageConfig, before: TrainingHistory) -> dict[str, Fraction]:
        """Relative weights of the replayed datasets: tokens of each trained on so far, replay included."""
        assert stage.replay is not None, "asked for a replay's weights where there is none"
        asked = stage.replay.from_
        where = f"stages.{stage.name}.replay.from"
        if isinstance(asked, dict):
            return _mix(asked)
        if asked is None:
            weights = {name: seen for name, seen in before.exposure.items() if seen and name not in stage.dataset}
            if not weights:
                self.faults.append(
                    f"{where}: these weights have not been trained on other data yet, so there is nothing to replay: "
                    "remove replay, or name datasets here"
                )
            return weights
        weights = {name: before.exposure.get(name, Fraction(0)) for name in asked}
        if len(asked) == 1:
            return {asked[0]: Fraction(1)}
        unseen = [name for name, weight in weights.items() if not weight]
        if unseen:
            self.faults.append(
                f"{where}: {unseen[0]!r} was not trained on in this run, so nothing says how much of it to replay: "
                f"give weights, such as {{ {', '.join(f'{name} = 1.0' for name in asked)} }}"
            )
            return {}
        return weights

    def _check_was_seen(self, stage: StageConfig, before: TrainingHistory, init: StageCheckpoint | str) -> None:
        """Data of a later stage cannot be replayed by weights that began at random; other unseen data is a note."""
        assert stage.replay is not None, "asked about a replay where there is none"
        while isinstance(init, StageCheckpoint):
            init = self.done[init.stage].init
        if init != "random":
            return  # weights from elsewhere may have been trained on anything
        names = [each.name for each in self.config.stages]
        later = {name: each.name for each in self.config.stages[names.index(stage.name) :] for name in each.dataset}
        where = f"stages.{stage.name}.replay.from"
        for name in stage.replay.from_ or ():
            if before.exposure.get(name) or name in stage.dataset:
                continue
            if name in later:
                self.faults.append(
                    f"{where}: {name!r} was not seen before this stage: these weights began at random, and the first "
                    f"stage that trains on it is {later[name]!r}; replay what was seen, or make it part of dataset"
                )
            else:
                self.notes.append(
                    f"{where}: {name!r} was never trained on by these weights: it is new data, not replay"
                )

    def _check_replay_lasts(self, plan: StagePlan, stage: StageConfig) -> None:
        for leaf, count in leaf_counts(plan.tree, plan.steps * self.batch).items():
            if not leaf.replayed or leaf.seen is None or leaf.first + count <= leaf.seen:
                continue
            assert stage.replay is not None, "a replayed leaf needs a replay table"
            where = f"stages.{stage.name}.replay"
            need = f"{leaf.first + count} sequences of {leaf.source!r} would be replayed in all, {leaf.seen} were seen"
            if leaf.seen == 0:
                self.faults.append(f"{where}: {need}; raise its weight or that stage's steps, or name others in from")
            elif stage.replay.on_exhausted == "error":
                self.faults.append(f'{where}: {need}; lower {where}.fraction or set on_exhausted = "repeat"')
            else:
                self.notes.append(f"{where}: {need}; they repeat, as on_exhausted asks")

    def _use(self, tree: Tree, steps: int, *, by_dataset: bool) -> dict[str, DatasetUse]:
        new: dict[str, int] = {}
        old: dict[str, int] = {}
        known: dict[str, int | None] = {}
        for leaf, count in leaf_counts(tree, steps * self.batch).items():
            name = leaf.source.partition(".")[0] if by_dataset else leaf.source
            into = old if leaf.replayed else new
            into[name] = into.get(name, 0) + count * self.seq_len
        for source, tokens in self.tokens.items():
            name = source.partition(".")[0] if by_dataset else source
            so_far = known.get(name, 0)
            known[name] = None if tokens is None or so_far is None else so_far + tokens
        use = {}
        for name in sorted({*new, *old}):
            tokens, size = new.get(name, 0) + old.get(name, 0), known.get(name)
            use[name] = DatasetUse(tokens, old.get(name, 0), tokens / size if size else None)
        return use


def _table(source: str) -> str:
    return f"datasets.{source.replace('.', '.domains.')}"


def _mix(names: Sequence[str] | Mapping[str, float]) -> dict[str, Fraction]:
    """Exact weights that sum to 1; a number counts as the decimal that was written."""
    weights = {name: Fraction(str(weight)) for name, weight in names.items()} if isinstance(names, Mapping) else {}
    weights = weights or dict.fromkeys(names, Fraction(1))
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _domain_shares(name: str, dataset: DatasetConfig) -> dict[str, Fraction]:
    if not dataset.domains:
        return {name: Fraction(1)}
    shares = _mix({domain: table.weight for domain, table in dataset.domains.items()})
    return {f"{name}.{domain}": shares[domain] for domain in sorted(shares)}


def _tree(
    stage: StageConfig, new: Mapping[Leaf, Fraction], replay: Mapping[Leaf, Fraction]
) -> tuple[Tree, dict[str, Fraction]]:
    """The stage's tree, and each dataset's exact share of its sequences."""
    fraction = Fraction(str(stage.replay.fraction)) if stage.replay and replay else Fraction(0)
    shares: dict[str, Fraction] = {}
    for leaves, whole in ((replay, fraction), (new, 1 - fraction)):
        total = sum(leaves.values())
        for leaf, weight in leaves.items():
            name = leaf.source.partition(".")[0]
            shares[name] = shares.get(name, Fraction(0)) + whole * weight / total
    tree = Fork(fraction, huffman_tree(replay), huffman_tree(new)) if replay else huffman_tree(new)
    return tree, shares


def _end_points(stage: StageConfig, steps: int, step_tokens: int) -> dict[str, Fraction]:
    """The schedule's end points in steps, exact: 0.29 of 100 steps is step 29 and not 28.999..."""
    names = ("warmup_until", "cooldown_until", "constant_until", "decay_from", "timescale")
    found = {name: getattr(stage.lr, name) for name in names if hasattr(stage.lr, name)}
    points = {}
    for name, value in found.items():
        if isinstance(value, str):
            between = value.endswith(" steps")
            points[name] = parse_steps(value) if between else Fraction(parse_tokens(value), step_tokens)
        else:
            points[name] = Fraction(str(value)) * steps if isinstance(value, float) else Fraction(value)
    return points


def _final_lr(stage: StageConfig) -> float:
    lr = stage.lr
    if isinstance(lr, ConstantLR):
        return lr.max
    top = lr.constant if isinstance(lr, InfiniteCosineLR | InfiniteInvSqrtLR) and lr.max is None else lr.max
    assert top is not None, "every schedule has a highest LR"
    return top / DEFAULT_MIN_DIVISOR if lr.min is None else lr.min


def _schedule(stage: StageConfig, steps: int, end_points: Mapping[str, Fraction]) -> lr_schedules.Schedule:
    lr, final = stage.lr, _final_lr(stage)
    at = {name: float(point) for name, point in end_points.items()}
    match lr:
        case CosineLR():
            return lr_schedules.cosine(**at, end=steps, peak=lr.max, final=final)
        case LinearLR():
            return lr_schedules.linear(**at, end=steps, peak=lr.max, final=final)
        case ConstantLR():
            return lr_schedules.constant(**at, end=steps, peak=lr.max)
        case InfiniteCosineLR() | InfiniteInvSqrtLR():
            return lr_schedules.infinite(
                **at,
                cooldown="cosine" if isinstance(lr, InfiniteCosineLR) else "inv_sqrt",
                alpha=lr.alpha if isinstance(lr, InfiniteInvSqrtLR) else 1.0,
                end=steps,
                peak=lr.constant if lr.max is None else lr.max,
                constant_lr=lr.constant,
                final=final,
            )
        case WsdLR():
            return lr_schedules.wsd(**at, end=steps, peak=lr.max, final=final, decay=lr.decay)
        case InvSqrtLR():
            return lr_schedules.inv_sqrt(**at, end=steps, peak=lr.max, floor=final)


def _pre_anneal_step(stage: StageConfig, steps: int, end_points: Mapping[str, Fraction]) -> int | None:
    point = end_points.get("constant_until", end_points.get("decay_from"))
    return None if point is None or point >= steps else math.floor(point)


def final_window(steps: int, span: int, every: int) -> tuple[int, ...]:
    """Steps done at which the final loss is sampled: every `every` over the last `span` steps, the last one included.

    With 100 and 10 there are ten: the mean over the last 100 iterations sampled every 10 of METHOD section 5.
    """
    return tuple(sorted(steps - back for back in range(0, span, every) if steps - back > 0))


def _adamw_numbers(config: Config, stage: StageConfig) -> AdamWHyperparameters:
    numbers = config.optimizer.model_dump(exclude={"name"})
    numbers |= stage.optimizer.model_dump(exclude_none=True) if stage.optimizer else {}
    return AdamWHyperparameters((numbers["beta1"], numbers["beta2"]), numbers["eps"], numbers["weight_decay"])


def _stage_recipe(
    stage: StageConfig, config: Config, steps: int, end_points: Mapping[str, Fraction], init: StageCheckpoint | str
) -> dict[str, Any]:
    """Listed by hand, so that renaming a key or adding one does not orphan checkpoints. Paths of data are not in it."""
    numbers = _adamw_numbers(config, stage)
    lr = stage.lr.model_dump(exclude_none=True) | {name: str(point) for name, point in end_points.items()}
    replay = stage.replay if stage.replay and stage.replay.fraction else None
    weights = (replay.from_ if replay else None) or ()
    weighed = sorted({*stage.dataset, *weights})
    return {
        "steps": steps,
        "dataset": {name: str(weight) for name, weight in sorted(_mix(stage.dataset).items())},
        "domain_weights": {
            name: {domain: table.weight for domain, table in sorted(config.datasets[name].domains.items())}
            for name in weighed
            if config.datasets[name].domains
        },
        **_own_orders(config, weighed),
        "init": init if isinstance(init, str) else f"{init.stage}@{init.steps_done}",
        "optimizer_state": stage.optimizer_state,
        "optimizer.beta1": numbers.betas[0],
        "optimizer.beta2": numbers.betas[1],
        "optimizer.eps": numbers.eps,
        "optimizer.weight_decay": numbers.weight_decay,
        **{f"lr.{key}": value for key, value in sorted(lr.items())},
        "lr.min": _final_lr(stage),
        "replay.fraction": replay.fraction if replay else 0.0,
        "replay.from": {name: str(weight) for name, weight in sorted(_mix(weights).items())}
        if isinstance(weights, dict)
        else sorted(weights),
        "replay.order": replay.order if replay else "as_trained",
    }


def _own_orders(config: Config, names: Sequence[str]) -> dict[str, str]:
    """How the sequences of a source come about, where they are not permuted windows of its stream."""
    orders = {}
    for name in names:
        dataset = config.datasets[name]
        for source, table in {name: dataset, **{f"{name}.{d}": t for d, t in dataset.domains.items()}}.items():
            if table.format in OWN_ORDER or table.in_stored_order:
                kind = table.format if table.format in OWN_ORDER else "windows"
                orders[f"order.{source}"] = f"{kind}, {'as stored' if table.in_stored_order else 'shuffled'}"
    return orders
