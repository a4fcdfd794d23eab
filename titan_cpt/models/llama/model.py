"""The Llama family (Llama 2 and 3, Mistral, Qwen2 and Qwen3, dense) as plain modules that know nothing of parallelism.

Pre-RMSNorm blocks, rotary positions on whole heads, SwiGLU, heads of keys and values that several heads of queries
share, no biases but where Qwen2 has them, no dropout. With the same weights it computes what transformers'
LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM do. Source: Touvron et al. 2023,
arXiv:2302.13971 and 2307.09288, and the papers that sizes.py names.

Shape letters: B sequences, L positions, D width, N heads, H head width, F feed-forward width, V vocabulary.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_cpt.models.common.init import fill_normal, init_linear
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.layers import Head, Project, RotaryCausalAttention, TiedHead
from titan_cpt.models.common.ops import Linear, linear
from titan_cpt.models.llama.spec import LlamaSpec

INITIAL_STD = 0.02
"""Spread of the first weights, as in the releases' configurations (initializer_range)."""


class Llama(LanguageModel):
    """The language model: token ids in, logits out.

    A pipeline stage is this model with the parts that it does not hold taken away: `embedding`, `final_norm` and `head`
    may be None, and `blocks` may lack layers; those left keep their numbers, hence their names and first weights. A
    model with tied embeddings cannot be cut, as its last stage needs the first one's weight. Weights are meaningless
    until `init_weights` ran or a checkpoint was loaded, on the meta device or off it.
    """

    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding: nn.Embedding | None = nn.Embedding(spec.vocab_size, spec.width)
        self.blocks = nn.ModuleDict({str(layer): Block(spec) for layer in range(spec.layers)})
        self.final_norm: RMSNorm | None = RMSNorm(spec.width, eps=spec.norm_eps)
        self.head: Head | TiedHead | None = (
            TiedHead() if spec.tie_embeddings else Head(spec.width, spec.vocab_size, bias=False)
        )

    def forward(self, tokens_BL: Tensor, project: Project = linear) -> Tensor:
        """Logits for the token after each position, logits_BLV, or what `project` makes of the head and its input.

        A pipeline stage without the embedding takes the residual stream x_BLD in the place of the tokens; one without
        the head returns it.
        """
        x_BLD = self.embedding(tokens_BL) if self.embedding is not None else tokens_BL
        for block in self.blocks.values():
            x_BLD = block(x_BLD)
        x_BLD = self.final_norm(x_BLD) if self.final_norm is not None else x_BLD
        if isinstance(self.head, TiedHead):
            assert self.embedding is not None, "a model with tied embeddings has both or neither"
            logits_BLV: Tensor = self.head(x_BLD, self.embedding.weight, project=project)
            return logits_BLV
        return self.head(x_BLD, project=project) if self.head is not None else x_BLD

    def init_weights(self, seed: int) -> None:
        """Set every weight to its first value, which the seed alone decides, whatever the devices and the layout.

            N(0, 0.02)                      embeddings and projections out of the residual stream
            N(0, 0.02 / sqrt(2 layers))     projections back into it
            0                               biases
            1                               scales of RMSNorm

        Source: the releases' initializer_range; Radford et al. 2019 (GPT-2), section 2.3, for the second line.
        """
        if self.embedding is not None:
            fill_normal(self.embedding.weight, std=INITIAL_STD, seed=seed, name="embedding.weight")
        for layer, block in self.blocks.items():
            cast(Block, block).init_weights(seed=seed, name=f"blocks.{layer}")
        if self.final_norm is not None:
            self.final_norm.reset_parameters()
        if isinstance(self.head, Head):
            init_linear(self.head, std=INITIAL_STD, seed=seed, name="head")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, returned in x's dtype.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, features: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape, whatever it is but for the last dimension."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)

    def reset_parameters(self) -> None:
        """Set the scale to 1."""
        nn.init.ones_(self.weight)


class Block(nn.Module):
    """One transformer block.

    y = x + attention(norm(x))
    y + mlp(norm'(y))
    """

    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.layers = spec.layers
        self.attention_norm = RMSNorm(spec.width, eps=spec.norm_eps)
        self.attention = Attention(spec)
        self.mlp_norm = RMSNorm(spec.width, eps=spec.norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The residual stream after the block, x_BLD."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD))
        fed_BLD: Tensor = self.mlp(self.mlp_norm(x_BLD))
        return x_BLD + fed_BLD

    def init_weights(self, *, seed: int, name: str) -> None:
        """The block's part of `Llama.init_weights`; `name` is the block's in the whole model."""
        attention, mlp = self.attention, self.mlp
        residual_std = INITIAL_STD / math.sqrt(2 * self.layers)
        for norm in (self.attention_norm, attention.q_norm, attention.k_norm, self.mlp_norm):
            if norm is not None:
                norm.reset_parameters()
        outward = {"attention.q": attention.q, "attention.k": attention.k, "attention.v": attention.v}
        outward |= {"mlp.gate": mlp.gate, "mlp.up": mlp.up}
        for linear_name, layer in outward.items():
            init_linear(layer, std=INITIAL_STD, seed=seed, name=f"{name}.{linear_name}")
        for linear_name, layer in {"attention.out": attention.out, "mlp.down": mlp.down}.items():
            init_linear(layer, std=residual_std, seed=seed, name=f"{name}.{linear_name}")


class Attention(nn.Module):
    """Causal self-attention with grouped queries.

    The rows of `q`, `k` and `v` lie head after head, so that a slice of them, as tensor parallelism cuts it, holds
    whole heads; `forward` finds out how many it holds.
    """

    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.head_width = spec.head_width
        self.q = Linear(spec.width, spec.attention_width, bias=spec.qkv_bias)
        self.k = Linear(spec.width, spec.kv_width, bias=spec.qkv_bias)
        self.v = Linear(spec.width, spec.kv_width, bias=spec.qkv_bias)
        self.q_norm = RMSNorm(spec.head_width, eps=spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_width, eps=spec.norm_eps) if spec.qk_norm else None
        self.core = RotaryCausalAttention(
            rotary_width=spec.head_width,
            rope_base=spec.rope_base,
            scaling=spec.rope_scaling,
            window=spec.sliding_window,
        )
        self.out = Linear(spec.attention_width, spec.width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """What each position draws from itself and those before it, out_BLD."""
        q_BLNH, k_BLNH, v_BLNH = (
            project(x_BLD).unflatten(-1, (-1, self.head_width)) for project in (self.q, self.k, self.v)
        )
        q_BLNH = self.q_norm(q_BLNH) if self.q_norm is not None else q_BLNH
        k_BLNH = self.k_norm(k_BLNH) if self.k_norm is not None else k_BLNH
        out_BLD: Tensor = self.out(self.core(q_BLNH, k_BLNH, v_BLNH).flatten(-2))
        return out_BLD


class MLP(nn.Module):
    """The feed-forward, SwiGLU: down(silu(gate(x)) * up(x)). Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.gate = Linear(spec.width, spec.mlp_width, bias=False)
        self.up = Linear(spec.width, spec.mlp_width, bias=False)
        self.down = Linear(spec.mlp_width, spec.width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The same function of every position, out_BLD."""
        out_BLD: Tensor = self.down(F.silu(self.gate(x_BLD)) * self.up(x_BLD))
        return out_BLD


MODEL = Llama
