"""Lines of text on parallelism, memory and communication."""

from titan_cpt.planning.parallel_text import parallel_lines

DEGREES = (("parallelism.tensor_parallel_degree", "2"), ("parallelism.pipeline_parallel_degree", "2"))


def test_the_lines_have_degrees_layers_memory_and_traffic(one_stage, make):
    """Two pipeline stages of one layer each, on ranks 0 to 1 and 2 to 3."""
    lines = list(parallel_lines(make(one_stage, *DEGREES, world_size=4)))

    assert lines[0] == (
        "parallelism: pp 2 x dp_replicate 1 x dp_shard 1 x cp 1 x tp 2 = 4 ranks; tensor-parallel ranks are adjacent"
    )
    assert lines[1].startswith("pipeline: 1F1B, 2 pipeline stages, 2 micro-batches of 1; bubble ")
    assert lines[2:4] == [
        "  pipeline rank 0: ranks 0 to 1 hold embedding, layer 0",
        "  pipeline rank 1: ranks 2 to 3 hold layer 1, final norm and head",
    ]
    assert lines[4].startswith("estimated memory per rank: ")
    assert lines[5].startswith("sent per rank and step: ")
    assert len(lines) == 6


def test_the_last_line_says_whether_the_plan_fits_a_device(one_stage, make):
    """A tenth of the memory is reserved."""
    plan = make(one_stage)
    needed = plan.footprint.memory

    assert list(parallel_lines(plan, 10 * needed))[-1].startswith("fits: 10% of ")
    assert list(parallel_lines(plan, int(1.05 * needed)))[-1].startswith("does NOT fit: 95% of ")


def test_a_compiled_llama_is_planned_with_fewer_activations(one_stage, make):
    """As torch.compile saves less; test_memory.py has how much."""
    llama = (("model.family", "llama"), ("model.kv_heads", "2"), ("model.mlp_width", "192"))
    eager, compiled = (make(one_stage, *llama, ("compile.enable", value)) for value in ("false", "true"))

    assert compiled.footprint.activations < eager.footprint.activations
