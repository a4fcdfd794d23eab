"""The Llama family (Llama 2 and 3, Mistral, Qwen2 and Qwen3, dense) in plain PyTorch, without parallelism.

Pre-RMSNorm blocks, RoPE on whole heads, SwiGLU, grouped-query attention, no biases except in Qwen2, no dropout. Same
outputs as transformers' LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM.
Source: Touvron et al. 2023, arXiv:2302.13971 and 2307.09288, and the papers named in spec.py.

Shape letters: B sequences, L positions, D width, N heads, H head width, F MLP width, V vocabulary.
"""

import math
from typing import cast

from torch import Tensor, nn

from titan_cpt.models.common.blocks import GatedMLP, RMSNorm
from titan_cpt.models.common.document_attention import Documents
from titan_cpt.models.common.init import fill_normal, init_linear
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.layers import Head, RotaryCausalAttention, TiedHead
from titan_cpt.models.common.ops import Linear
from titan_cpt.models.llama.spec import LlamaSpec

INITIAL_STD = 0.02
"""Standard deviation of initial weights, initializer_range in the releases' config.json."""


class Llama(LanguageModel):
    """A Llama language model; see `LanguageModel`.

    With tied embeddings it cannot be split into pipeline stages, because the last stage would need the first's weight.
    """

    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding: nn.Embedding | None = nn.Embedding(spec.vocab_size, spec.width)
        self.blocks = nn.ModuleDict({str(layer): Block(spec, layer) for layer in range(spec.layers)})
        self.final_norm: RMSNorm | None = RMSNorm(spec.width, eps=spec.norm_eps)
        self.head: Head | TiedHead | None = (
            TiedHead() if spec.tie_embeddings else Head(spec.width, spec.vocab_size, bias=False)
        )

    def init_weights(self, seed: int) -> None:
        """Initialize every weight; values depend only on the seed and the weight's name, not on devices or parallelism.

            std 0.02                    embeddings, head, and projections that read the residual stream
            std 0.02 / sqrt(2 layers)   projections that write to it
            0                           biases
            1                           scale of RMSNorm

        Source: initializer_range of the releases; the second line from Radford et al. 2019 (GPT-2), section 2.3.
        """
        if self.embedding is not None:
            fill_normal(self.embedding.weight, std=INITIAL_STD, seed=seed, name="embedding.weight")
        for layer, block in self.blocks.items():
            cast(Block, block).init_weights(seed=seed, name=f"blocks.{layer}")
        if self.final_norm is not None:
            self.final_norm.reset_parameters()
        if isinstance(self.head, Head):
            init_linear(self.head, std=INITIAL_STD, seed=seed, name="head")


class Block(nn.Module):
    """One transformer block.

    y = x + attention(norm(x))
    y + mlp(norm'(y))
    """

    def __init__(self, spec: LlamaSpec, layer: int) -> None:
        super().__init__()
        self.layers = spec.layers
        self.attention_norm = RMSNorm(spec.width, eps=spec.norm_eps)
        self.attention = Attention(spec, layer)
        self.mlp_norm = RMSNorm(spec.width, eps=spec.norm_eps)
        self.mlp = GatedMLP(spec.width, spec.mlp_width)

    def forward(self, x_BLD: Tensor, documents: Documents | None = None) -> Tensor:
        """The residual stream after the block, x_BLD."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), documents=documents)
        fed_BLD: Tensor = self.mlp(self.mlp_norm(x_BLD))
        return x_BLD + fed_BLD

    def init_weights(self, *, seed: int, name: str) -> None:
        """Initialize the block's weights; `name` is the block's name in the whole model."""
        attention, mlp = self.attention, self.mlp
        residual_std = INITIAL_STD / math.sqrt(2 * self.layers)
        for norm in (self.attention_norm, attention.q_norm, attention.k_norm, self.mlp_norm):
            if norm is not None:
                norm.reset_parameters()
        reads = {"attention.q": attention.q, "attention.k": attention.k, "attention.v": attention.v}
        reads |= {"mlp.gate": mlp.gate, "mlp.up": mlp.up}
        for linear_name, layer in reads.items():
            init_linear(layer, std=INITIAL_STD, seed=seed, name=f"{name}.{linear_name}")
        for linear_name, layer in {"attention.out": attention.out, "mlp.down": mlp.down}.items():
            init_linear(layer, std=residual_std, seed=seed, name=f"{name}.{linear_name}")


class Attention(nn.Module):
    """Causal grouped-query self-attention.

    The rows of `q`, `k` and `v` are ordered head by head, so that a tensor-parallel shard has whole heads. `forward`
    infers the number of heads of its shard.
    """

    def __init__(self, spec: LlamaSpec, layer: int) -> None:
        super().__init__()
        self.head_width = spec.head_width
        self.q = Linear(spec.width, spec.attention_width, bias=spec.qkv_bias)
        self.k = Linear(spec.width, spec.kv_width, bias=spec.qkv_bias)
        self.v = Linear(spec.width, spec.kv_width, bias=spec.qkv_bias)
        self.q_norm = RMSNorm(spec.head_width, eps=spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_width, eps=spec.norm_eps) if spec.qk_norm else None
        self.core = RotaryCausalAttention.of_layer(spec, layer)
        self.out = Linear(spec.attention_width, spec.width, bias=False)

    def forward(self, x_BLD: Tensor, documents: Documents | None = None) -> Tensor:
        """Causal self-attention output, out_BLD."""
        q_BLNH, k_BLNH, v_BLNH = (
            project(x_BLD).unflatten(-1, (-1, self.head_width)) for project in (self.q, self.k, self.v)
        )
        q_BLNH = self.q_norm(q_BLNH) if self.q_norm is not None else q_BLNH
        k_BLNH = self.k_norm(k_BLNH) if self.k_norm is not None else k_BLNH
        out_BLD: Tensor = self.out(self.core(q_BLNH, k_BLNH, v_BLNH, documents).flatten(-2))
        return out_BLD


MODEL = Llama
