//! Feed-forward layers: dense, and mixtures of experts.

use lathe_program::{Activation, ExpertsSpec, GateKind, RouterSpec as RouterOp, Value, WeightRole};

use super::builder::{Builder, Matrix};
use crate::spec::{FfnSpec, MoeSpec, SharedSpec};

pub(super) fn lower(b: &mut Builder, spec: &FfnSpec, input: Value) -> Value {
    match spec {
        FfnSpec::Dense(dense) => {
            let names = ["ffn.gate", "ffn.up", "ffn.down"];
            gated(b, names, dense.hidden, dense.activation, dense.bias, input)
        }
        FfnSpec::Moe(moe) => mixture(b, moe, input),
    }
}

/// A feed-forward layer whose matrices have the `names` of gate, up and down. One without a gate
/// activates `up` alone.
fn gated(
    b: &mut Builder,
    names: [&str; 3],
    hidden: usize,
    kind: Activation,
    bias: bool,
    input: Value,
) -> Value {
    let [gate_name, up_name, down_name] = names;
    let (gate, up) = if kind.is_gated() {
        let gate = Matrix { name: gate_name, out: hidden, bias };
        let up = Matrix { name: up_name, out: hidden, bias };
        let [gate, up] = b.linear(input, [gate, up]);
        (gate, Some(up))
    } else {
        let [up] = b.linear(input, [Matrix { name: up_name, out: hidden, bias }]);
        (up, None)
    };
    let name = b.name("ffn.gated");
    let active = b.program.activate(gate, up, kind, name);
    let out = b.width;
    let [out] = b.linear(active, [Matrix { name: down_name, out, bias }]);
    out
}

fn mixture(b: &mut Builder, spec: &MoeSpec, input: Value) -> Value {
    let router = router(b, spec);
    let routing = b.program.route(input, router);
    let experts = experts(b, spec);
    let name = b.name("ffn.routed");
    let rows = b.transformed(input, "ffn.experts.gate");
    let routed = b.program.experts(rows, routing, experts, name);
    match spec.shared {
        None => routed,
        Some(shared) => {
            let always = shared_expert(b, spec, shared, input);
            b.add("ffn.mixed", routed, always, 1.0)
        }
    }
}

fn router(b: &mut Builder, spec: &MoeSpec) -> RouterOp {
    let router = &spec.router;
    let experts = router.experts;
    RouterOp {
        experts,
        experts_per_token: router.experts_per_token,
        score: router.score,
        normalise: router.normalise,
        scaling: router.scaling,
        groups: router.groups,
        weight: b.weight("ffn.router", &[experts, b.width], WeightRole::Router),
        bias: router.bias.then(|| b.vector("ffn.router_bias", experts)),
        correction: router.correction.then(|| b.vector("ffn.router_correction", experts)),
    }
}

fn experts(b: &mut Builder, spec: &MoeSpec) -> ExpertsSpec {
    let (experts, hidden, width) = (spec.router.experts, spec.hidden, b.width);
    let inward = [experts, hidden, width];
    let bias = |b: &mut Builder, name: &str, out: usize| {
        spec.bias.then(|| b.weight(name, &[experts, out], WeightRole::Vector))
    };
    ExpertsSpec {
        first_expert: 0,
        experts,
        hidden,
        activation: spec.activation,
        gate: b.weight("ffn.experts.gate", &inward, WeightRole::Experts),
        up: b.weight("ffn.experts.up", &inward, WeightRole::Experts),
        down: b.weight("ffn.experts.down", &[experts, width, hidden], WeightRole::Experts),
        gate_bias: bias(b, "ffn.experts.gate_bias", hidden),
        up_bias: bias(b, "ffn.experts.up_bias", hidden),
        down_bias: bias(b, "ffn.experts.down_bias", width),
        weigh_input: false,
        hidden_transform: b.input_of("ffn.experts.down"),
    }
}

fn shared_expert(b: &mut Builder, spec: &MoeSpec, shared: SharedSpec, input: Value) -> Value {
    let names = ["ffn.shared.gate", "ffn.shared.up", "ffn.shared.down"];
    let fed = gated(b, names, shared.hidden, spec.activation, false, input);
    if !shared.gated {
        return fed;
    }
    let matrix = Matrix { name: "ffn.shared.router", out: 1, bias: false };
    let [gate] = b.linear(input, [matrix]);
    let name = b.name("ffn.shared.gated");
    b.program.gate(fed, gate, GateKind::Sigmoid, name)
}
