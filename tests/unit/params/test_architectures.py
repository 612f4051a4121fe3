"""Every parameter of transformers' models with two dimensions or more goes where the docs say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from spectral_dist.core.first_step import matrix_of
from spectral_dist.params import architectures
from spectral_dist.params.classify import classify
from spectral_dist.params.spec import ParamSpec
from tests.unit.params.small_models import ModelOf
from tests.unit.params.tiny_transformers import CONFIGS, build

pytest.importorskip("transformers")
DOCS = Path(__file__).parents[3] / "docs" / "what-goes-where.md"

ADAMW, FROZEN, WHOLE, TRANSPOSED = "AdamW", "not trained", "1", "1 in x out"
EMBEDDINGS = {r"embed_tokens|word_embeddings|\bwte\b|\bwpe\b|embed_in\b|^.*\.shared\.weight|^shared"
              r"|position_embeddings?\b|token_type_embeddings|tok_embeddings|rel_embeddings"
              r"|embeds_layer|relative_attention_bias|backbone\.embeddings|embed_positions":
              ADAMW}  # fmt: skip
HEAD = {r"^lm_head": ADAMW}
SELF = {r"self_attn\.[qkvo]_proj": WHOLE}
MLP = {r"mlp\.(gate|up|down)_proj": WHOLE}
LLAMA = {**EMBEDDINGS, **HEAD, **SELF, **MLP}
TIED = {**EMBEDDINGS, **SELF, **MLP}
NEOX = {r"\.(dense|dense_h_to_4h|dense_4h_to_h)\.": WHOLE, r"query_key_value": "3"}
BERT = {r"dense\.weight": WHOLE}
STACKS = {r"experts\.gate_up_proj$": "3 x 2", r"experts\.down_proj$": "3 x 1"}
ROUTER = {r"(mlp\.gate|router)\.weight$": ADAMW}
DELTA = {r"conv1d": ADAMW, r"linear_attn\.out_proj": WHOLE, r"self_attn\.q_proj": "2",
         r"self_attn\.[kvo]_proj": WHOLE}  # fmt: skip
SPEECH = {r"(self_attn|encoder_attn)\.(q_proj|k_proj|v_proj|out_proj)": WHOLE, r"\.fc[12]\.": WHOLE}
IMAGE = {r"cls_token|mask_token|distillation_token|position_embeddings?\b|class_embedding": ADAMW,
         r"patch_embed\w*\.(projection\.)?weight": WHOLE, r"attention\.[qkvo]_proj": WHOLE,
         r"\.fc[12]\.": WHOLE}  # fmt: skip

EXPECTED: dict[str, dict[str, str]] = {
    "GPT2LMHeadModel": {**EMBEDDINGS, r"c_attn": "3 in x out", r"c_proj|c_fc": TRANSPOSED},
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "Gemma2ForCausalLM": TIED,
    "Phi3ForCausalLM": {**EMBEDDINGS, **HEAD, r"qkv_proj": "3", r"gate_up_proj": "2",
                        r"(o_proj|down_proj)": WHOLE},
    "GlmForCausalLM": {**EMBEDDINGS, **HEAD, **SELF, r"gate_up_proj": "2", r"down_proj": WHOLE},
    "GPTNeoXForCausalLM": {**EMBEDDINGS, **HEAD, **NEOX},
    "FalconForCausalLM": {**EMBEDDINGS, **NEOX},
    "BloomForCausalLM": {**EMBEDDINGS, **NEOX},
    "PersimmonForCausalLM": {**EMBEDDINGS, **HEAD, **NEOX},
    "CodeGenForCausalLM": {**EMBEDDINGS, **HEAD, r"qkv_proj": "3", r"out_proj|fc_in|fc_out": WHOLE},
    "GPTBigCodeForCausalLM": {**EMBEDDINGS, r"c_attn": "3", r"c_proj|c_fc": WHOLE},
    "MptForCausalLM": {**EMBEDDINGS, r"Wqkv": "3", r"out_proj|up_proj|down_proj": WHOLE},
    "BertForMaskedLM": {**EMBEDDINGS, **BERT, r"self\.(query|key|value)": WHOLE},
    "ModernBertForMaskedLM": {**EMBEDDINGS, **BERT, r"Wqkv": "3", r"Wi": "2", r"Wo": WHOLE},
    "DebertaModel": {**EMBEDDINGS, **BERT, r"in_proj": "3", r"pos_(q_)?proj": WHOLE},
    "T5ForConditionalGeneration": {**EMBEDDINGS, r"Attention\.[qkvo]\.|\.w[io]\.": WHOLE},
    "BartForConditionalGeneration": {**EMBEDDINGS, **SPEECH},
    "MambaForCausalLM": {**EMBEDDINGS, r"A_log|conv1d": ADAMW,
                         r"(in|x|dt|out)_proj": WHOLE},
    "MixtralForCausalLM": {**EMBEDDINGS, **HEAD, **SELF, **STACKS, **ROUTER},
    "Qwen3MoeForCausalLM": {**EMBEDDINGS, **HEAD, **SELF, **STACKS, **ROUTER},
    "Qwen3NextForCausalLM": {**EMBEDDINGS, **HEAD, **DELTA, **STACKS, **ROUTER,
                             r"in_proj_qkvz": "4", r"in_proj_ba": "2", r"shared_expert": WHOLE},
    "Qwen3_5ForCausalLM": {**EMBEDDINGS, **HEAD, **DELTA, **MLP, r"in_proj_qkv\.": "3",
                           r"in_proj_[zba]\.": WHOLE},
    "GptOssForCausalLM": {**EMBEDDINGS, **HEAD, **SELF, **ROUTER, r"proj_bias": ADAMW,
                          r"experts\.gate_up_proj$": "3 x 2 in x out",
                          r"experts\.down_proj$": "3 x 1 in x out"},
    "DeepseekV3ForCausalLM": {**EMBEDDINGS, **HEAD, **MLP, **ROUTER, r"(q_a|q_b|o)_proj": WHOLE,
                              r"kv_a_proj_with_mqa": "2", r"kv_b_proj": "2",
                              r"mlp\.experts\.gate_up_proj$": "4 x 2",
                              r"mlp\.experts\.down_proj$": "4 x 1", r"shared_experts": WHOLE},
    "GraniteMoeSharedForCausalLM": {**EMBEDDINGS, **HEAD, **SELF, **STACKS, **ROUTER,
                                    r"shared_mlp\.input_linear": "2",
                                    r"shared_mlp\.output_linear": WHOLE},
    "DbrxForCausalLM": {**EMBEDDINGS, **HEAD, r"Wqkv": "3", r"out_proj|router": WHOLE,
                        r"mlp\.[wv]1$": "3", r"mlp\.w2$": "3 in x out"},
    "JetMoeForCausalLM": {**EMBEDDINGS, r"(in|out)put_linear": "3 x 1", r"router\.layer": WHOLE,
                          r"kv_proj": "2"},
    "ViTForImageClassification": {**IMAGE, r"^classifier": WHOLE},
    "CLIPVisionModel": {**IMAGE, r"self_attn\.(q|k|v|out)_proj": WHOLE},
    "Dinov2Model": {**IMAGE, **MLP},
    "BlipVisionModel": {**IMAGE, r"self_attn\.qkv": "3", r"self_attn\.projection": WHOLE},
    "SamVisionModel": {r"pos_embed|rel_pos_[hw]": ADAMW, r"patch_embed\.projection": WHOLE,
                       r"attn\.qkv": "3", r"attn\.proj": WHOLE, r"mlp\.lin|neck\.conv": WHOLE},
    "ConvNextModel": {r"dwconv": ADAMW, r"patch_embeddings|pwconv|downsampling": WHOLE},
    # an embedding that is not trained is Whisper's sinusoids
    "WhisperModel": {**SPEECH, r"encoder\.conv[12]": WHOLE, r"encoder\.embed_positions": FROZEN,
                     r"decoder\.embed": ADAMW},
    "Wav2Vec2Model": {r"feature_extractor": WHOLE, r"feature_projection": WHOLE,
                      r"pos_conv_embed": ADAMW, r"attention\.(q|k|v|out)_proj": WHOLE,
                      r"feed_forward": WHOLE},
    # its output has another vocabulary than its input, and it says of itself that it has no head
    "BarkSemanticModel": {**EMBEDDINGS, r"att_proj": "3", r"(in|out)_proj": WHOLE,
                          r"^lm_head": WHOLE},
    "ASTModel": IMAGE,
    "MoonshineForConditionalGeneration": {**EMBEDDINGS, r"_attn\.[qkvo]_proj": WHOLE,
                                          r"encoder\.conv[123]": WHOLE,
                                          r"encoder\.layers\.\d+\.mlp\.fc1": WHOLE,
                                          r"decoder\.layers\.\d+\.mlp\.fc1": "2",
                                          r"mlp\.fc2": WHOLE},
}  # fmt: skip
"""Pattern -> where it goes: into how many matrices (of how many experts), or to AdamW."""

HEADS: dict[str, dict[str, int]] = {
    "LlamaForCausalLM": {r"q_proj": 4, r"[kv]_proj": 2},
    "Phi3ForCausalLM": {r"qkv_proj": 8},
    "GPTNeoXForCausalLM": {r"query_key_value": 12},
    "FalconForCausalLM": {r"query_key_value": 6},
    "CodeGenForCausalLM": {r"qkv_proj": 24},
    "BertForMaskedLM": {r"query|key|value": 4},
    "T5ForConditionalGeneration": {r"Attention\.[qkv]\.": 4},
    "DeepseekV3ForCausalLM": {r"q_b_proj": 4, r"kv_b_proj": 8},
    "Qwen3NextForCausalLM": {r"q_proj": 8, r"self_attn\.[kv]_proj": 2, r"in_proj_qkvz": 12},
    "GptOssForCausalLM": {r"q_proj": 4, r"[kv]_proj": 2},
    "GPT2LMHeadModel": {r"c_attn": 12},
    "SamVisionModel": {r"attn\.qkv": 12},
    "WhisperModel": {r"attn\.[qkv]_proj": 4},
}  # fmt: skip
"""Pattern -> the number of matrices of a weight that is cut into its heads; no other weight is."""


def destination(spec: ParamSpec) -> str:
    """Return where a parameter goes, in the words of ``EXPECTED``."""
    if spec.kind != "matrix":
        return {"scalar": ADAMW, "frozen": FROZEN}[spec.kind]
    count = len(spec.matrices)
    stack = f"{spec.shape[0]} x {count // spec.shape[0]}" if spec.stacked else str(count)
    return stack + " in x out" * spec.matrices[0].transposed


def test_of_every_kind() -> None:
    assert CONFIGS.keys() == EXPECTED.keys()
    assert len(EXPECTED) >= 40


@pytest.mark.parametrize("name", EXPECTED)
def test_each_parameter_goes_where_it_should(name: str) -> None:
    expected = EXPECTED[name]
    patterns: set[str] = set()
    for spec in classify(build(name)):
        if len(spec.shape) < 2:
            continue
        (pattern, *others) = [p for p in expected if re.search(p, spec.name)] or [""]
        assert pattern, f"{spec.name} is not expected: {destination(spec)}"
        assert not others, f"{spec.name} matches {pattern} and {others}"
        assert destination(spec) == expected[pattern], f"{spec.name}: {spec.reason}"
        numbers = torch.arange(torch.Size(spec.shape).numel()).view(spec.shape)
        covered = [matrix_of(m, numbers).flatten() for m in spec.matrices]
        if covered:
            assert torch.equal(torch.cat(covered).long().sort().values, numbers.flatten())
        patterns.add(pattern)
    unused = {p for p in expected if p not in patterns}
    assert not unused - {*EMBEDDINGS, *IMAGE}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    model = build(name)
    whole = {spec.name: spec for spec in classify(model)}
    for spec in classify(model, heads="auto"):
        counts = [count for pattern, count in HEADS[name].items() if re.search(pattern, spec.name)]
        expected = counts[0] if spec.kind == "matrix" and counts else len(whole[spec.name].matrices)
        assert len(spec.matrices) == expected, spec.name
        assert spec.reason.endswith("per head") == (spec.kind == "matrix" and bool(counts))


def test_reasons_name_the_class() -> None:
    reasons = {spec.reason for spec in classify(build("GPTNeoXForCausalLM"))}
    assert "Linear, q, k and v each (GPTNeoXAttention)" in reasons
    reasons = {spec.reason for spec in classify(build("GPTNeoXForCausalLM"), heads="auto")}
    assert "Linear, q, k and v each (GPTNeoXAttention), per head" in reasons


def test_split_of_the_user_wins() -> None:
    """Over the architecture, over heads, and one part is the whole, under the weight's own name."""
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    model = build("GPTNeoXForCausalLM")
    by_hand = {s.name: s for s in classify(model, split={r"query_key_value\.weight": [48, 48]})}
    assert [m.shape for m in by_hand[name].matrices] == [(48, 32)] * 2
    one = {s.name: s for s in classify(model, split={r"query_key_value\.weight": 1})}
    assert [(m.name, m.shape) for m in one[name].matrices] == [(name, (96, 32))]
    assert one[name].reason == "Linear"
    llama = build("LlamaForCausalLM")
    both = {s.name: s for s in classify(llama, split={"q_proj": 1}, heads="auto")}
    assert len(both["model.layers.0.self_attn.q_proj.weight"].matrices) == 1
    assert len(both["model.layers.0.self_attn.k_proj.weight"].matrices) == 2


class GPTNeoXAttention(nn.Module):
    """This class has the name of one of transformers', and another layout for all we know."""

    num_attention_heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(32, 96)


def test_only_transformers_classes_are_recognised() -> None:
    (spec, _) = classify(GPTNeoXAttention())
    assert len(spec.matrices) == 1


def test_no_heads_is_an_error_that_says_what_to_write() -> None:
    model = ModelOf(up=nn.Linear(8, 8), head=nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"heads is 'auto', but .*split=\{\"q_proj\": 32\}"):
        classify(model, heads="auto")


@pytest.mark.parametrize("heads", [True, 4, "all", {"q_proj": 4}])
def test_heads_that_are_not_known(heads: object) -> None:
    with pytest.raises(ValueError, match=r"heads is .*; write 'auto'"):
        classify(build("LlamaForCausalLM"), heads=heads)  # type: ignore[arg-type]


def test_heads_that_do_not_fit() -> None:
    model = build("LlamaForCausalLM")
    model.model.layers[0].self_attn.head_dim = 5  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match=r"32 rows of .*q_proj.weight .*heads of 5 rows"):
        classify(model, heads="auto")


def test_heads_of_torch_and_of_your_own_modules() -> None:
    torch_attention = nn.MultiheadAttention(8, 2)
    specs = {s.name: s for s in classify(ModelOf(attn=torch_attention), heads="auto")}
    assert [m.shape for m in specs["attn.in_proj_weight"].matrices] == [(4, 8)] * 6
    other = nn.MultiheadAttention(8, 2, kdim=6, vdim=5)
    specs = {s.name: s for s in classify(ModelOf(attn=other), heads="auto")}
    assert [m.shape for m in specs["attn.k_proj_weight"].matrices] == [(4, 6)] * 2
    own = ModelOf(q_proj=nn.Linear(8, 8), k_proj=nn.Linear(8, 4), v_proj=nn.Linear(8, 4))
    own.head_dim = 2  # type: ignore[assignment]
    specs = {s.name: s for s in classify(ModelOf(attn=own), heads="auto")}
    assert len(specs["attn.q_proj.weight"].matrices) == 4
    assert len(specs["attn.v_proj.weight"].matrices) == 2


def test_compiled_modules() -> None:
    """What torch.compile puts between a layer and its module changes nothing."""
    model = build("GPTNeoXForCausalLM")
    attention = model.gpt_neox.layers[0].attention  # type: ignore[union-attr, index]
    attention.query_key_value = torch.compile(attention.query_key_value, backend="eager")
    compiled = torch.compile(model, backend="eager")
    (fused,) = (s for s in classify(compiled) if "query_key_value.w" in s.name)
    assert len(fused.matrices) == 3


def test_every_layout_in_the_docs() -> None:
    """The table in the docs is what ``architectures.describe()`` returns: paste it there."""
    text = DOCS.read_text(encoding="utf-8")
    assert architectures.describe() in text


def test_every_class_exists() -> None:
    """In the installed transformers, so that no row waits for a class that has been renamed."""
    import transformers

    folder = Path(transformers.__file__).parent / "models"
    source = "\n".join(p.read_text(encoding="utf-8") for p in folder.glob("*/modeling_*.py"))
    defined = set(re.findall(r"^class (\w+)\(", source, re.MULTILINE))
    assert {name for row in architectures.ROWS for name in row.classes} <= defined
