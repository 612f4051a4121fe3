"""Tiny random models of transformers' own classes, by the class's name: nothing is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
MOE = {"moe_intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 2}
MLA = {
    **TEXT, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 10,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
    "linear_value_head_dim": 5, "layer_types": ["linear_attention", "full_attention"],
    "num_hidden_layers": 2,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
NEOX = {**TEXT, "rotary_pct": 0.5}
BERT = {**TEXT, "type_vocab_size": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 32,
}  # fmt: skip

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # text
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4,
                                       "n_positions": 32, "n_inner": 48}),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "MistralForCausalLM": ("MistralConfig", GROUPED),
    "Qwen2ForCausalLM": ("Qwen2Config", {**TEXT, "num_key_value_heads": 2}),
    "Qwen3ForCausalLM": ("Qwen3Config", GROUPED),
    "Gemma2ForCausalLM": ("Gemma2Config", GROUPED),
    "Phi3ForCausalLM": ("Phi3Config", GROUPED),
    "GlmForCausalLM": ("GlmConfig", GROUPED),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", NEOX),
    "FalconForCausalLM": ("FalconConfig", {**TEXT, "multi_query": True}),
    "BloomForCausalLM": ("BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 1,
                                         "n_head": 4}),
    "PersimmonForCausalLM": ("PersimmonConfig", TEXT),
    "CodeGenForCausalLM": ("CodeGenConfig", {"vocab_size": 64, "n_embd": 32, "n_layer": 1,
                                             "n_head": 8, "n_positions": 32, "rotary_dim": 4}),
    "GPTBigCodeForCausalLM": ("GPTBigCodeConfig", {"vocab_size": 64, "n_embd": 32, "n_layer": 1,
                                                   "n_head": 4, "n_positions": 32, "n_inner": 48}),
    "MptForCausalLM": ("MptConfig", {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 4,
                                     "max_seq_len": 32, "expansion_ratio": 2}),
    "BertForMaskedLM": ("BertConfig", BERT),
    "ModernBertForMaskedLM": ("ModernBertConfig", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}),
    "DebertaModel": ("DebertaConfig", {**BERT, "relative_attention": True,
                                       "pos_att_type": ["c2p", "p2c"]}),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "MambaForCausalLM": ("MambaConfig", {"vocab_size": 64, "hidden_size": 32, "state_size": 4,
                                         "num_hidden_layers": 1}),
    # mixtures of experts
    "MixtralForCausalLM": ("MixtralConfig", {**GROUPED, "num_local_experts": 3}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {**GROUPED, **MOE}),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", {**GROUPED, **MOE, **DELTA,
                                                 "shared_expert_intermediate_size": 24}),
    "Qwen3_5ForCausalLM": ("Qwen3_5TextConfig", {**GROUPED, **DELTA}),
    "GptOssForCausalLM": ("GptOssConfig", {**GROUPED, "num_local_experts": 3,
                                           "num_experts_per_tok": 2}),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", {**MLA, "moe_intermediate_size": 24,
                              "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
                              "topk_group": 1, "first_k_dense_replace": 1,
                              "num_hidden_layers": 2}),
    "GraniteMoeSharedForCausalLM": ("GraniteMoeSharedConfig", {**GROUPED, "num_local_experts": 3,
                                    "num_experts_per_tok": 2, "shared_intermediate_size": 24}),
    "DbrxForCausalLM": ("DbrxConfig", {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 4,
                        "max_seq_len": 32, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0,
                                                          "rope_theta": 1e4},
                        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 3,
                                       "moe_top_k": 2, "hidden_size": 32}}),
    "JetMoeForCausalLM": ("JetMoeConfig", {**TEXT, "num_key_value_heads": 2, "kv_channels": 8,
                          "num_local_experts": 3, "num_experts_per_tok": 2}),
    # vision
    "ViTForImageClassification": ("ViTConfig", IMAGE),
    "CLIPVisionModel": ("CLIPVisionConfig", IMAGE),
    "Dinov2Model": ("Dinov2Config", {**IMAGE, "use_swiglu_ffn": True}),
    "BlipVisionModel": ("BlipVisionConfig", IMAGE),
    "SamVisionModel": ("SamVisionConfig", {**IMAGE, "output_channels": 8, "mlp_dim": 48,
                                           "window_size": 2, "global_attn_indexes": [0]}),
    "ConvNextModel": ("ConvNextConfig", {"hidden_sizes": [8, 16], "depths": [1, 1],
                                         "num_stages": 2}),
    # audio
    "WhisperModel": ("WhisperConfig", {**BART, "num_mel_bins": 8, "max_source_positions": 16,
                                       "max_target_positions": 16, "pad_token_id": 0}),
    "Wav2Vec2Model": ("Wav2Vec2Config", {"vocab_size": 32, "hidden_size": 32,
                      "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
                      "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3),
                      "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
                      "num_conv_pos_embedding_groups": 2}),
    "BarkSemanticModel": ("BarkSemanticConfig", {"input_vocab_size": 64, "output_vocab_size": 48,
                          "hidden_size": 32, "num_layers": 1, "num_heads": 4, "block_size": 32}),
    "ASTModel": ("ASTConfig", {**IMAGE, "max_length": 16, "num_mel_bins": 8, "frequency_stride": 4,
                               "time_stride": 4}),
    "MoonshineForConditionalGeneration": ("MoonshineConfig", {"vocab_size": 64, "hidden_size": 32,
                      "intermediate_size": 48, "encoder_num_hidden_layers": 1,
                      "decoder_num_hidden_layers": 1, "encoder_num_attention_heads": 4,
                      "decoder_num_attention_heads": 4}),
}  # fmt: skip


def build(name: str, **changes: Any) -> nn.Module:
    """Return a model by the name of its class; ``changes`` are of its config."""
    import transformers

    config_name, values = CONFIGS[name]
    config = getattr(transformers, config_name)(**{**values, **changes})
    torch.manual_seed(3)
    return getattr(transformers, name)(config)
