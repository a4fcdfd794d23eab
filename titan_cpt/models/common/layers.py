"""Layers that the model families share: rotary position embedding (RoPE), causal attention, output head.

Shape letters: B sequences, L positions, N heads, H head width, R half of a head's rotated features.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from titan_cpt.models.common.document_attention import (
    DocumentBounds,
    Documents,
    KernelMask,
    document_attention,
)
from titan_cpt.models.common.ops import attention, cos_sin, linear
from titan_cpt.models.spec import ModelSpec, RopeScaling


class RotaryCausalAttention(nn.Module):
    """RoPE and causal scaled dot-product attention; no weights.

    It is a separate module so that context parallelism and the KV cache can replace it. It computes the RoPE tables in
    each call, except for positions that restart at each document: that is cheap (L x R elements), works for every
    sequence length, and needs no buffer, whose values would be lost when a model is built on the meta device.

    Args:
        rotary_width: features of each head that are rotated.
        rope_base: base of the wavelengths.
        scaling: RoPE scaling, or None.
        window: sliding-window size in tokens; None for full causal attention.
        rope_number: which of the model's `ModelSpec.ropes` these are; None: queries and keys are not rotated (NoPE).
    """

    def __init__(
        self,
        *,
        rotary_width: int,
        rope_base: float,
        scaling: RopeScaling | None = None,
        window: int | None = None,
        rope_number: int | None = 0,
    ) -> None:
        super().__init__()
        self.rotary_width = rotary_width
        self.rope_base = rope_base
        self.scaling = scaling
        self.window = window
        self.rope_number = rope_number
        self.backend: SDPBackend | None = None
        """The kernel of scaled dot-product attention; None: torch chooses."""
        self.document_backend: SDPBackend | None = None
        """The kernel with a boolean mask inside documents; None: see `document_attention`."""

    def forward(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, documents: Documents | None = None) -> Tensor:
        """Attention's output, out_BLNH, in the dtype of the queries.

        With grouped-query attention k and v have fewer heads, and each serves a group of consecutive query heads.
        """
        positions_L = torch.arange(q_BLNH.shape[1], device=q_BLNH.device)
        q_BNLH, k_BNLH = self.rotated(q_BLNH.transpose(1, 2), k_BLNH.transpose(1, 2), positions_L, documents)
        v_BNLH = v_BLNH.transpose(1, 2)
        if documents is None or documents.starts_BP is None:
            return self.attend(q_BNLH, k_BNLH, v_BNLH).transpose(1, 2)
        out_BNLH = document_attention(
            q_BNLH, k_BNLH, v_BNLH, documents=documents, window=self.window, backend=self.document_backend
        )
        return out_BNLH.transpose(1, 2)

    @classmethod
    def of_layer(cls, spec: ModelSpec, layer: int) -> "RotaryCausalAttention":
        """The attention of one layer of a model."""
        number = spec.layer_rope(layer)
        rope = spec.rope if number is None else spec.ropes[number]
        return cls(
            rotary_width=spec.rotary_width,
            rope_base=rope.base,
            scaling=rope.scaling,
            window=spec.layer_window(layer),
            rope_number=number,
        )

    def rotated(
        self, q_BNLH: Tensor, k_BNLH: Tensor, positions: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys after RoPE, or unchanged in a layer without it.

        Args:
            positions: of the tokens, int64 [L], or [B, L] if they differ between sequences.
            documents: their positions, which restart at each document, take precedence.
        """
        if self.rope_number is None:
            return q_BNLH, k_BNLH
        if documents is not None and documents.tables_B1PR:
            cos, sin = documents.tables_B1PR[self.rope_number]
        else:
            cos, sin = rotary_tables(
                positions.flatten(), rotary_width=self.rotary_width, base=self.rope_base, scaling=self.scaling
            )
            if positions.ndim > 1:
                cos, sin = (table.view(len(positions), 1, positions.shape[1], -1) for table in (cos, sin))
        return rotate(q_BNLH, cos, sin), rotate(k_BNLH, cos, sin)

    def set_rope(self, spec: ModelSpec) -> None:
        """Compute with the rotary position embedding of this spec from the next call on."""
        if self.rope_number is not None:
            rope = spec.ropes[self.rope_number]
            self.rope_base, self.scaling = rope.base, rope.scaling

    def attend(self, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor) -> Tensor:
        """Attention without RoPE, out_BNLH: the caller has rotated queries and keys."""
        group = q_BNLH.shape[1] // k_BNLH.shape[1]
        length = q_BNLH.shape[2]
        if self.window is None or length <= self.window:
            return attention(q_BNLH, k_BNLH, v_BNLH, backend=self.backend, is_causal=True, enable_gqa=group > 1)
        behind_LL = torch.arange(length, device=q_BNLH.device)
        behind_LL = behind_LL[:, None] - behind_LL[None, :]
        seen_LL = (behind_LL >= 0) & (behind_LL < self.window)
        # Fused kernels with a mask need as many key heads as query heads.
        k_BNLH, v_BNLH = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k_BNLH, v_BNLH))
        return attention(q_BNLH, k_BNLH, v_BNLH, backend=self.backend, attn_mask=seen_LL)


class Head(nn.Linear):
    """The output head. Returns logits, or another function of its input and weight: the fused linear cross-entropy.

    `forward` calls the function itself, because FSDP2 all-gathers the weight when this module is called.
    """

    def forward(self, x_BLD: Tensor, project: "Project" = linear) -> Tensor:
        """`project(x_BLD, weight_VD)`, by default the logits."""
        return project(x_BLD, self.weight)


class TiedHead(nn.Module):
    """The output head of a model with tied embeddings. It has no parameter, so that the weight is saved only once."""

    def forward(self, x_BLD: Tensor, embedding_VD: Tensor, project: "Project" = linear) -> Tensor:
        """`project(x_BLD, embedding_VD)`, by default the logits."""
        return project(x_BLD, embedding_VD)


Project = Callable[[Tensor, Tensor], Tensor]
"""A function of the residual stream x_BLD and the head's weight_VD: logits_BLV, or a loss."""


MakeKernelMasks = Callable[[Tensor, DocumentBounds | None], Mapping[int | None, KernelMask]]
"""A GPU kernel's form of the documents of a batch, by sliding-window size, from starts_BL and their bounds."""


def shared_documents(
    spec: ModelSpec,
    starts_BL: Tensor | None,
    positions_BL: Tensor | None,
    *,
    bounds: DocumentBounds | None = None,
    make_masks: MakeKernelMasks | None = None,
) -> Documents | None:
    """What all blocks share about documents; None without them. See `LanguageModel.forward` for the arguments."""
    if starts_BL is None and positions_BL is None:
        return None
    tables = []
    for rope in spec.ropes if positions_BL is not None else ():
        assert positions_BL is not None, "the line above"
        cos_LR, sin_LR = rotary_tables(
            positions_BL.flatten(), rotary_width=spec.rotary_width, base=rope.base, scaling=rope.scaling
        )
        sequences, length = positions_BL.shape
        tables.append((cos_LR.view(sequences, 1, length, -1), sin_LR.view(sequences, 1, length, -1)))
    masks = make_masks(starts_BL, bounds) if starts_BL is not None and make_masks is not None else {}
    return Documents(starts_BL, tuple(tables), masks)


def rotary_tables(
    positions_L: Tensor, *, rotary_width: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """RoPE's cosine and sine for every position and pair of features, cos_LR and sin_LR, in fp32.

        angle(p, i) = p * base^(-2 i / rotary_width)        0 <= i < R = rotary_width / 2

    Always in fp32: bf16 cannot represent every position above 256. RoPE scaling changes the frequencies; YaRN also
    multiplies both tables by attention_factor.
    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    exponents_R = torch.arange(0, rotary_width, 2, device=positions_L.device, dtype=torch.float32) / rotary_width
    frequencies_R = 1.0 / base**exponents_R
    if scaling is None:
        angles_LR = positions_L.float()[:, None] * frequencies_R
        return cos_sin(angles_LR)
    assert scaling.attention_factor is not None, "RopeScaling sets its default"
    scaled = {"linear": _linear_frequencies, "llama3": _llama3_frequencies, "yarn": _yarn_frequencies}[scaling.kind]
    angles_LR = positions_L.float()[:, None] * scaled(frequencies_R, base, scaling)
    cos_LR, sin_LR = cos_sin(angles_LR)
    return cos_LR * scaling.attention_factor, sin_LR * scaling.attention_factor


def _linear_frequencies(frequencies_R: Tensor, _base: float, scaling: RopeScaling) -> Tensor:
    """All frequencies divided by factor (position interpolation). Source: Chen et al. 2023, arXiv:2306.15595."""
    return frequencies_R / scaling.factor


def _llama3_frequencies(frequencies_R: Tensor, _base: float, scaling: RopeScaling) -> Tensor:
    """Frequencies f of Llama 3.1: unchanged for short wavelengths, divided by factor for long ones, linear between.

        f * (s + (1 - s) / factor)        s = clamp((original f / 2 pi - low) / (high - low), 0, 1)

    Source: Grattafiori et al. 2024, arXiv:2407.21783, section 3.4.2; the equation is that of Meta's reference code.
    """
    assert scaling.original_seq_len is not None, "the spec checks it"
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns_R = scaling.original_seq_len * frequencies_R / (2 * math.pi)
    unscaled_R = ((turns_R - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies_R * (unscaled_R + (1.0 - unscaled_R) / scaling.factor)


def _yarn_frequencies(frequencies_R: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    """Frequencies f of YaRN: unchanged for fast features, divided by factor for slow ones, linear in the index between.

        f_i * (k_i + (1 - k_i) / factor)        k_i = 1 - clamp((i - first) / (last - first), 0, 1)

    `first` and `last` are the features that rotate beta_fast and beta_slow times over the original context length,
    rounded down and up.
    Source: Peng et al. 2023, arXiv:2309.00071, section 3.2.
    """
    half = frequencies_R.shape[0]
    original = scaling.original_seq_len
    assert original is not None, "the spec checks it"

    def feature(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(base)

    first = max(math.floor(feature(scaling.beta_fast)), 0)
    last = min(math.ceil(feature(scaling.beta_slow)), 2 * half - 1)
    features_R = torch.arange(half, device=frequencies_R.device, dtype=torch.float32)
    unscaled_R = 1.0 - ((features_R - first) / (last - first or 0.001)).clamp(0.0, 1.0)
    return frequencies_R * (unscaled_R + (1.0 - unscaled_R) / scaling.factor)


def rotate(x_BNLH: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
    """Rotate the first 2R features of each head; computed in fp32, returned in x's dtype.

    Feature i is paired with feature i + R, as in Hugging Face's GPT-NeoX and Llama; the paper pairs neighbors. The two
    are equal up to a permutation of the weights.
    """
    half = cos_LR.shape[-1]
    first, second = x_BNLH[..., :half].float(), x_BNLH[..., half : 2 * half].float()
    rotated = first * cos_LR - second * sin_LR, second * cos_LR + first * sin_LR
    return torch.cat((*(part.to(x_BNLH.dtype) for part in rotated), x_BNLH[..., 2 * half :]), dim=-1)
