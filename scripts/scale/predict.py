"""PREDICT step times on GPUs that were never used, from the measured kernels of one GPU, traffic and pipeline bubble.

    python scripts/scale/predict.py

Prints, in this order: MEASURED, a step of two models on one H200 (scale/kernels.py); FITTED, the constants, and their
errors on the model that they were not fitted to; ASSUMED, what nothing here was measured for; a comparison with
torchtitan's published figures for Llama 3 8B (FSDP2, batch 2 x 8192 a rank, selective recomputation by operator); and
the PREDICTIONS. A comparison is printed twice: as calculated, and with `compute` stretched by the factor that makes the
8-GPU figures right, which leaves the 128-GPU figures as a test.

    compute     = (products + attention + memory + gaps) / (1 - bubble)
    step        = max(compute, FSDP's traffic) + open: tensor, context and pipeline traffic, which is not overlapped

Bytes of the collectives and bubble are the plan's (scripts/scale/traced.py compares the bytes with a traced step).
"""

from __future__ import annotations

from dataclasses import dataclass

import kernels

from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.models.common.loss_chunks import logits_chunk
from titan_cpt.models.registry import named_size
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.memory import Footprint, footprint
from titan_cpt.planning.model_spec import padded_vocab
from titan_cpt.planning.parallel import MemoryInputs


@dataclass(frozen=True)
class Machine:
    """One GPU and its network from data sheets; bytes, FLOP/s, and bytes/s in one direction."""

    name: str
    peak_flops: float
    memory_bandwidth: float
    memory: int
    node: int
    inside_node: float
    between_nodes: float


# H100 SXM, NVLink 4 and 400 Gb/s InfiniBand a GPU; V100 of Summit, 6 a node, NVLink 2 and two EDR rails.
MACHINES = {
    "H100": Machine("H100 SXM", 989e12, 3.35e12, 80 * 10**9, 8, 450e9, 50e9),
    "V100": Machine("V100 of Summit", 125e12, 0.9e12, 16 * 10**9, 6, 50e9, 25e9 / 6),
}
H200_FLOPS, H200_BANDWIDTH = 989e12, 4.8e12  # data sheet of the GPU that was measured
LINK_SHARE = 0.75
COPIES = 4 + 4 + 6  # bytes a parameter to and from FSDP's buffers: two all-gathers, and a reduction in float32
ASSUMED = (
    "an H100's and a V100's rates = the H200's x the ratio of the data sheets' FLOP/s (H100: the same) and bandwidths",
    "attention at the rate of 64 features a head and 2,048 tokens, whatever the model has",
    f"{LINK_SHARE:g} of a link's bandwidth; FSDP's traffic is hidden and slows no kernel; latency is 0",
    "recomputation: 1/6 of the products per operator; in full 1/3, and attention's forward; other kernels' forward",
    f"FSDP copies {COPIES} bytes a parameter and forward pass between the parameters and its buffers",
)


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
    fused_head: bool = True
    published: float | None = None


def _work(run: Run, costs: Footprint, rates: kernels.Rates) -> dict[str, float]:
    """Seconds of products, attention, memory-bound kernels and gaps of one GPU, without the pipeline bubble."""
    spec, layout = run.spec, run.layout
    model = layout.tp * layout.pp * layout.cp
    tokens = run.local_batch * run.seq_len * run.accumulation / model
    rounds = run.accumulation * layout.microbatches
    count = kernels.flops(spec, tokens=tokens, seq_len=run.seq_len)
    again = {"none": 0.0, "selective": 1 / 6, "full": 1 / 3}[run.recompute]
    chunks = -(-run.local_batch * run.seq_len * spec.vocab_size // logits_chunk(run.machine.memory))
    chunks = chunks if run.fused_head and model == 1 else 1
    moved = kernels.token_bytes(spec, tokens=tokens, chunks=chunks * run.accumulation, recomputed=again > 0)
    if model > 1:
        moved["head, weight gradient"] /= layout.tp * layout.pp
    local = costs.local_parameters[costs.pipeline_rank]
    moved |= kernels.update_bytes(spec, parameters=local, head_share=local / spec.parameters)
    if layout.dp_shard > 1:
        moved["copies of FSDP"] = COPIES * run.accumulation * spec.parameters / (layout.tp * layout.pp)
    if not run.compiled:
        stream = 2 * spec.width * spec.layers * tokens
        moved["eager"] = rates.eager_passes * stream * (4 / 3 if again else 1)
    forward = count[kernels.FORWARD] * (2 if run.recompute == "full" else 1)
    return {
        "products": count[kernels.PRODUCTS] * (1 + again) / rates.products,
        "attention": forward / rates.attention_forward + count[kernels.BACKWARD] / rates.attention_backward,
        "memory": sum(moved.values()) / rates.bandwidth,
        "gaps": rounds * spec.layers / layout.pp * rates.launches_per_block * rates.gap_s,
    }


def predicted(run: Run, rates: kernels.Rates, stretch: float = 1.0) -> dict[str, float]:
    """Seconds of a step and of its parts, with `compute` stretched by `stretch`; tokens/s of one GPU; MFU."""
    spec, layout, machine = run.spec, run.layout, run.machine
    inputs = MemoryInputs(
        microbatch_tokens=run.local_batch * run.seq_len // layout.cp // layout.microbatches,
        accumulation=run.accumulation,
        bytes_per_number=2,
        recompute=run.recompute,
        selection="op",
        memory_budget=0.5,
    )
    costs = footprint(spec, layout, inputs)
    ratio = machine.peak_flops / H200_FLOPS
    times = _work(run, costs, rates.scaled(flops=ratio, bandwidth=machine.memory_bandwidth / H200_BANDWIDTH))
    compute = sum(times.values()) / (1 - costs.bubble) * stretch
    tokens = run.local_batch * run.seq_len * run.accumulation / (layout.tp * layout.pp * layout.cp)  # of one GPU

    def link(span: int, neighbours: int) -> float:
        """Bytes/s of a ring over `span` consecutive ranks of which every `neighbours`-th takes part.

        Rings of one group leave a node by the network cards of all its members there.
        """
        outside = machine.between_nodes * max(1, machine.node // neighbours)
        speed = machine.inside_node if span <= machine.node else min(machine.inside_node, outside)
        return speed * LINK_SHARE

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
            fused_head=False,
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


def _constants(rates: kernels.Rates) -> list[str]:
    """The constants in readable units."""
    return [
        f"  products {rates.products / 1e12:.0f} TFLOP/s; attention forward {rates.attention_forward / 1e12:.0f}, "
        f"backward {rates.attention_backward / 1e12:.0f} TFLOP/s (causal)",
        f"  memory-bound kernels {rates.bandwidth / 1e12:.2f} TB/s",
        f"  {rates.launches_per_block:.0f} launches a block, {1e6 * rates.gap_s:.1f} us between two",
        f"  eager: {rates.eager_passes:.0f} further reads or writes of the residual stream a block",
    ]


def _compared(rates: kernels.Rates, stretch: dict[bool, float]) -> list[str]:
    """Rows: published, calculated and stretched tokens/s."""
    rows = []
    for run in published():
        assert run.published is not None, "these have one"
        plain = predicted(run, rates)["tokens_per_s"]
        better = predicted(run, rates, stretch[run.compiled])["tokens_per_s"]
        rows.append(
            f"| {run.title} | {run.published:,.0f} | {plain:,.0f} | {plain / run.published - 1:+.0%} | {better:,.0f} "
            f"| {better / run.published - 1:+.1%}{' (fitted)' if run.layout.world_size == 8 else ''} |"
        )
    return rows


def _predicted_rows(rates: kernels.Rates, stretch: dict[bool, float]) -> list[str]:
    rows = []
    for run in predictions():
        t, later = predicted(run, rates), predicted(run, rates, stretch[run.compiled])
        parts = (f"{t[part]:.2f}" for part in ("step", "products", "attention", "memory", "gaps"))
        rows.append(
            f"| {run.title} | {run.machine.name} | {' | '.join(parts)} | {t['bubble']:.0%} | {t['fsdp']:.2f} "
            f"| {t['open']:.2f} | {later['step']:.2f} s, {later['tokens_per_s']:,.0f} tokens/s a GPU, "
            f"MFU {later['mfu']:.0%} |"
        )
    return rows


def main() -> None:
    """Print what was measured, fitted, assumed, compared and predicted."""
    rates = kernels.fitted(kernels.MEASURED)
    print("\n".join(kernels.report()))
    print("\nFITTED to both models; the constants of all that follows:")
    print("\n".join(_constants(rates)))
    print("\nASSUMED; nothing below was measured here:")
    print("\n".join(f"  {text}" for text in ASSUMED))
    for m in MACHINES.values():
        print(
            f"  {m.name}: {m.peak_flops / 1e12:g} TFLOP/s, memory {m.memory_bandwidth / 1e12:g} TB/s, network in one "
            f"direction {m.inside_node / 1e9:.3g} GB/s within {m.node} GPUs, {m.between_nodes / 1e9:.3g} GB/s beyond"
        )
    eight = [run for run in published() if run.layout.world_size == 8]
    stretch = {run.compiled: predicted(run, rates)["tokens_per_s"] / (run.published or 1) for run in eight}
    print("\n| COMPARED with torchtitan on H100s | published tokens/s | calculated | error | stretched | error |")
    print("|---|---|---|---|---|---|")
    print("\n".join(_compared(rates, stretch)))
    print(f"\nStretch: {stretch[False]:.2f} eager, {stretch[True]:.2f} compiled; fitted on H100s, used for V100s too.")
    head = "| PREDICTED | machine | step s | products | attention | memory | gaps | bubble | FSDP | open | stretched |"
    print(f"\n{head}\n{'|---' * 11}|")
    print("\n".join(_predicted_rows(rates, stretch)))


if __name__ == "__main__":
    main()
