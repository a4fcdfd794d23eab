"""The OLMo family (OLMo 2 and OLMo 3) in plain PyTorch, without parallelism.

RMSNorm after attention and MLP instead of before them, and on all queries and all keys together; RoPE on whole heads,
SwiGLU, grouped-query attention, no biases, no dropout. OLMo 3 has a sliding window in three of four layers. Same
outputs as transformers' Olmo2ForCausalLM and Olmo3ForCausalLM.
Source: OLMo team 2025, arXiv:2501.00656 (OLMo 2), and Olmo team 2025, arXiv:2512.13961 (OLMo 3).

Shape letters: B sequences, L positions, D width, N heads, H head width, F MLP width, V vocabulary, A = N x H.
"""

from typing import cast

from torch import Tensor, nn

from titan_cpt.models.common.blocks import GatedMLP, RMSNorm, ShardableRMSNorm
from titan_cpt.models.common.document_attention import Documents
from titan_cpt.models.common.init import fill_normal, init_linear
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.layers import Head, RotaryCausalAttention, TiedHead
from titan_cpt.models.common.ops import Linear
from titan_cpt.models.olmo.spec import OlmoSpec

INITIAL_STD = 0.02
"""Standard deviation of initial weights before the cutoff."""
CUTOFF = 3.0
"""No initial weight is further from 0 than this number of standard deviations."""


class Olmo(LanguageModel):
    """An OLMo language model; see `LanguageModel`."""

    def __init__(self, spec: OlmoSpec) -> None:
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

            N(0, 0.02^2), cut off at 0.06   all matrices
            1                               scale of RMSNorm

        Source: OLMo team 2025, arXiv:2501.00656; the cutoff is init_cutoff_factor of OLMo 2's training configs
        (github.com/allenai/OLMo, configs) and that of OLMo-core's InitMethod.normal, with which OLMo 3 was trained.
        """
        if self.embedding is not None:
            fill_normal(self.embedding.weight, std=INITIAL_STD, seed=seed, name="embedding.weight", cutoff=CUTOFF)
        for layer, block in self.blocks.items():
            cast(Block, block).init_weights(seed=seed, name=f"blocks.{layer}")
        if self.final_norm is not None:
            self.final_norm.reset_parameters()
        if isinstance(self.head, Head):
            init_linear(self.head, std=INITIAL_STD, seed=seed, name="head", cutoff=CUTOFF)


class Block(nn.Module):
    """One transformer block.

    y = x + norm(attention(x))
    y + norm'(mlp(y))
    """

    def __init__(self, spec: OlmoSpec, layer: int) -> None:
        super().__init__()
        self.attention = Attention(spec, layer)
        self.post_attention_norm = RMSNorm(spec.width, eps=spec.norm_eps)
        self.mlp = GatedMLP(spec.width, spec.mlp_width)
        self.post_mlp_norm = RMSNorm(spec.width, eps=spec.norm_eps)

    def forward(self, x_BLD: Tensor, documents: Documents | None = None) -> Tensor:
        """The residual stream after the block, x_BLD."""
        x_BLD = x_BLD + self.post_attention_norm(self.attention(x_BLD, documents=documents))
        fed_BLD: Tensor = self.post_mlp_norm(self.mlp(x_BLD))
        return x_BLD + fed_BLD

    def init_weights(self, *, seed: int, name: str) -> None:
        """Initialize the block's weights; `name` is the block's name in the whole model."""
        attention, mlp = self.attention, self.mlp
        for norm in (attention.q_norm, attention.k_norm, self.post_attention_norm, self.post_mlp_norm):
            norm.reset_parameters()
        layers = {"attention.q": attention.q, "attention.k": attention.k, "attention.v": attention.v}
        layers |= {"attention.out": attention.out, "mlp.gate": mlp.gate, "mlp.up": mlp.up, "mlp.down": mlp.down}
        for linear_name, layer in layers.items():
            init_linear(layer, std=INITIAL_STD, seed=seed, name=f"{name}.{linear_name}", cutoff=CUTOFF)


class Attention(nn.Module):
    """Causal grouped-query self-attention with normalized queries and keys.

    The rows of `q`, `k` and `v` are ordered head by head, so that a tensor-parallel shard has whole heads. `forward`
    infers the number of heads of its shard.
    """

    def __init__(self, spec: OlmoSpec, layer: int) -> None:
        super().__init__()
        self.head_width = spec.head_width
        self.q = Linear(spec.width, spec.attention_width, bias=False)
        self.k = Linear(spec.width, spec.kv_width, bias=False)
        self.v = Linear(spec.width, spec.kv_width, bias=False)
        self.q_norm = ShardableRMSNorm(spec.attention_width, eps=spec.norm_eps)
        self.k_norm = ShardableRMSNorm(spec.kv_width, eps=spec.norm_eps)
        self.core = RotaryCausalAttention.of_layer(spec, layer)
        self.out = Linear(spec.attention_width, spec.width, bias=False)

    def forward(self, x_BLD: Tensor, documents: Documents | None = None) -> Tensor:
        """Causal self-attention output, out_BLD."""
        features = self.q_norm(self.q(x_BLD)), self.k_norm(self.k(x_BLD)), self.v(x_BLD)
        q_BLNH, k_BLNH, v_BLNH = (x_BLA.unflatten(-1, (-1, self.head_width)) for x_BLA in features)
        out_BLD: Tensor = self.out(self.core(q_BLNH, k_BLNH, v_BLNH, documents).flatten(-2))
        return out_BLD


MODEL = Olmo
