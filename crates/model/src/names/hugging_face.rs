//! Tensor names of Hugging Face checkpoints.

use super::TensorSource::{
    Alternate, AlternateTransposed, EachExpert, Part, PartOfEachHead, PartTransposed, Transposed,
    Whole,
};
use super::{Rules, rule};

const QKV: &[&str] = &["attention.query", "attention.key", "attention.value"];
const QKV_BIAS: &[&str] = &["attention.query_bias", "attention.key_bias", "attention.value_bias"];
const KV_DOWN: &[&str] = &["attention.kv_down", "attention.rope_key"];
const KV_DOWN_BIAS: &[&str] = &["attention.kv_down_bias", "attention.rope_key_bias"];
const KV_UP: &[&str] = &["attention.key_up", "attention.value_up"];
const GATE_UP: &[&str] = &["ffn.gate", "ffn.up"];
const SHARED: &[&str] = &["ffn.shared.gate", "ffn.shared.up"];
const EXPERTS: &[&str] = &["ffn.experts.gate", "ffn.experts.up"];

const KV_A: &str = "self_attn.kv_a_proj_with_mqa.weight";
const KV_A_BIAS: &str = "self_attn.kv_a_proj_with_mqa.bias";
const KV_B: &str = "self_attn.kv_b_proj.weight";
const STACKED: &str = "mlp.experts.gate_up_proj";

/// What most families share.
pub static COMMON: Rules = &[
    rule("embedding", &[Whole("embed_tokens.weight")]),
    rule("final_norm", &[Whole("norm.weight")]),
    rule("final_norm_bias", &[Whole("norm.bias")]),
    rule("attention_norm", &[Whole("input_layernorm.weight")]),
    rule("attention_norm_bias", &[Whole("input_layernorm.bias")]),
    rule("ffn_norm", &[Whole("post_attention_layernorm.weight")]),
    rule("ffn_norm_bias", &[Whole("post_attention_layernorm.bias")]),
    rule(
        "attention.query",
        &[Whole("self_attn.q_proj.weight"), Part("self_attn.qkv_proj.weight", QKV)],
    ),
    rule(
        "attention.key",
        &[Whole("self_attn.k_proj.weight"), Part("self_attn.qkv_proj.weight", QKV)],
    ),
    rule(
        "attention.value",
        &[Whole("self_attn.v_proj.weight"), Part("self_attn.qkv_proj.weight", QKV)],
    ),
    rule("attention.output", &[Whole("self_attn.o_proj.weight")]),
    rule(
        "attention.query_bias",
        &[Whole("self_attn.q_proj.bias"), Part("self_attn.qkv_proj.bias", QKV_BIAS)],
    ),
    rule(
        "attention.key_bias",
        &[Whole("self_attn.k_proj.bias"), Part("self_attn.qkv_proj.bias", QKV_BIAS)],
    ),
    rule(
        "attention.value_bias",
        &[Whole("self_attn.v_proj.bias"), Part("self_attn.qkv_proj.bias", QKV_BIAS)],
    ),
    rule("attention.output_bias", &[Whole("self_attn.o_proj.bias")]),
    rule("attention.query_norm", &[Whole("self_attn.q_norm.weight")]),
    rule("attention.key_norm", &[Whole("self_attn.k_norm.weight")]),
    rule("attention.sinks", &[Whole("self_attn.sinks")]),
    rule("attention.query_down", &[Whole("self_attn.q_a_proj.weight")]),
    rule("attention.query_down_bias", &[Whole("self_attn.q_a_proj.bias")]),
    rule("attention.query_down_norm", &[Whole("self_attn.q_a_layernorm.weight")]),
    rule("attention.query_up", &[Whole("self_attn.q_b_proj.weight")]),
    rule("attention.kv_down", &[Part(KV_A, KV_DOWN)]),
    rule("attention.rope_key", &[Part(KV_A, KV_DOWN)]),
    rule("attention.kv_down_bias", &[Part(KV_A_BIAS, KV_DOWN_BIAS)]),
    rule("attention.rope_key_bias", &[Part(KV_A_BIAS, KV_DOWN_BIAS)]),
    rule("attention.kv_norm", &[Whole("self_attn.kv_a_layernorm.weight")]),
    rule("attention.key_up", &[PartOfEachHead(KV_B, KV_UP)]),
    rule("attention.value_up", &[PartOfEachHead(KV_B, KV_UP)]),
    rule("ffn.gate", &[Whole("mlp.gate_proj.weight"), Part("mlp.gate_up_proj.weight", GATE_UP)]),
    rule("ffn.up", &[Whole("mlp.up_proj.weight"), Part("mlp.gate_up_proj.weight", GATE_UP)]),
    rule("ffn.down", &[Whole("mlp.down_proj.weight")]),
    rule("ffn.gate_bias", &[Whole("mlp.gate_proj.bias")]),
    rule("ffn.up_bias", &[Whole("mlp.up_proj.bias")]),
    rule("ffn.down_bias", &[Whole("mlp.down_proj.bias")]),
    rule("ffn.router", &[Whole("mlp.gate.weight")]),
    rule("ffn.router_correction", &[Whole("mlp.gate.e_score_correction_bias")]),
    rule(
        "ffn.experts.gate",
        &[EachExpert("mlp.experts.{}.gate_proj.weight"), Part(STACKED, EXPERTS)],
    ),
    rule("ffn.experts.up", &[EachExpert("mlp.experts.{}.up_proj.weight"), Part(STACKED, EXPERTS)]),
    rule(
        "ffn.experts.down",
        &[EachExpert("mlp.experts.{}.down_proj.weight"), Whole("mlp.experts.down_proj")],
    ),
    rule("ffn.shared.gate", &[Whole("mlp.shared_experts.gate_proj.weight")]),
    rule("ffn.shared.up", &[Whole("mlp.shared_experts.up_proj.weight")]),
    rule("ffn.shared.down", &[Whole("mlp.shared_experts.down_proj.weight")]),
];

/// A norm on each branch's output and none before (OLMo 2).
pub static POST_NORMS: Rules = &[
    rule("attention_post_norm", &[Whole("post_attention_layernorm.weight")]),
    rule("ffn_post_norm", &[Whole("post_feedforward_layernorm.weight")]),
];

/// Norms before and after each branch (Gemma 2 and 3).
pub static SANDWICH: Rules = &[
    rule("attention_post_norm", &[Whole("post_attention_layernorm.weight")]),
    rule("ffn_norm", &[Whole("pre_feedforward_layernorm.weight")]),
    rule("ffn_post_norm", &[Whole("post_feedforward_layernorm.weight")]),
];

/// Experts under Mixtral's names, or fused as transformers 5 keeps them in memory.
pub static MIXTRAL: Rules = &[
    rule("ffn.router", &[Whole("block_sparse_moe.gate.weight"), Whole("mlp.gate.weight")]),
    rule(
        "ffn.experts.gate",
        &[EachExpert("block_sparse_moe.experts.{}.w1.weight"), Part(STACKED, EXPERTS)],
    ),
    rule(
        "ffn.experts.up",
        &[EachExpert("block_sparse_moe.experts.{}.w3.weight"), Part(STACKED, EXPERTS)],
    ),
    rule(
        "ffn.experts.down",
        &[EachExpert("block_sparse_moe.experts.{}.w2.weight"), Whole("mlp.experts.down_proj")],
    ),
];

/// Experts of Qwen 3 that sees, each as it is or, as published, transposed: the shape says which.
pub static QWEN3_VL_MOE: Rules = &[
    rule("ffn.experts.gate", &[Part(STACKED, EXPERTS), PartTransposed(STACKED, EXPERTS)]),
    rule("ffn.experts.up", &[Part(STACKED, EXPERTS), PartTransposed(STACKED, EXPERTS)]),
    rule(
        "ffn.experts.down",
        &[Whole("mlp.experts.down_proj"), Transposed("mlp.experts.down_proj")],
    ),
];

/// The correction of MiniMax M2's router.
pub static MINIMAX_M2: Rules = &[rule(
    "ffn.router_correction",
    &[Whole("block_sparse_moe.e_score_correction_bias"), Whole("mlp.e_score_correction_bias")],
)];

/// One shared expert with a gate (Qwen 2 with experts).
pub static SHARED_EXPERT: Rules = &[
    rule("ffn.shared.gate", &[Whole("mlp.shared_expert.gate_proj.weight")]),
    rule("ffn.shared.up", &[Whole("mlp.shared_expert.up_proj.weight")]),
    rule("ffn.shared.down", &[Whole("mlp.shared_expert.down_proj.weight")]),
    rule("ffn.shared.router", &[Whole("mlp.shared_expert_gate.weight")]),
];

const EXPERT_BIASES: &[&str] = &["ffn.experts.gate_bias", "ffn.experts.up_bias"];
const BLOCKS: &str = "mlp.experts.gate_up_proj_blocks";

/// gpt-oss: gate and up take turns, row by row in MXFP4 and column by column in plain numbers,
/// where each expert is stored transposed.
pub static GPT_OSS: Rules = &[
    rule("ffn.router", &[Whole("mlp.router.weight")]),
    rule("ffn.router_bias", &[Whole("mlp.router.bias")]),
    rule("ffn.experts.gate", &[Alternate(BLOCKS, EXPERTS), AlternateTransposed(STACKED, EXPERTS)]),
    rule("ffn.experts.up", &[Alternate(BLOCKS, EXPERTS), AlternateTransposed(STACKED, EXPERTS)]),
    rule(
        "ffn.experts.down",
        &[Whole("mlp.experts.down_proj_blocks"), Transposed("mlp.experts.down_proj")],
    ),
    rule("ffn.experts.gate_bias", &[Alternate("mlp.experts.gate_up_proj_bias", EXPERT_BIASES)]),
    rule("ffn.experts.up_bias", &[Alternate("mlp.experts.gate_up_proj_bias", EXPERT_BIASES)]),
    rule("ffn.experts.down_bias", &[Whole("mlp.experts.down_proj_bias")]),
];

/// Experts as Granite keeps them, and the one that all tokens visit.
pub static GRANITE_MOE: Rules = &[
    rule("ffn.router", &[Whole("block_sparse_moe.router.layer.weight")]),
    rule("ffn.experts.gate", &[Part("block_sparse_moe.input_linear.weight", EXPERTS)]),
    rule("ffn.experts.up", &[Part("block_sparse_moe.input_linear.weight", EXPERTS)]),
    rule("ffn.experts.down", &[Whole("block_sparse_moe.output_linear.weight")]),
    rule("ffn.shared.gate", &[Part("shared_mlp.input_linear.weight", SHARED)]),
    rule("ffn.shared.up", &[Part("shared_mlp.input_linear.weight", SHARED)]),
    rule("ffn.shared.down", &[Whole("shared_mlp.output_linear.weight")]),
];

/// Norms on the branches' outputs beside those before them (GLM 4).
pub static GLM4_NORMS: Rules = &[
    rule("attention_post_norm", &[Whole("post_self_attn_layernorm.weight")]),
    rule("ffn_post_norm", &[Whole("post_mlp_layernorm.weight")]),
];

/// Norms of heads under another name (Hunyuan).
pub static HEAD_LAYERNORMS: Rules = &[
    rule("attention.query_norm", &[Whole("self_attn.query_layernorm.weight")]),
    rule("attention.key_norm", &[Whole("self_attn.key_layernorm.weight")]),
];

/// A feed-forward layer without a gate under GPT-2's names (StarCoder 2).
pub static C_NAMES: Rules = &[
    rule("ffn.up", &[Whole("mlp.c_fc.weight")]),
    rule("ffn.up_bias", &[Whole("mlp.c_fc.bias")]),
    rule("ffn.down", &[Whole("mlp.c_proj.weight")]),
    rule("ffn.down_bias", &[Whole("mlp.c_proj.bias")]),
];

/// The correction of ERNIE's router.
pub static ERNIE_MOE: Rules =
    &[rule("ffn.router_correction", &[Whole("mlp.moe_statics.e_score_correction_bias")])];

/// The rules of all families: what modules are called where the base's file does not say.
pub static ALL: &[Rules] = &[
    COMMON,
    POST_NORMS,
    SANDWICH,
    MIXTRAL,
    SHARED_EXPERT,
    GPT_OSS,
    GRANITE_MOE,
    GLM4_NORMS,
    HEAD_LAYERNORMS,
    C_NAMES,
    ERNIE_MOE,
    MINIMAX_M2,
    QWEN3_VL_MOE,
];
