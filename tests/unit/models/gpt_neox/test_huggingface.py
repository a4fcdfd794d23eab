"""GPT-NeoX's names in Hugging Face's files, as the released Pythia models have them."""

from titan_cpt.models.gpt_neox.huggingface import config_fields, settings_to_compare, weight_names
from titan_cpt.models.registry import named_size

SPEC = named_size("gpt_neox", "debug", 257, overrides={"layers": 1, "rotary_fraction": 0.5, "norm_eps": 1e-6})


def test_weights_have_the_names_of_pythias_files():
    """All of a model of one block."""
    block = "gpt_neox.layers.0"

    assert weight_names(SPEC) == {
        "embedding.weight": "gpt_neox.embed_in.weight",
        "blocks.0.attention_norm.weight": f"{block}.input_layernorm.weight",
        "blocks.0.attention_norm.bias": f"{block}.input_layernorm.bias",
        "blocks.0.attention.qkv.weight": f"{block}.attention.query_key_value.weight",
        "blocks.0.attention.qkv.bias": f"{block}.attention.query_key_value.bias",
        "blocks.0.attention.out.weight": f"{block}.attention.dense.weight",
        "blocks.0.attention.out.bias": f"{block}.attention.dense.bias",
        "blocks.0.mlp_norm.weight": f"{block}.post_attention_layernorm.weight",
        "blocks.0.mlp_norm.bias": f"{block}.post_attention_layernorm.bias",
        "blocks.0.mlp.up.weight": f"{block}.mlp.dense_h_to_4h.weight",
        "blocks.0.mlp.up.bias": f"{block}.mlp.dense_h_to_4h.bias",
        "blocks.0.mlp.down.weight": f"{block}.mlp.dense_4h_to_h.weight",
        "blocks.0.mlp.down.bias": f"{block}.mlp.dense_4h_to_h.bias",
        "final_norm.weight": "gpt_neox.final_layer_norm.weight",
        "final_norm.bias": "gpt_neox.final_layer_norm.bias",
        "head.weight": "embed_out.weight",
    }


def test_the_config_has_the_specs_numbers():
    """Under transformers' keys; the settings compared after an export are those of the config."""
    name, fields = config_fields(SPEC)

    assert name == "GPTNeoXForCausalLM"
    assert (fields["rotary_pct"], fields["rotary_emb_base"]) == (0.5, 10_000.0)
    assert (fields["layer_norm_eps"], fields["use_parallel_residual"]) == (1e-6, True)

    class Config:
        layer_norm_eps = 1e-5
        use_parallel_residual = True

    assert settings_to_compare(SPEC, Config) == {"layer_norm_eps": (1e-6, 1e-5), "use_parallel_residual": (True, True)}
