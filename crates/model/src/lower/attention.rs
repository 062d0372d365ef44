//! Attention with heads of keys and values, and latent attention.

use lathe_program::{AttendSpec, GateKind, KvLayerShape, LatentSpec, Value, WeightRole};

use super::builder::{Builder, Matrix};
use crate::spec::{AttentionSpec, GqaSpec, MlaSpec, OutputGate, QkNorm, QkOrder, QkScope};

pub(super) fn lower(b: &mut Builder, spec: &AttentionSpec, input: Value) -> Value {
    match spec {
        AttentionSpec::Gqa(spec) => gqa(b, spec, input),
        AttentionSpec::Mla(spec) => mla(b, spec, input),
    }
}

fn gqa(b: &mut Builder, spec: &GqaSpec, input: Value) -> Value {
    let bias = spec.qkv_bias;
    let [query, key, value] = b.linear(
        input,
        [
            Matrix { name: "attention.query", out: spec.heads * spec.head_dim, bias },
            Matrix { name: "attention.key", out: spec.kv_heads * spec.head_dim, bias },
            Matrix { name: "attention.value", out: spec.kv_heads * spec.head_dim, bias },
        ],
    );
    let attended = heads(b, spec, [query, key, value]);
    let attended = gate(b, spec, input, attended);
    output(b, spec.output_bias, attended)
}

/// Places queries and keys, stores keys and values, and attends: `[rows, heads * head_dim]`.
pub(super) fn heads(b: &mut Builder, spec: &GqaSpec, [query, key, value]: [Value; 3]) -> Value {
    let query = place(b, spec, "query", spec.heads, query);
    let key = place(b, spec, "key", spec.kv_heads, key);
    let shape = KvLayerShape::Heads {
        kv_heads: spec.kv_heads,
        key_dim: spec.head_dim,
        value_dim: spec.head_dim,
    };
    let window = b.window(spec.window);
    let layer = b.kv_layer(shape, window);
    b.program.write_kv(key, value, layer);
    let sinks = spec.sinks.then(|| b.vector("attention.sinks", spec.heads));
    let attend = AttendSpec {
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        value_dim: spec.head_dim,
        scale: spec.scale,
        window,
        softcap: spec.softcap,
        sinks,
    };
    let name = b.name("attention.attended");
    b.program.attend(query, layer, attend, name)
}

/// Normalises and turns the heads of a query or key.
fn place(b: &mut Builder, spec: &GqaSpec, which: &str, heads: usize, input: Value) -> Value {
    let turn = |b: &mut Builder, input| match &spec.rope {
        Some(rope) => {
            let rope = b.rope_table(rope);
            b.rope(&format!("attention.{which}_turned"), input, heads, 0, rope)
        }
        None => input,
    };
    match spec.qk_norm {
        None => turn(b, input),
        Some(qk) if qk.order == QkOrder::BeforeRope => {
            let input = qk_norm(b, &qk, which, heads, input);
            turn(b, input)
        }
        Some(qk) => {
            let input = turn(b, input);
            qk_norm(b, &qk, which, heads, input)
        }
    }
}

fn qk_norm(b: &mut Builder, qk: &QkNorm, which: &str, heads: usize, input: Value) -> Value {
    let groups = match qk.scope {
        QkScope::PerHead => heads,
        QkScope::WholeRow => 1,
    };
    b.norm(&format!("attention.{which}_norm"), &qk.norm, input, groups)
}

fn gate(b: &mut Builder, spec: &GqaSpec, input: Value, attended: Value) -> Value {
    let width = match spec.output_gate {
        None => return attended,
        Some(OutputGate::SigmoidPerHead) => spec.heads,
        Some(OutputGate::SigmoidPerElement) => spec.heads * spec.head_dim,
    };
    let [gate] = b.linear(input, [Matrix { name: "attention.gate", out: width, bias: false }]);
    let name = b.name("attention.gated");
    b.program.gate(attended, gate, GateKind::Sigmoid, name)
}

pub(super) fn output(b: &mut Builder, bias: bool, attended: Value) -> Value {
    let out = b.width;
    let [out] = b.linear(attended, [Matrix { name: "attention.output", out, bias }]);
    out
}

fn mla(b: &mut Builder, spec: &MlaSpec, input: Value) -> Value {
    let bias = spec.down_bias;
    let query_width = spec.heads * (spec.nope_dim + spec.rope_dim);
    let first = match spec.query_rank {
        Some(rank) => Matrix { name: "attention.query_down", out: rank, bias },
        None => Matrix { name: "attention.query", out: query_width, bias: false },
    };
    let [query, latent, rope_key] = b.linear(
        input,
        [
            first,
            Matrix { name: "attention.kv_down", out: spec.rank, bias },
            Matrix { name: "attention.rope_key", out: spec.rope_dim, bias },
        ],
    );
    let query = match spec.query_rank {
        None => query,
        Some(_) => {
            let query = b.norm("attention.query_down_norm", &spec.latent_norm, query, 1);
            let up = Matrix { name: "attention.query_up", out: query_width, bias: false };
            let [query] = b.linear(query, [up]);
            query
        }
    };
    let latent = b.norm("attention.kv_norm", &spec.latent_norm, latent, 1);
    let rope = b.rope_table(&spec.rope);
    let query = b.rope("attention.query_turned", query, spec.heads, spec.nope_dim, rope);
    let rope_key = b.rope("attention.rope_key_turned", rope_key, 1, 0, rope);
    let window = b.window(spec.window);
    let shape = KvLayerShape::Latent { rank: spec.rank, rope_dim: spec.rope_dim };
    let layer = b.kv_layer(shape, window);
    b.program.write_latent(latent, rope_key, layer);
    let key_up = [spec.heads * spec.nope_dim, spec.rank];
    let value_up = [spec.heads * spec.value_dim, spec.rank];
    let attend = LatentSpec {
        heads: spec.heads,
        rank: spec.rank,
        rope_dim: spec.rope_dim,
        nope_dim: spec.nope_dim,
        value_dim: spec.value_dim,
        scale: spec.scale,
        window,
        softcap: None,
        key_up: b.weight("attention.key_up", &key_up, WeightRole::Linear),
        value_up: b.weight("attention.value_up", &value_up, WeightRole::Linear),
    };
    let name = b.name("attention.attended");
    let attended = b.program.attend_latent(query, layer, attend, name);
    output(b, spec.output_bias, attended)
}
