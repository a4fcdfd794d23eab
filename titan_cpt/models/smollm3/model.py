"""SmolLM3 is the Llama model: `RotaryCausalAttention.of_layer` reads from the spec which layers have no RoPE.

Same outputs as transformers' SmolLM3ForCausalLM.
"""

from titan_cpt.models.llama.model import Llama

MODEL = Llama
