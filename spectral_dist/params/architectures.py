"""Weights of transformers' models that hold several matrices, recognised by their modules' classes.

Each layout is what the module's forward reads, in transformers 5.24. A class that is not listed is
not guessed at: its weights stay whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from spectral_dist.params.splits import Split

QKV = ("q", "k", "v")
GATE_UP = ("gate", "up")


@dataclass(frozen=True)
class Fused:
    """The matrices that lie one above the other in a weight, as rules read it (out, in).

    Attributes:
        parts: their names, in the order of ``split``.
        split: how the weight holds them.
        heads: for each part, the rows of each attention head; 0: the part has no heads.
        owner: the class that the module was recognised by.
    """

    parts: tuple[str, ...]
    split: Split
    heads: tuple[int, ...] = ()
    owner: str = ""

    def words(self) -> str:
        """Return what the table of parameters says of the weight."""
        return f"{', '.join(self.parts[:-1])} and {self.parts[-1]} each ({self.owner})"


Layout: TypeAlias = Callable[[Any, int], Fused | None]
"""From the module that has a weight, and its rows (outputs), to what it holds; None: one matrix."""


def head_size(holder: Any) -> int:
    """Return the rows of each head of q (and k) in an attention module; 0 if it does not say."""
    nope, rope = (getattr(holder, f"qk_{part}_head_dim", None) for part in ("nope", "rope"))
    if isinstance(nope, int) and isinstance(rope, int):  # latent attention: both parts of q
        return nope + rope
    names = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_head")
    sizes = [getattr(holder, name, None) for name in names]
    return next((size for size in sizes if isinstance(size, int) and size > 0), 0)


def head_count(holder: Any) -> int:
    """Return the number of heads of q in an attention module; 0 if it does not say."""
    config = getattr(holder, "config", None)
    for source in (holder, config):
        for name in ("num_attention_heads", "num_heads", "n_heads", "n_head"):
            count = getattr(source, name, None)
            if isinstance(count, int) and count > 0:
                return count
    return 0


def equal_heads(holder: Any, rows: int) -> int:
    """Return the rows of each head in a part that has as many heads as q; 0: it is not known."""
    count = head_count(holder)
    return rows // count if count and rows % count == 0 else 0


def _gate_up(holder: Any, rows: int) -> Fused:
    return Fused(GATE_UP, 2)


def _up_gate(holder: Any, rows: int) -> Fused:
    return Fused(("up", "gate"), 2)


def _key_value(holder: Any, rows: int) -> Fused:
    size = head_size(holder) or equal_heads(holder, rows // 2)
    return Fused(("k", "v"), 2, (size,) * 2)


def _thirds(holder: Any, rows: int) -> Fused:
    return Fused(QKV, 3, (equal_heads(holder, rows // 3),) * 3)


def _thirds_of_head(holder: Any, rows: int) -> Fused:
    size = equal_heads(holder, rows // 3)
    return Fused(QKV, [size] * 3, (size,) * 3)


def _query_key_value(holder: Any, rows: int) -> Fused:
    """The heads of q, then those of k, then those of v."""
    config, size = holder.config, head_size(holder)
    shared = getattr(holder, "num_key_value_heads", None) or config.num_key_value_heads
    return Fused(QKV, [head_count(holder) * size, shared * size, shared * size], (size,) * 3)


def _falcon(holder: Any, rows: int) -> Fused:
    size, queries, groups = holder.head_dim, holder.num_heads, 1
    if holder.new_decoder_architecture:
        groups = holder.num_kv_heads
    elif not holder.multi_query:
        groups = queries
    return Fused(QKV, [queries // groups * size, size, size], (size,) * 3)


def _bigcode(holder: Any, rows: int) -> Fused | None:
    if holder.is_cross_attention:
        return None
    size = holder.head_dim
    if not holder.multi_query:
        return _thirds_of_head(holder, rows)
    return Fused(QKV, [holder.embed_dim, holder.kv_dim, holder.kv_dim], (size,) * 3)


def _codegen(holder: Any, rows: int) -> Fused:
    """In each of four runs of heads: q, then v, then k."""
    run = holder.embed_dim // 4
    return Fused(("q", "v", "k"), [run] * 3, (holder.head_dim,) * 3)


def _exaone(holder: Any, rows: int) -> Fused:
    size = head_size(holder)
    return Fused(QKV, [holder.q_dim, holder.kv_dim, holder.kv_dim], (size,) * 3)


def _gpt2(holder: Any, rows: int) -> Fused:
    """q, k, v; of the encoder's output k, v alone."""
    if getattr(holder, "is_cross_attention", False):
        return Fused(("k", "v"), 2, (equal_heads(holder, rows // 2),) * 2)
    return _thirds(holder, rows)


def _latent(holder: Any, rows: int) -> Fused | None:
    if not holder.qk_rope_head_dim:
        return None
    return Fused(("latent", "rope key"), [holder.kv_lora_rank, holder.qk_rope_head_dim], (0, 0))


def _from_latent(holder: Any, rows: int) -> Fused:
    parts = [holder.qk_nope_head_dim, holder.v_head_dim]
    return Fused(("k", "v"), parts, (parts[0], parts[1]))


def _latent_gated_query(holder: Any, rows: int) -> Fused:
    parts = [holder.qk_head_dim, holder.v_head_dim]
    return Fused(("q", "gate"), parts, (parts[0], parts[1]))


def _gated_query(holder: Any, rows: int) -> Fused:
    return Fused(("q", "gate"), [holder.head_dim] * 2, (holder.head_dim,) * 2)


def _delta_net(holder: Any, rows: int) -> Fused:
    parts = [holder.key_dim, holder.key_dim, holder.value_dim]
    return Fused(QKV, parts, (holder.head_k_dim, holder.head_k_dim, holder.head_v_dim))


def _delta_net_groups(holder: Any, rows: int) -> Fused:
    values = holder.num_v_heads // holder.num_k_heads * holder.head_v_dim
    parts = [holder.head_k_dim, holder.head_k_dim, values, values]
    sizes = (holder.head_k_dim, holder.head_k_dim, holder.head_v_dim, holder.head_v_dim)
    return Fused(("q", "k", "v", "gate"), parts, sizes)


def _delta_net_scalars(holder: Any, rows: int) -> Fused:
    values = holder.num_v_heads // holder.num_k_heads
    return Fused(("beta", "decay"), [values, values], (0, 0))


@dataclass(frozen=True)
class Row:
    """One row of the table of architectures.

    Attributes:
        leaf: the name of the weight's layer in its module.
        classes: of the modules.
        order: the parts, top to bottom, as docs/what-goes-where.md says it.
        layout: from the module to the parts.
    """

    leaf: str
    classes: tuple[str, ...]
    order: str
    layout: Layout


_OVER = "all of each, one after the other"
_IN_HEAD = "q, k, v of a head, then of the next"
_MLA = (
    "AXK1Attention AXK2Attention BailingHybridAttention DeepseekV2Attention DeepseekV3Attention"
    " DeepseekV32Attention Dots3NoteTextAttention Glm4MoeLiteAttention Glm5NextTextAttention"
    " GlmMoeDsaAttention HYV4Attention HYV4VLAttention KimiLinearAttention LongcatFlashMLA"
    " MiniCPM3Attention Mistral4Attention MistralLarge4TextAttention YoutuAttention"
)
_VISION_QKV = (
    "BlipAttention Blip2Attention CohereCompassVisionAttention DeepseekOcr2SamVisionAttention"
    " Dots3NoteVisionAttention Ernie4_5_VLMoeVisionAttention Florence2VisionChannelAttention"
    " Florence2VisionWindowAttention Glm4vVisionAttention Glm4vMoeVisionAttention"
    " Glm5NextVisionAttention GlmImageVisionAttention GlmOcrVisionAttention GotOcr2VisionAttention"
    " HieraMaskUnitAttention InstructBlipAttention InstructBlipVideoAttention MgpstrAttention"
    " PPFormulaNetVisionAttention PPOCRV5MobileRecAttention PPOCRV5ServerRecAttention"
    " PPOCRV6SmallRecAttention Qwen2_5_VLVisionAttention Qwen3_5VisionAttention"
    " Qwen3_5MoeVisionAttention Qwen3OmniMoeVisionAttention Qwen3VLVisionAttention"
    " Qwen3VLMoeVisionAttention Qwen4ExpVisionAttention SLANeXtVisionAttention"
    " Sam2MultiScaleAttention SamVisionAttention SamHQVisionAttention SegGptAttention"
    " TimesformerSelfAttention UnlimitedOcrSamVisionAttention VisionAttention VitDetAttention"
)
_GATE_UP_MLP = (
    "DiaMLP Dots3NoteAudioMLP EsmFold2SwiGLU Glm4MLP Glm4vTextMLP GlmImageTextMLP GlmMLP"
    " GlmOcrTextMLP MiniMaxM3VLDenseMLP Phi3MLP Phi4MultimodalMLP Zamba2MLP"
)


def _row(leaf: str, classes: str, order: str, layout: Layout) -> Row:
    return Row(leaf, tuple(classes.split()), order, layout)


ROWS = (
    _row("qkv_proj", "Phi3Attention Phi4MultimodalAttention", f"q, k, v: {_OVER}",
         _query_key_value),
    _row("Wqkv", "DbrxAttention", f"q, k, v: {_OVER}", _query_key_value),
    _row("Wqkv", "ModernBertAttention MptAttention", f"q, k, v: {_OVER}", _thirds),
    _row("qkv", _VISION_QKV, f"q, k, v: {_OVER}", _thirds),
    _row("qkv", "Exaone4_5_VisionAttention", f"q, k, v: {_OVER}", _exaone),
    _row("att_proj", "BarkSelfAttention", f"q, k, v: {_OVER}", _thirds),
    _row("qkv_linear", "LayoutLMv2SelfAttention", f"q, k, v: {_OVER}", _thirds),
    _row("query_key_value", "BloomAttention GPTNeoXAttention GPTNeoXJapaneseAttention"
         " PersimmonAttention", _IN_HEAD, _thirds_of_head),
    _row("in_proj", "DisentangledSelfAttention", f"{_IN_HEAD} (DeBERTa, not v2)", _thirds_of_head),
    _row("proj", "EsmFoldSelfAttention", _IN_HEAD, _thirds_of_head),
    _row("qkv_proj", "MiniMaxLightningAttention", _IN_HEAD, _thirds_of_head),
    _row("query_key_value", "FalconAttention", "q, k, v of a head; with multi_query: q, k, v over"
         " all heads; with new_decoder_architecture: of a query group", _falcon),
    _row("c_attn", "Attention DecisionTransformerGPT2Attention GPT2Attention ImageGPTAttention",
         f"q, k, v: {_OVER} (columns: it is stored in x out); in cross-attention: k, v", _gpt2),
    _row("c_attn", "GPTBigCodeAttention", "q, k, v over all heads; without multi_query: of a head",
         _bigcode),
    _row("qkv_proj", "CodeGenAttention", "q, v, k of a quarter of the heads, then of the next",
         _codegen),
    _row("kv_proj", "JetMoeAttention", f"k, v: {_OVER}", _key_value),
    _row("to_kv", "EvollaSequenceCompressorAttention GraniteSpeechConformerAttention"
         " GraniteSpeechPlusConformerAttention", f"k, v: {_OVER}", _key_value),
    _row("q_proj", "Qwen3NextAttention Qwen3_5Attention Qwen3_5MoeAttention Qwen4ExpTextAttention",
         "q, output gate of a head, then of the next", _gated_query),
    _row("in_proj_qkv", "LaraMiniGatedDeltaNet Qwen3_5GatedDeltaNet Qwen3_5MoeGatedDeltaNet"
         " Qwen4ExpTextGatedDeltaNet", f"q, k, v: {_OVER}", _delta_net),
    _row("in_proj_qkvz", "Qwen3NextGatedDeltaNet", "q, k, v, gate of a key head, then of the next",
         _delta_net_groups),
    _row("in_proj_ba", "Qwen3NextGatedDeltaNet", "beta, decay of a key head, then of the next",
         _delta_net_scalars),
    _row("kv_a_proj_with_mqa", _MLA, "compressed k and v, then the key's rope part", _latent),
    _row("kv_b_proj", _MLA, "k without its rope part, v of a head, then of the next", _from_latent),
    _row("q_gate_proj", "AXK2Attention", "q, output gate of a head, then of the next",
         _latent_gated_query),
    _row("gate_up_proj", _GATE_UP_MLP, "gate, up", _gate_up),
    _row("gate_up_proj", "Phi4MultimodalAudioMLP", "up, gate", _up_gate),
    _row("input_linear", "GraniteMoeHybridMLP GraniteMoeSWAMLP GraniteMoeSharedMLP", "gate, up",
         _gate_up),
    _row("Wi", "ModernBertMLP ModernBertDecoderMLP", "gate, up", _gate_up),
    _row("fc1", "MoonshineDecoderMLP MoonshineStreamingDecoderMLP", "up, gate", _up_gate),
    _row("fc1", "MoshiGatingMLP", "gate, up", _gate_up),
)  # fmt: skip
"""The table of architectures, of layers in modules; experts say their layout themselves."""

SIDE_BY_SIDE = ("Llama4TextExperts",)
"""Classes of experts with gate and up in halves, which do not say so themselves."""

_LAYOUTS = {(row.leaf, name): row.layout for row in ROWS for name in row.classes}
_LEAVES = {row.leaf for row in ROWS}


def transformers_bases(module: nn.Module) -> list[str]:
    """Return the names of a module's classes that transformers itself has defined."""
    return [
        base.__name__
        for base in type(module).__mro__
        if base.__module__.startswith("transformers.")
    ]


def fused_linear(holder: nn.Module, leaf: str, rows: int) -> Fused | None:
    """Return what the weight of a layer of a module holds; None: one matrix, or it is not known.

    Args:
        holder: the module that has the layer.
        leaf: the layer's name in it.
        rows: of the weight, as rules read it.
    """
    if leaf not in _LEAVES:
        return None
    for name in transformers_bases(holder):
        if (leaf, name) in _LAYOUTS:
            fused = _LAYOUTS[leaf, name](holder, rows)
            return fused and Fused(fused.parts, fused.split, fused.heads, name)
    return None


def fused_experts(module: nn.Module, leaf: str) -> Fused | None:
    """Return what each matrix of a stack of experts holds, if its module says that it has a gate.

    Gate and up lie one above the other, or (GPT-OSS) a row of each in turn.
    """
    names = transformers_bases(module)
    if leaf != "gate_up_proj" or not names:
        return None
    if names[0] in SIDE_BY_SIDE:
        return Fused(GATE_UP, 2, owner=names[0])
    if not getattr(module, "has_gate", False) or not hasattr(module, "is_concatenated"):
        return None
    return Fused(GATE_UP, 2 if module.is_concatenated else [1, 1], owner=names[0])


def experts_above_each_other(module: nn.Module, leaf: str) -> int:
    """Return how many experts lie one above the other in a 2-D weight (DBRX's); 0: it holds none.

    Its w2 is stored (in, out).
    """
    if leaf not in ("w1", "v1", "w2") or "DbrxExpertGLU" not in transformers_bases(module):
        return 0
    return int(module.moe_num_experts)  # type: ignore[arg-type]


def describe() -> str:
    """Return the table of architectures as Markdown, for docs/what-goes-where.md."""
    lines = ["| weight | rows, top to bottom | of |", "|---|---|---|"]
    for row in ROWS:
        lines.append(f"| `{row.leaf}` | {row.order} | {', '.join(row.classes)} |")
    return "\n".join(lines)
