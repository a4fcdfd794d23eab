"""The base class of the language models; each family's model.py has a subclass."""

from typing import cast

from torch import Tensor, nn

from titan_cpt.errors import ConfigError
from titan_cpt.models.common.document_attention import DocumentBounds
from titan_cpt.models.common.layers import (
    Head,
    MakeKernelMasks,
    Project,
    RotaryCausalAttention,
    TiedHead,
    shared_documents,
)
from titan_cpt.models.common.ops import linear
from titan_cpt.models.spec import ModelSpec, Rope


class LanguageModel(nn.Module):
    """Maps token ids to logits.

    A pipeline stage is a model with parts removed: `embedding`, `final_norm` and `head` may be None, and `blocks` may
    lack layers. The remaining blocks keep their layer index as key, and therefore their parameter names and initial
    weights. Weights are undefined until `init_weights` is called or a checkpoint is loaded.

    Each block has a module `attention`, which calls its module `core` (a `RotaryCausalAttention`): context parallelism
    and the KV cache replace `core`.
    """

    spec: ModelSpec
    embedding: nn.Embedding | None
    blocks: nn.ModuleDict
    final_norm: nn.Module | None
    head: Head | TiedHead | None
    make_kernel_masks: MakeKernelMasks | None = None
    """For attention inside documents on a GPU; None: see `document_attention`."""

    def forward(
        self,
        tokens_BL: Tensor,
        project: Project = linear,
        *,
        starts_BL: Tensor | None = None,
        positions_BL: Tensor | None = None,
        bounds: DocumentBounds | None = None,
    ) -> Tensor:
        """Logits for the token after each position, logits_BLV, or the result of `project` (see `Head`).

        A pipeline stage without the embedding takes the residual stream x_BLD instead of tokens. One without the head
        returns the residual stream.

        Args:
            starts_BL: first position of each position's document, int32: attention stays inside documents.
                None: it crosses them.
            positions_BL: RoPE's position of each token, integers. None: 0, 1, 2 ... in each sequence. Under context
                parallelism both are those of this rank's tokens.
            bounds: of the documents, for a GPU's kernel; None: the documents may have any number and length.
        """
        x_BLD = self.trunk(tokens_BL, starts_BL, positions_BL, bounds)
        if isinstance(self.head, TiedHead):
            assert self.embedding is not None, "the head of a model with tied embeddings needs the embedding"
            logits_BLV: Tensor = self.head(x_BLD, self.embedding.weight, project=project)
            return logits_BLV
        return self.head(x_BLD, project=project) if self.head is not None else x_BLD

    def trunk(
        self,
        tokens_BL: Tensor,
        starts_BL: Tensor | None = None,
        positions_BL: Tensor | None = None,
        bounds: DocumentBounds | None = None,
    ) -> Tensor:
        """The head's input x_BLD: embedding, blocks and final norm, as far as this pipeline stage has them."""
        documents = shared_documents(
            self.spec, starts_BL, positions_BL, bounds=bounds, make_masks=self.make_kernel_masks
        )
        x_BLD = self.embed(tokens_BL) if self.embedding is not None else tokens_BL
        for block in self.blocks.values():
            x_BLD = block(x_BLD, documents=documents)
        return self.final_norm(x_BLD) if self.final_norm is not None else x_BLD

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """The first block's input x_BLD: rows of the embedding."""
        assert self.embedding is not None, "a pipeline stage without the embedding takes the residual stream"
        x_BLD: Tensor = self.embedding(tokens_BL)
        return x_BLD

    def init_weights(self, seed: int) -> None:
        """Set every weight to its initial value, which depends only on the seed and the weight's name."""
        raise NotImplementedError

    def set_rope(self, rope: Rope) -> None:
        """Compute with another rotary position embedding from the next call on; compiled blocks are compiled anew.

        Raises:
            ConfigError: an attention core of this family has none.
        """
        if rope == self.spec.rope:
            return
        cores = [attention.core for attention in self.attentions()]
        if not all(hasattr(core, "set_rope") for core in cores):
            raise ConfigError(
                f"stages.rope: the model of the family {self.spec.family!r} does not compute attention with "
                "RotaryCausalAttention, so that a stage cannot change its RoPE: leave it out"
            )
        self.spec = self.spec.with_rope(rope)
        for core in cores:
            cast(RotaryCausalAttention, core).set_rope(self.spec)

    def attentions(self) -> list[nn.Module]:
        """The attention module of each block."""
        return [cast(nn.Module, block.attention) for block in self.blocks.values()]
