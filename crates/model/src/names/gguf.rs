//! Tensor names of GGUF files (llama.cpp's).

use super::TensorSource::{EachExpert, Part, PartOfEachHead, TransposedHeads, Unpermuted, Whole};
use super::{Rules, rule};

const QKV: &[&str] = &["attention.query", "attention.key", "attention.value"];
const QKV_BIAS: &[&str] = &["attention.query_bias", "attention.key_bias", "attention.value_bias"];
const GATE_UP: &[&str] = &["ffn.gate", "ffn.up"];
const KV_DOWN: &[&str] = &["attention.kv_down", "attention.rope_key"];
const KV_UP: &[&str] = &["attention.key_up", "attention.value_up"];

/// Names that all architectures share.
pub static COMMON: Rules = &[
    rule("embedding", &[Whole("token_embd.weight")]),
    rule("final_norm", &[Whole("output_norm.weight")]),
    rule("attention_norm", &[Whole("attn_norm.weight")]),
    rule("attention_post_norm", &[Whole("post_attention_norm.weight")]),
    rule("ffn_norm", &[Whole("ffn_norm.weight")]),
    rule("ffn_post_norm", &[Whole("post_ffw_norm.weight")]),
    rule("attention.query", &[Whole("attn_q.weight"), Part("attn_qkv.weight", QKV)]),
    rule("attention.key", &[Whole("attn_k.weight"), Part("attn_qkv.weight", QKV)]),
    rule("attention.value", &[Whole("attn_v.weight"), Part("attn_qkv.weight", QKV)]),
    rule("attention.output", &[Whole("attn_output.weight")]),
    rule("attention.query_bias", &[Whole("attn_q.bias"), Part("attn_qkv.bias", QKV_BIAS)]),
    rule("attention.key_bias", &[Whole("attn_k.bias"), Part("attn_qkv.bias", QKV_BIAS)]),
    rule("attention.value_bias", &[Whole("attn_v.bias"), Part("attn_qkv.bias", QKV_BIAS)]),
    rule("attention.output_bias", &[Whole("attn_output.bias")]),
    rule("attention.query_norm", &[Whole("attn_q_norm.weight")]),
    rule("attention.key_norm", &[Whole("attn_k_norm.weight")]),
    rule("attention.sinks", &[Whole("attn_sinks.weight")]),
    rule("ffn.gate", &[Whole("ffn_gate.weight")]),
    rule("ffn.up", &[Whole("ffn_up.weight")]),
    rule("ffn.down", &[Whole("ffn_down.weight")]),
    rule("ffn.gate_bias", &[Whole("ffn_gate.bias")]),
    rule("ffn.up_bias", &[Whole("ffn_up.bias")]),
    rule("ffn.down_bias", &[Whole("ffn_down.bias")]),
    rule("ffn.router", &[Whole("ffn_gate_inp.weight")]),
    rule("ffn.router_bias", &[Whole("ffn_gate_inp.bias")]),
    rule("ffn.router_correction", &[Whole("exp_probs_b.bias")]),
    rule("ffn.experts.gate", &[Whole("ffn_gate_exps.weight"), EachExpert("ffn_gate.{}.weight")]),
    rule("ffn.experts.up", &[Whole("ffn_up_exps.weight"), EachExpert("ffn_up.{}.weight")]),
    rule("ffn.experts.down", &[Whole("ffn_down_exps.weight"), EachExpert("ffn_down.{}.weight")]),
    rule("ffn.experts.gate_bias", &[Whole("ffn_gate_exps.bias")]),
    rule("ffn.experts.up_bias", &[Whole("ffn_up_exps.bias")]),
    rule("ffn.experts.down_bias", &[Whole("ffn_down_exps.bias")]),
    rule("ffn.shared.gate", &[Whole("ffn_gate_shexp.weight")]),
    rule("ffn.shared.up", &[Whole("ffn_up_shexp.weight")]),
    rule("ffn.shared.down", &[Whole("ffn_down_shexp.weight")]),
    rule("ffn.shared.router", &[Whole("ffn_gate_inp_shexp.weight")]),
];

/// Query and key rows in the order that the converter gives Llama.
pub static PERMUTED: Rules = &[
    rule("attention.query", &[Unpermuted("attn_q.weight")]),
    rule("attention.key", &[Unpermuted("attn_k.weight")]),
    rule("attention.query_bias", &[Unpermuted("attn_q.bias")]),
    rule("attention.key_bias", &[Unpermuted("attn_k.bias")]),
];

/// Gate and up in one matrix, under the name of the latter.
pub static FUSED: Rules = &[
    rule("ffn.gate", &[Part("ffn_up.weight", GATE_UP)]),
    rule("ffn.up", &[Part("ffn_up.weight", GATE_UP)]),
];

/// What other architectures call the norm after attention is the one before the feed-forward part.
pub static EARLY_NORMS: Rules =
    &[rule("ffn_norm", &[Whole("post_attention_norm.weight"), Whole("ffn_norm.weight")])];

/// Latent attention; the up projection is split, its keys transposed, or whole in older files.
pub static LATENT: Rules = &[
    rule("attention.query_down", &[Whole("attn_q_a.weight")]),
    rule("attention.query_down_norm", &[Whole("attn_q_a_norm.weight")]),
    rule("attention.query_up", &[Whole("attn_q_b.weight")]),
    rule("attention.kv_down", &[Part("attn_kv_a_mqa.weight", KV_DOWN)]),
    rule("attention.rope_key", &[Part("attn_kv_a_mqa.weight", KV_DOWN)]),
    rule("attention.kv_norm", &[Whole("attn_kv_a_norm.weight")]),
    rule(
        "attention.key_up",
        &[TransposedHeads("attn_k_b.weight"), PartOfEachHead("attn_kv_b.weight", KV_UP)],
    ),
    rule(
        "attention.value_up",
        &[Whole("attn_v_b.weight"), PartOfEachHead("attn_kv_b.weight", KV_UP)],
    ),
];
