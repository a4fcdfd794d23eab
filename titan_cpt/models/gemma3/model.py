"""Gemma 3's text models in plain PyTorch, without parallelism.

Blocks with an RMSNorm before and after attention and MLP, RMSNorm on each head's queries and keys, grouped-query
attention in local (sliding window) and global layers with different RoPE, GeGLU, scaled embeddings; no biases, no
dropout. Same outputs as transformers' Gemma3ForCausalLM.
Source: Gemma Team 2025, arXiv:2503.19786, section 2; Gemma Team 2024, arXiv:2403.08295, section 2, for what the report
does not repeat.

Shape letters: B sequences, L positions, D width, N heads, H head width, F MLP width, V vocabulary.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_cpt.models.common.blocks import GatedMLP
from titan_cpt.models.common.document_attention import Documents
from titan_cpt.models.common.init import fill_normal, init_linear
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.layers import Head, RotaryCausalAttention, TiedHead
from titan_cpt.models.common.ops import Linear
from titan_cpt.models.gemma3.spec import Gemma3Spec

INITIAL_STD = 0.02
"""Standard deviation of initial weights, initializer_range in the releases' config.json."""


class Gemma3(LanguageModel):
    """A Gemma 3 language model; see `LanguageModel`.

    With tied embeddings it cannot be split into pipeline stages, because the last stage would need the first's weight.
    """

    def __init__(self, spec: Gemma3Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding: nn.Embedding | None = nn.Embedding(spec.vocab_size, spec.width)
        self.blocks = nn.ModuleDict({str(layer): Block(spec, layer) for layer in range(spec.layers)})
        self.final_norm: ZeroCenteredRMSNorm | None = ZeroCenteredRMSNorm(spec.width, eps=spec.norm_eps)
        self.head: Head | TiedHead | None = (
            TiedHead() if spec.tie_embeddings else Head(spec.width, spec.vocab_size, bias=False)
        )

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """The first block's input: rows of the embedding, times sqrt(width)."""
        x_BLD = super().embed(tokens_BL)
        return x_BLD * embedding_scale(self.spec.width, x_BLD.dtype)

    def init_weights(self, seed: int) -> None:
        """Initialize every weight; values depend only on the seed and the weight's name, not on devices or parallelism.

            std 0.02    matrices; those that write to the residual stream too, because a norm follows them
            0           weights of RMSNorms, which multiply by 1 + weight

        Source: initializer_range of the releases.
        """
        if self.embedding is not None:
            fill_normal(self.embedding.weight, std=INITIAL_STD, seed=seed, name="embedding.weight")
        for layer, block in self.blocks.items():
            cast(Block, block).init_weights(seed=seed, name=f"blocks.{layer}")
        if self.final_norm is not None:
            self.final_norm.reset_parameters()
        if isinstance(self.head, Head):
            init_linear(self.head, std=INITIAL_STD, seed=seed, name="head")


def embedding_scale(width: int, dtype: torch.dtype) -> float:
    """sqrt(width), rounded to the dtype of the embedding that is looked up: 34, not 33.94, for 1b in bfloat16.

    The releases were trained with the rounded number, as transformers computes in bfloat16. In mixed precision the
    embedding is the bf16 copy of the fp32 master weights, so the number is rounded too; in float32 it is not.
    """
    return float(torch.tensor(math.sqrt(width), dtype=dtype))


class ZeroCenteredRMSNorm(nn.Module):
    """RMSNorm with a zero-centered scale: x / sqrt(mean(x^2) + eps) * (1 + weight), in fp32, returned in x's dtype.

    Args:
        features: size of the last dimension.
        eps: added to the mean square.
        factor: multiplies the result, before it is rounded to x's dtype.
    """

    def __init__(self, features: int, *, eps: float, factor: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.factor = factor
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize over the last dimension; output of x's shape."""
        scale = (1.0 + self.weight.float()) * self.factor
        return F.rms_norm(x.float(), self.weight.shape, scale, self.eps).to(x.dtype)

    def reset_parameters(self) -> None:
        """Set the weight to 0, the scale to 1."""
        nn.init.zeros_(self.weight)


class Block(nn.Module):
    """One transformer block.

    y = x + post_attention_norm(attention(attention_norm(x)))
    y + post_mlp_norm(mlp(mlp_norm(y)))
    """

    def __init__(self, spec: Gemma3Spec, layer: int) -> None:
        super().__init__()
        self.attention_norm = ZeroCenteredRMSNorm(spec.width, eps=spec.norm_eps)
        self.attention = Attention(spec, layer)
        self.post_attention_norm = ZeroCenteredRMSNorm(spec.width, eps=spec.norm_eps)
        self.mlp_norm = ZeroCenteredRMSNorm(spec.width, eps=spec.norm_eps)
        self.mlp = GatedMLP(spec.width, spec.mlp_width, activation="gelu_tanh")
        self.post_mlp_norm = ZeroCenteredRMSNorm(spec.width, eps=spec.norm_eps)

    def forward(self, x_BLD: Tensor, documents: Documents | None = None) -> Tensor:
        """The residual stream after the block, x_BLD."""
        attended_BLD = self.attention(self.attention_norm(x_BLD), documents=documents)
        x_BLD = x_BLD + self.post_attention_norm(attended_BLD)
        fed_BLD: Tensor = self.post_mlp_norm(self.mlp(self.mlp_norm(x_BLD)))
        return x_BLD + fed_BLD

    def init_weights(self, *, seed: int, name: str) -> None:
        """Initialize the block's weights; `name` is the block's name in the whole model."""
        for inner_name, module in self.named_modules():
            if isinstance(module, ZeroCenteredRMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                init_linear(module, std=INITIAL_STD, seed=seed, name=f"{name}.{inner_name}")


class Attention(nn.Module):
    """Causal grouped-query self-attention with query and key norms.

    The kernels divide the scores by sqrt(head_width). The query norm multiplies by the rest of the model's scale,
    sqrt(head_width / query_pre_attn_scalar), which is 1 in most sizes.

    The rows of `q`, `k` and `v` are ordered head by head, so that a tensor-parallel shard has whole heads. `forward`
    infers the number of heads of its shard.
    """

    def __init__(self, spec: Gemma3Spec, layer: int) -> None:
        super().__init__()
        self.head_width = spec.head_width
        self.q = Linear(spec.width, spec.attention_width, bias=False)
        self.k = Linear(spec.width, spec.kv_width, bias=False)
        self.v = Linear(spec.width, spec.kv_width, bias=False)
        factor = math.sqrt(spec.head_width / spec.query_pre_attn_scalar)
        self.q_norm = ZeroCenteredRMSNorm(spec.head_width, eps=spec.norm_eps, factor=factor)
        self.k_norm = ZeroCenteredRMSNorm(spec.head_width, eps=spec.norm_eps)
        self.core = RotaryCausalAttention.of_layer(spec, layer)
        self.out = Linear(spec.attention_width, spec.width, bias=False)

    def forward(self, x_BLD: Tensor, documents: Documents | None = None) -> Tensor:
        """Causal self-attention output, out_BLD."""
        q_BLNH, k_BLNH, v_BLNH = (
            project(x_BLD).unflatten(-1, (-1, self.head_width)) for project in (self.q, self.k, self.v)
        )
        attended_BLNH = self.core(self.q_norm(q_BLNH), self.k_norm(k_BLNH), v_BLNH, documents)
        out_BLD: Tensor = self.out(attended_BLNH.flatten(-2))
        return out_BLD


MODEL = Gemma3
