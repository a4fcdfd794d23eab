"""torchtitan's names of the weights of llama3 and qwen3, as version 0.3 saves them, and which of them it reorders."""

from __future__ import annotations

from titan_cpt.models.llama.spec import LlamaSpec

EMBEDDING = "tok_embeddings.weight"
HEAD = "lm_head.weight"
TIED_HEADS = (HEAD, "output.weight")
"""The head in the files of a tied model, which is the embedding once more; the second is the name in old versions."""
_OUTSIDE = {"embedding": "tok_embeddings", "final_norm": "norm", "head": "lm_head"}
_BLOCK = {
    "attention_norm": "attention_norm",
    "attention.q": "attention.qkv_linear.wq",
    "attention.k": "attention.qkv_linear.wk",
    "attention.v": "attention.qkv_linear.wv",
    "attention.out": "attention.wo",
    "attention.q_norm": "attention.q_norm",
    "attention.k_norm": "attention.k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3",
    "mlp.down": "feed_forward.w2",
}


def torchtitan_names(spec: LlamaSpec) -> dict[str, str]:
    """Our name of every weight -> torchtitan's. A tied model has no head of its own."""
    outside = [f"{module}.weight" for module in _OUTSIDE if not (module == "head" and spec.tied)]
    names = {ours: f"{_OUTSIDE[ours.removesuffix('.weight')]}.weight" for ours in outside}
    for layer in range(spec.layers):
        for parameter in spec.block_parameters():
            module, _, kind = parameter.name.rpartition(".")
            names[f"blocks.{layer}.{parameter.name}"] = f"layers.{layer}.{_BLOCK[module]}.{kind}"
    return names


def is_interleaved(ours: str, spec: LlamaSpec) -> bool:
    """Whether the rows of a weight are in another order there: queries and keys of llama3, not of qwen3.

    torchtitan's llama3 rotates neighboring features (its ComplexRoPE), its qwen3 halves of a head (CosSinRoPE).
    """
    return not spec.qk_norm and ours.split(".")[-2] in ("q", "k")
