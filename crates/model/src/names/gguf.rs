//! Tensor names of GGUF files (llama.cpp's).

use super::Source::{EachExpert, Part, Unpermuted, Whole};
use super::{Rules, rule};

const QKV: &[&str] = &["attention.query", "attention.key", "attention.value"];
const QKV_BIAS: &[&str] = &["attention.query_bias", "attention.key_bias", "attention.value_bias"];

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
    rule("ffn.experts.gate", &[Whole("ffn_gate_exps.weight"), EachExpert("ffn_gate.{}.weight")]),
    rule("ffn.experts.up", &[Whole("ffn_up_exps.weight"), EachExpert("ffn_up.{}.weight")]),
    rule("ffn.experts.down", &[Whole("ffn_down_exps.weight"), EachExpert("ffn_down.{}.weight")]),
];

/// Query and key rows in the order that the converter gives Llama.
pub static PERMUTED: Rules = &[
    rule("attention.query", &[Unpermuted("attn_q.weight")]),
    rule("attention.key", &[Unpermuted("attn_k.weight")]),
    rule("attention.query_bias", &[Unpermuted("attn_q.bias")]),
    rule("attention.key_bias", &[Unpermuted("attn_k.bias")]),
];
