"""GPT-NeoX (Ibrahim et al. 2024, Pythia) in plain PyTorch, without parallelism.

Pre-norm blocks with two LayerNorms, RoPE on a fraction of each head, exact GELU, biases everywhere except in the output
head, untied embeddings, no dropout. Same outputs as transformers' GPTNeoXForCausalLM.
Source: Black et al. 2022, arXiv:2204.06745.

Shape letters: B sequences, L positions, D width, N heads, H head width, F MLP width, V vocabulary.
"""

import math
from typing import cast

from torch import Tensor, nn

from titan_cpt.models.common.document_attention import Documents
from titan_cpt.models.common.init import fill_normal, init_linear
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.layers import Head, RotaryCausalAttention
from titan_cpt.models.common.ops import Linear, copy_for_separate_grad, gelu
from titan_cpt.models.gpt_neox.spec import GPTNeoXSpec


class GPTNeoX(LanguageModel):
    """A GPT-NeoX language model; see `LanguageModel`."""

    def __init__(self, spec: GPTNeoXSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding: nn.Embedding | None = nn.Embedding(spec.vocab_size, spec.width)
        self.blocks = nn.ModuleDict({str(layer): Block(spec) for layer in range(spec.layers)})
        self.final_norm: nn.LayerNorm | None = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.head: Head | None = Head(spec.width, spec.vocab_size, bias=False)

    def init_weights(self, seed: int) -> None:
        """Initialize every weight; values depend only on the seed and the weight's name, not on devices or parallelism.

            std sqrt(2 / (5 D))       embeddings, head, and projections that read the residual stream
            std 2 / (layers sqrt(D))  projections that write to it
            0                         biases
            1, 0                      scale and shift of LayerNorm

        Source: GPT-NeoX's `small_init` (Nguyen and Salazar 2019, arXiv:1910.05895) and `wang_init`.
        """
        std = math.sqrt(2 / (5 * self.spec.width))
        if self.embedding is not None:
            fill_normal(self.embedding.weight, std=std, seed=seed, name="embedding.weight")
        for layer, block in self.blocks.items():
            cast(Block, block).init_weights(seed=seed, name=f"blocks.{layer}")
        if self.final_norm is not None:
            self.final_norm.reset_parameters()
        if self.head is not None:
            init_linear(self.head, std=std, seed=seed, name="head")


class Block(nn.Module):
    """One transformer block.

    y = x + attention(norm(x))
    y + mlp(norm'(x))           parallel residual
    y + mlp(norm'(y))           otherwise
    """

    def __init__(self, spec: GPTNeoXSpec) -> None:
        super().__init__()
        self.spec = spec
        self.attention_norm = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.attention = Attention(spec)
        self.mlp_norm = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x_BLD: Tensor, documents: Documents | None = None) -> Tensor:
        """The residual stream after the block, x_BLD."""
        attended_BLD: Tensor = self.attention(self.attention_norm(x_BLD), documents=documents)
        after_attention_BLD = x_BLD + attended_BLD
        fed_BLD: Tensor = self.mlp(self.mlp_norm(x_BLD if self.spec.parallel_residual else after_attention_BLD))
        return after_attention_BLD + copy_for_separate_grad(fed_BLD)

    def init_weights(self, *, seed: int, name: str) -> None:
        """Initialize the block's weights; `name` is the block's name in the whole model."""
        std = math.sqrt(2 / (5 * self.spec.width))
        residual_std = 2 / (self.spec.layers * math.sqrt(self.spec.width))
        self.attention_norm.reset_parameters()
        self.mlp_norm.reset_parameters()
        init_linear(self.attention.qkv, std=std, seed=seed, name=f"{name}.attention.qkv")
        init_linear(self.attention.out, std=residual_std, seed=seed, name=f"{name}.attention.out")
        init_linear(self.mlp.up, std=std, seed=seed, name=f"{name}.mlp.up")
        init_linear(self.mlp.down, std=residual_std, seed=seed, name=f"{name}.mlp.down")


class Attention(nn.Module):
    """Causal self-attention with a fused query, key and value projection.

    The rows of `qkv` are ordered head by head (a head's queries, keys and values, then the next head's), so that a
    tensor-parallel shard has whole heads. `forward` infers the number of heads of its shard.
    """

    def __init__(self, spec: GPTNeoXSpec) -> None:
        super().__init__()
        self.head_width = spec.head_width
        self.qkv = Linear(spec.width, 3 * spec.width)
        self.core = RotaryCausalAttention(
            rotary_width=spec.rotary_width, rope_base=spec.rope_base, scaling=spec.rope_scaling
        )
        self.out = Linear(spec.width, spec.width)

    def forward(self, x_BLD: Tensor, documents: Documents | None = None) -> Tensor:
        """Causal self-attention output, out_BLD."""
        qkv_BLNH = self.qkv(x_BLD).unflatten(-1, (-1, 3 * self.head_width))  # here H is 3 x head width
        q_BLNH, k_BLNH, v_BLNH = qkv_BLNH.chunk(3, dim=-1)
        # A copy, since attention saves the values for the backward pass: a view would keep all of qkv in memory.
        out_BLD: Tensor = self.out(self.core(q_BLNH, k_BLNH, v_BLNH.contiguous(), documents).flatten(-2))
        return out_BLD


class MLP(nn.Module):
    """The MLP: down(gelu(up(x)))."""

    def __init__(self, spec: GPTNeoXSpec) -> None:
        super().__init__()
        self.up = Linear(spec.width, spec.mlp_width)
        self.down = Linear(spec.mlp_width, spec.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """MLP output, out_BLD."""
        out_BLD: Tensor = self.down(gelu(self.up(x_BLD)))
        return out_BLD


MODEL = GPTNeoX
