"""PREDICT step times on GPUs that were never used, from FLOPs, bytes of each collective and the pipeline bubble.

    python scripts/scale/predict.py

Nothing here was measured on a GPU. FLOPs, bytes and bubble are the plan's (scripts/scale/traced.py compares the bytes
with a traced step). `MACHINES` and `ASSUMED` are the assumptions about hardware, chosen before the comparison with
torchtitan's published figures for Llama 3 8B (FSDP2, batch 2 x 8192 a rank, selective recomputation by operator). The
predictions are far too fast. So each figure is printed twice: as assumed, and with `compute` stretched by the factor
that makes the 8-GPU figures right, which leaves the 128-GPU figures as a test.

    products    = FLOPs of matrix products, recomputed ones included, / (peak x gemm share)
    attention   = FLOPs of causal attention / (peak x attention share)
    elsewhere   = bytes read and written by other operators / memory bandwidth
    compute     = (products + attention + elsewhere) / (1 - bubble)
    step        = max(compute, FSDP's traffic) + open: tensor, context and pipeline traffic, which is not overlapped
"""

from __future__ import annotations

from dataclasses import dataclass

from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.models.registry import named_size
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.memory import footprint
from titan_cpt.planning.model_spec import padded_vocab
from titan_cpt.planning.parallel import MemoryInputs


@dataclass(frozen=True)
class Machine:
    """Assumptions about one GPU and its network; bytes/s in one direction."""

    name: str
    peak_flops: float
    memory_bandwidth: float
    node: int
    inside_node: float
    between_nodes: float


# Data sheets: H100 SXM, NVLink 4 and 400 Gb/s InfiniBand a GPU; V100 of Summit, 6 a node, NVLink 2 and two EDR rails.
MACHINES = {
    "H100": Machine("H100 SXM", 989e12, 3.35e12, 8, 450e9, 50e9),
    "V100": Machine("V100 of Summit", 125e12, 0.9e12, 6, 50e9, 25e9 / 6),
}
ASSUMED = {
    "gemm share of the peak": 0.65,
    "attention share of the peak": 0.35,
    "share of a link's bandwidth": 0.75,
    "share of the memory bandwidth": 0.8,
    "passes over the residual stream a layer, plain": 60,
    "passes over the residual stream a layer, compiled": 24,
}


@dataclass(frozen=True)
class Run:
    """A model on a machine."""

    title: str
    spec: ModelSpec
    machine: Machine
    layout: ParallelDims
    seq_len: int
    local_batch: int
    accumulation: int = 1
    recompute: str = "selective"
    compiled: bool = True
    published: float | None = None


def predicted(run: Run, stretch: float = 1.0) -> dict[str, float]:
    """Seconds of a step and of its parts, with `compute` stretched by `stretch`; tokens/s of one GPU; MFU."""
    spec, layout, machine = run.spec, run.layout, run.machine
    work = MemoryInputs(
        microbatch_tokens=run.local_batch * run.seq_len // layout.cp // layout.microbatches,
        accumulation=run.accumulation,
        bytes_per_number=2,
        recompute=run.recompute,
        selection="op",
        memory_budget=0.5,
    )
    costs = footprint(spec, layout, work)
    tokens = run.local_batch * run.seq_len * run.accumulation / (layout.tp * layout.pp * layout.cp)  # of one GPU
    width = spec.attention_width
    attention = 6 * spec.layers * width * run.seq_len * tokens  # causal: half of 12 L D S
    products = spec.flops_per_token(run.seq_len) * tokens - 2 * attention
    again = {"none": 0.0, "selective": 1 / 6, "full": 1 / 3}[run.recompute]
    passes = ASSUMED[f"passes over the residual stream a layer, {'compiled' if run.compiled else 'plain'}"]
    moved = passes * 2 * spec.width * spec.layers * tokens * (1 + again)
    times = {
        "products": products * (1 + again) / (machine.peak_flops * ASSUMED["gemm share of the peak"]),
        "attention": attention / (machine.peak_flops * ASSUMED["attention share of the peak"]),
        "elsewhere": moved / (machine.memory_bandwidth * ASSUMED["share of the memory bandwidth"]),
    }
    compute = sum(times.values()) / (1 - costs.bubble) * stretch

    def link(span: int, neighbours: int) -> float:
        """Bytes/s of a ring over `span` consecutive ranks of which every `neighbours`-th takes part.

        Rings of one group leave a node by the network cards of all its members there.
        """
        outside = machine.between_nodes * max(1, machine.node // neighbours)
        speed = machine.inside_node if span <= machine.node else min(machine.inside_node, outside)
        return speed * ASSUMED["share of a link's bandwidth"]

    model = layout.tp * layout.cp
    sharded = costs.traffic.fsdp / link(model * layout.data_parallel, layout.tp)
    open_s = costs.traffic.tensor / link(layout.tp, 1) + costs.traffic.context / link(model, layout.tp)
    open_s += costs.traffic.pipeline / link(layout.world_size, machine.node)
    step = max(compute, sharded) + open_s
    return {
        **times,
        "bubble": costs.bubble,
        "compute": compute,
        "fsdp": sharded,
        "open": open_s,
        "step": step,
        "tokens_per_s": tokens / step,
        "mfu": spec.flops_per_token(run.seq_len) * tokens / step / machine.peak_flops,
    }


def published() -> list[Run]:
    """torchtitan's published figures (docs of torchtitan, Llama 3 8B on H100s, tokens/s of one GPU)."""
    spec, machine = named_size("llama", "llama3-8b", 128_256), MACHINES["H100"]
    rows = ((8, False, 5762.0), (8, True, 6667.0), (128, False, 5605.0), (128, True, 6514.0))
    return [
        Run(
            f"Llama 3 8B, {ranks} GPUs" + (", compiled" if compiled else ""),
            spec,
            machine,
            ParallelDims(dp_shard=ranks),
            8192,
            2,
            compiled=compiled,
            published=figure,
        )
        for ranks, compiled, figure in rows
    ]


def predictions() -> list[Run]:
    """The paper's layouts on its machine and on H100s, and larger models on 64 to 1024 GPUs."""
    small, large = named_size("gpt_neox", "405m", 50_304), padded_vocab(named_size("gpt_neox", "10b", 50_688), 6)
    seventy, h100, v100 = named_size("llama", "llama3-70b", 128_256), MACHINES["H100"], MACHINES["V100"]
    ten = named_size("gpt_neox", "10b", 50_688)
    paper = ParallelDims(dp_replicate=69, tp=6, pp=4, microbatches=4)
    runs = [
        Run(
            "paper: 405M, 276 GPUs",
            small,
            v100,
            ParallelDims(dp_replicate=276),
            2048,
            4,
            recompute="none",
            compiled=False,
        ),
        Run("paper: 10B, 1656 GPUs", large, v100, paper, 2048, 16, recompute="full", compiled=False),
        Run("405M, 276 GPUs", small, h100, ParallelDims(dp_replicate=276), 2048, 4, recompute="none"),
        Run("10B, 1656 GPUs, the paper's layout", large, h100, paper, 2048, 16, recompute="none"),
    ]
    for ranks in (64, 256, 1024):
        runs.append(Run(f"10B, {ranks} GPUs, FSDP", ten, h100, ParallelDims(dp_shard=ranks), 2048, 8))
    for ranks in (64, 256, 1024):
        layout = ParallelDims(dp_shard=ranks // 8, tp=8)
        runs.append(Run(f"70B, {ranks} GPUs, FSDP x TP 8", seventy, h100, layout, 8192, 2, recompute="full"))
    return runs


def main() -> None:
    """Print the assumptions and both tables."""
    print("PREDICTIONS: nothing below was measured here. Assumptions:")
    for what, value in ASSUMED.items():
        print(f"  {what}: {value:g}")
    for machine in MACHINES.values():
        print(f"  {machine}")
    small = [run for run in published() if run.layout.world_size == 8]
    stretch = {
        run.compiled: predicted(run)["tokens_per_s"] / run.published for run in small if run.published is not None
    }
    print("\n| torchtitan's published figures | published tokens/s | as assumed | error | stretched | error |")
    print("|---|---|---|---|---|---|")
    for run in published():
        assert run.published is not None, "these have one"
        plain, better = predicted(run)["tokens_per_s"], predicted(run, stretch[run.compiled])["tokens_per_s"]
        print(
            f"| {run.title} | {run.published:,.0f} | {plain:,.0f} | {plain / run.published - 1:+.0%} | {better:,.0f} "
            f"| {better / run.published - 1:+.1%}{' (fitted)' if run in small else ''} |"
        )
    print(f"\nStretch: {stretch[False]:.2f} plain, {stretch[True]:.2f} compiled; fitted on H100s, used for V100s too.")
    print("\n| PREDICTION | machine | step s | products | attention | elsewhere | bubble | FSDP | open | stretched |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for run in predictions():
        t, later = predicted(run), predicted(run, stretch[run.compiled])
        print(
            f"| {run.title} | {run.machine.name} | {t['step']:.2f} | {t['products']:.2f} | {t['attention']:.2f} "
            f"| {t['elsewhere']:.2f} | {t['bubble']:.0%} | {t['fsdp']:.2f} | {t['open']:.2f} | {later['step']:.2f} s, "
            f"{later['tokens_per_s']:,.0f} tokens/s a GPU, MFU {later['mfu']:.0%} |"
        )


if __name__ == "__main__":
    main()
