"""Tensor-parallel plan of a SmolLM3 block: that of Llama."""

from titan_cpt.models.llama.parallelize import tensor_parallel_plan

__all__ = ["tensor_parallel_plan"]
