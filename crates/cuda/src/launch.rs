//! From an op to its kernels.

use lathe_program::{
    Activation, AttendSpec, BackendError, ExpertsSpec, GroupScore, KvLayer, LatentSpec, LinearPart,
    NormKind, Op, RopeStyle, RouterScore, RouterSpec, Value, Weight,
};

use crate::device::LaunchShape;
use crate::executor::CudaExecutor;
use crate::parameters::*;
use crate::weights::Stored;

/// Threads of a block where an element, or a warp, is a unit of work.
const THREADS: usize = 256;
/// Outputs of such a block of the products: one a warp.
const OUTPUTS: usize = THREADS / 32;
/// As in `plain.cu`.
const LINEAR_ROWS: usize = 8;
const ATTEND_WARPS: usize = 4;

/// The number of [`Activation::SwiGlu`] in the kernels.
pub(crate) const SWIGLU: u32 = 0;

pub(crate) fn activation(kind: Activation) -> (u32, f32, f32) {
    match kind {
        Activation::SwiGlu => (SWIGLU, 0.0, 0.0),
        Activation::GeGluTanh => (1, 0.0, 0.0),
        Activation::GeGluErf => (2, 0.0, 0.0),
        Activation::SwiGluClamped { alpha, limit } => (3, alpha, limit),
        Activation::Silu => (4, 0.0, 0.0),
        Activation::GeluTanh => (5, 0.0, 0.0),
        Activation::ReluSquared => (6, 0.0, 0.0),
    }
}

/// A product `[rows, width] x [outputs, width]^T`.
pub(crate) struct Product {
    pub(crate) input: u64,
    pub(crate) weight: Weight,
    pub(crate) bias: u64,
    pub(crate) pick: u64,
    pub(crate) out: u64,
    pub(crate) sizes: [usize; 3],
    pub(crate) scale: f32,
    pub(crate) cap: f32,
}

impl CudaExecutor {
    pub(crate) fn per_element(
        &self,
        kernel: &str,
        elements: usize,
        parameters: &impl Parameters,
    ) -> Result<(), BackendError> {
        let blocks = elements.div_ceil(THREADS);
        self.device.launch(kernel, [blocks, 1], (THREADS, 0), parameters)
    }

    fn product(&self, product: &Product) -> Result<(), BackendError> {
        let [rows, outputs, width] = product.sizes;
        if rows == 0 {
            return Ok(());
        }
        let (matrix, stored) = self.matrix(product.weight);
        if let Some(format) = stored.packed() {
            return self.packed_product(product, format);
        }
        let parameters = Linear {
            input: product.input,
            matrix,
            bias: product.bias,
            pick: product.pick,
            out: product.out,
            rows: rows as u32,
            outputs: outputs as u32,
            width: width as u32,
            scale: product.scale,
            cap: product.cap,
        };
        let grid = [outputs.div_ceil(OUTPUTS), rows.div_ceil(LINEAR_ROWS)];
        let kernel = format!("linear_{}", stored.suffix());
        self.device.launch(&kernel, grid, (THREADS, 0), &parameters)
    }

    pub(crate) fn width(&self, value: Value) -> usize {
        self.program.value_width(value)
    }

    fn matrix(&self, weight: Weight) -> (u64, Stored) {
        (self.weights.address(weight), self.weights.stored(weight))
    }

    /// Submits the kernels of `op` for the rows of the step uploaded last.
    pub(crate) fn launch(&self, op: &Op) -> Result<(), BackendError> {
        match op {
            Op::Embed { .. } => self.embed(op),
            Op::Input { input, out } => {
                self.device.copy(self.step.input(*input), self.value(*out), self.row_bytes(*out))
            }
            Op::Norm { .. } => self.normalise(op),
            Op::Linear { input, parts } => {
                parts.iter().try_for_each(|part| self.linear(*input, part))
            }
            Op::Transform { input, transform, out } => {
                let (from, to) = (self.value(*input), self.value(*out));
                match transform.hadamard {
                    Some(block) => self.hadamard(from, to, block, self.elements(*out)),
                    None => self.device.copy(from, to, self.row_bytes(*out)),
                }
            }
            Op::Rope { .. } => self.turn(op),
            Op::WriteKv { key: first, value: second, layer }
            | Op::WriteLatent { latent: first, rope_key: second, layer } => {
                self.write_kv(*layer, [*first, *second])
            }
            Op::Attend { query, layer, spec, out } => {
                self.attend_heads(self.cache.view(*layer, &self.step), *query, spec, *out)
            }
            Op::AttendLatent { query, layer, spec, out } => {
                let cache = self.cache.view(*layer, &self.step);
                self.attend_latent(cache, self.value(*query), spec, self.value(*out))
            }
            Op::Activate { .. } | Op::Add { .. } | Op::Gate { .. } | Op::Slice { .. } => {
                self.elementwise(op)
            }
            Op::Route { input, spec, out } => self.route(self.value(*input), *input, spec, out.0),
            Op::Experts { input, routing, spec, out } => {
                let addresses = [self.value(*input), self.value(*out)];
                self.experts(spec, addresses, [self.width(*input), self.width(*out)], routing.0)
            }
            Op::AllReduce { input, out } | Op::AllGather { input, out } => {
                self.device.copy(self.value(*input), self.value(*out), self.row_bytes(*out))
            }
            Op::Logits { .. } => self.make_logits(op),
            Op::Capture { input, tap } => {
                let to = self.captures[*tap as usize].address();
                self.device.copy(self.value(*input), to, self.row_bytes(*input))
            }
        }
    }

    fn elements(&self, value: Value) -> usize {
        self.rows * self.width(value)
    }

    fn row_bytes(&self, value: Value) -> usize {
        self.elements(value) * 4
    }

    fn make_logits(&self, op: &Op) -> Result<(), BackendError> {
        let Op::Logits { input, head, scale, softcap, .. } = op else { return Ok(()) };
        self.product(&Product {
            input: self.value(*input),
            weight: *head,
            bias: 0,
            pick: self.step.pick(),
            out: self.logits.address(),
            sizes: [self.choices, self.program.vocabulary, self.width(*input)],
            scale: *scale,
            cap: softcap.unwrap_or(0.0),
        })
    }

    fn embed(&self, op: &Op) -> Result<(), BackendError> {
        let Op::Embed { table, first_token, multiplier, out } = op else { return Ok(()) };
        let (address, stored) = self.matrix(*table);
        let format = stored.packed();
        let (group_units, half_scales) = format.map_or((0, 0), |format| format.groups());
        let parameters = Embed {
            rows: self.step.rows(),
            chosen: self.best_tokens.address(),
            table: address,
            out: self.value(*out),
            width: self.width(*out) as u32,
            first_token: *first_token,
            tokens: self.program.weight(*table).shape[0] as u32,
            multiplier: *multiplier,
            scales: self.weights.scales(*table),
            tile_bytes: format.map_or(0, |it| it.tile_bytes(self.width(*out)) as u32),
            group_units,
            half_scales,
        };
        let kernel = format!("embed_{}", stored.suffix());
        let shape = LaunchShape {
            grid: [self.rows, 1, 1],
            threads: THREADS,
            shared_bytes: 0,
            dependent: format.is_some(),
        };
        self.device.launch_shaped(&kernel, shape, &parameters)
    }

    fn normalise(&self, op: &Op) -> Result<(), BackendError> {
        let Op::Norm { input, weight, bias, kind, epsilon, groups, out } = op else {
            return Ok(());
        };
        let n = self.width(*input) / groups;
        let whole = |vector: Option<Weight>| {
            let length = vector.map(|vector| self.program.weight(vector).shape[0]);
            u32::from(length.is_some_and(|length| length != n))
        };
        let parameters = Norm {
            input: self.value(*input),
            weight: self.weights.optional(*weight),
            bias: self.weights.optional(*bias),
            out: self.value(*out),
            n: n as u32,
            groups: *groups as u32,
            weight_per_element: whole(*weight),
            bias_per_element: whole(*bias),
            layer: u32::from(*kind == NormKind::Layer),
            offset: if let NormKind::Rms { offset } = kind { *offset } else { 0.0 },
            epsilon: *epsilon,
        };
        self.device.launch("normalise", [self.rows * groups, 1], (THREADS, 0), &parameters)
    }

    fn turn(&self, op: &Op) -> Result<(), BackendError> {
        let Op::Rope { input, heads, offset, rope, out } = op else { return Ok(()) };
        let table = &self.program.ropes[rope.0 as usize];
        let parameters = RopeTurn {
            rows: self.step.rows(),
            input: self.value(*input),
            frequencies: self.ropes[rope.0 as usize].address(),
            out: self.value(*out),
            heads: *heads as u32,
            head_width: (self.width(*input) / heads) as u32,
            offset: *offset as u32,
            pairs: table.inverse_frequencies.len() as u32,
            interleaved: u32::from(table.style == RopeStyle::Interleaved),
            magnitude: table.magnitude,
        };
        self.device.launch("rope", [self.rows, 1], (THREADS, 0), &parameters)
    }

    fn linear(&self, input: Value, part: &LinearPart) -> Result<(), BackendError> {
        self.product(&Product {
            input: self.value(input),
            weight: part.weight,
            bias: self.weights.optional(part.bias),
            pick: 0,
            out: self.value(part.out),
            sizes: [self.rows, self.width(part.out), self.width(input)],
            scale: 1.0,
            cap: 0.0,
        })
    }

    fn write_kv(&self, layer: KvLayer, [first, second]: [Value; 2]) -> Result<(), BackendError> {
        let shape = self.program.kv.layer(layer).shape;
        let [(first_count, first_dim), (second_count, second_dim)] = shape.vectors();
        let parameters = WriteKv {
            cache: self.cache.view(layer, &self.step),
            rows: self.step.rows(),
            first: self.value(first),
            second: self.value(second),
            first_count: first_count as u32,
            first_dim: first_dim as u32,
            second_count: second_count as u32,
            second_dim: second_dim as u32,
        };
        let kernel = format!("write_kv_{}", self.kv_suffix);
        self.device.launch(&kernel, [self.rows, 1], (THREADS, 0), &parameters)
    }

    fn attend_heads(
        &self,
        cache: CacheView,
        query: Value,
        spec: &AttendSpec,
        out: Value,
    ) -> Result<(), BackendError> {
        if self.tiled(spec) {
            return self.prefill(cache, self.value(query), spec, self.value(out));
        }
        if self.splits(spec) {
            return self.attend_split(cache, self.value(query), spec, self.value(out));
        }
        self.attend(&Attend {
            cache,
            rows: self.step.rows(),
            query: self.value(query),
            query_rope: 0,
            sinks: self.weights.optional(spec.sinks),
            out: self.value(out),
            heads: spec.heads as u32,
            kv_heads: spec.kv_heads as u32,
            key_dim: spec.head_dim as u32,
            value_dim: spec.value_dim as u32,
            rope_dim: 0,
            rope_stride: 0,
            rope_head_stride: 0,
            window: spec.window.unwrap_or(0) as u32,
            scale: spec.scale,
            cap: spec.softcap.unwrap_or(0.0),
        })
    }

    fn elementwise(&self, op: &Op) -> Result<(), BackendError> {
        match op {
            Op::Activate { gate, up, kind, out } => {
                let elements = self.elements(*out);
                let (kind, alpha, limit) = activation(*kind);
                let (gate, out) = (self.value(*gate), self.value(*out));
                let up = up.map_or(gate, |up| self.value(up));
                let parameters =
                    Activate { gate, up, out, elements: elements as u64, kind, alpha, limit };
                self.per_element("activate", elements, &parameters)
            }
            Op::Add { left, right, scale, out } => {
                let elements = self.elements(*out);
                let parameters = AddScaled {
                    left: self.value(*left),
                    right: self.value(*right),
                    out: self.value(*out),
                    elements: elements as u64,
                    scale: *scale,
                };
                self.per_element("add_scaled", elements, &parameters)
            }
            Op::Gate { input, gate, out, .. } => {
                let elements = self.elements(*out);
                let parameters = GateRows {
                    input: self.value(*input),
                    gate: self.value(*gate),
                    out: self.value(*out),
                    elements: elements as u64,
                    run: (self.width(*input) / self.width(*gate)) as u32,
                };
                self.per_element("gate_sigmoid", elements, &parameters)
            }
            Op::Slice { input, start, out } => {
                let elements = self.elements(*out);
                let parameters = SliceRows {
                    input: self.value(*input),
                    out: self.value(*out),
                    elements: elements as u64,
                    width_in: self.width(*input) as u32,
                    width_out: self.width(*out) as u32,
                    start: *start as u32,
                };
                self.per_element("slice", elements, &parameters)
            }
            _ => Ok(()),
        }
    }

    fn hadamard(
        &self,
        input: u64,
        out: u64,
        n: usize,
        elements: usize,
    ) -> Result<(), BackendError> {
        let matrix = self.hadamards[&n].address();
        let parameters = HadamardBlocks { input, matrix, out, n: n as u32 };
        self.device.launch("hadamard", [elements / n, 1], (THREADS, n * 4), &parameters)
    }

    fn attend(&self, parameters: &Attend) -> Result<(), BackendError> {
        let Attend { heads, key_dim, value_dim, rope_dim, .. } = *parameters;
        let shared = (key_dim + rope_dim) as usize + ATTEND_WARPS * value_dim as usize;
        let kernel = format!("attend_{}", self.kv_suffix);
        let grid = [self.rows, heads as usize];
        self.device.launch(&kernel, grid, (ATTEND_WARPS * 32, shared * 4), parameters)
    }

    /// The absorbed form: queries are turned into latent space and attend to the latents.
    fn attend_latent(
        &self,
        cache: CacheView,
        query: u64,
        spec: &LatentSpec,
        out: u64,
    ) -> Result<(), BackendError> {
        let LatentSpec { heads, rank, rope_dim, nope_dim, value_dim, .. } = *spec;
        let (turned, mixed) = (self.scratch[0].address(), self.scratch[1].address());
        let query_dim = nope_dim + rope_dim;
        let (key_up, stored) = self.matrix(spec.key_up);
        let turn = LatentTurn {
            query,
            key_up,
            out: turned,
            heads: heads as u32,
            query_dim: query_dim as u32,
            nope_dim: nope_dim as u32,
            rank: rank as u32,
        };
        let kernel = format!("latent_turn_{}", stored.suffix());
        self.device.launch(&kernel, [self.rows, heads], (THREADS, 0), &turn)?;
        self.attend(&Attend {
            cache,
            rows: self.step.rows(),
            query: turned,
            query_rope: query + 4 * nope_dim as u64,
            sinks: 0,
            out: mixed,
            heads: heads as u32,
            kv_heads: 1,
            key_dim: rank as u32,
            value_dim: rank as u32,
            rope_dim: rope_dim as u32,
            rope_stride: (heads * query_dim) as u32,
            rope_head_stride: query_dim as u32,
            window: spec.window.unwrap_or(0) as u32,
            scale: spec.scale,
            cap: spec.softcap.unwrap_or(0.0),
        })?;
        let (value_up, stored) = self.matrix(spec.value_up);
        let mix = LatentMix {
            mixed,
            value_up,
            out,
            heads: heads as u32,
            value_dim: value_dim as u32,
            rank: rank as u32,
        };
        let kernel = format!("latent_mix_{}", stored.suffix());
        self.device.launch(&kernel, [self.rows, heads], (THREADS, 0), &mix)
    }

    fn route(
        &self,
        address: u64,
        input: Value,
        spec: &RouterSpec,
        routing: u32,
    ) -> Result<(), BackendError> {
        let logits = self.scratch[0].address();
        self.product(&Product {
            input: address,
            weight: spec.weight,
            bias: self.weights.optional(spec.bias),
            pick: 0,
            out: logits,
            sizes: [self.rows, spec.experts, self.width(input)],
            scale: 1.0,
            cap: 0.0,
        })?;
        let (experts_out, weights_out) = self.routings[routing as usize].addresses();
        let groups = spec.groups.map_or(0, |limit| limit.groups);
        let parameters = RouteRows {
            logits,
            correction: self.weights.optional(spec.correction),
            experts_out,
            weights_out,
            experts: spec.experts as u32,
            per_token: spec.experts_per_token as u32,
            score: match spec.score {
                RouterScore::Softmax => 0,
                RouterScore::SoftmaxOfChosen => 1,
                RouterScore::Sigmoid => 2,
            },
            normalise: u32::from(spec.normalise),
            groups: groups as u32,
            groups_kept: spec.groups.map_or(0, |limit| limit.groups_per_token) as u32,
            top_two: u32::from(spec.groups.is_some_and(|l| l.score == GroupScore::TopTwoSum)),
            scaling: spec.scaling,
        };
        let shared = 2 * spec.experts + 2 * groups + spec.experts_per_token;
        self.device.launch("route", [self.rows, 1], (32, shared * 4), &parameters)
    }

    fn experts(
        &self,
        spec: &ExpertsSpec,
        [input, out]: [u64; 2],
        [width, out_width]: [usize; 2],
        routing: u32,
    ) -> Result<(), BackendError> {
        let routing = &self.routings[routing as usize];
        let (experts, weights) = routing.addresses();
        let hidden = self.scratch[0].address();
        let (kind, alpha, limit) = activation(spec.activation);
        let gate_up = ExpertsRows {
            input,
            experts,
            weights,
            first: self.weights.address(spec.gate),
            second: self.weights.address(spec.up),
            first_bias: self.weights.optional(spec.gate_bias),
            second_bias: self.weights.optional(spec.up_bias),
            out: hidden,
            per_token: routing.per_token as u32,
            width: width as u32,
            outputs: spec.hidden as u32,
            first_expert: spec.first_expert as u32,
            held: spec.experts as u32,
            weigh_input: u32::from(spec.weigh_input),
            kind,
            alpha,
            limit,
        };
        let slots = self.rows * routing.per_token;
        let kernel = format!("experts_gate_up_{}", self.weights.stored(spec.gate).suffix());
        let grid = [spec.hidden.div_ceil(OUTPUTS), slots];
        self.device.launch(&kernel, grid, (THREADS, 0), &gate_up)?;
        if let Some(block) = spec.hidden_transform.hadamard {
            self.hadamard(hidden, hidden, block, slots * spec.hidden)?;
        }
        let down = ExpertsRows {
            input: hidden,
            first: self.weights.address(spec.down),
            second: 0,
            first_bias: self.weights.optional(spec.down_bias),
            second_bias: 0,
            out,
            width: spec.hidden as u32,
            outputs: out_width as u32,
            ..gate_up
        };
        let kernel = format!("experts_down_{}", self.weights.stored(spec.down).suffix());
        let grid = [out_width.div_ceil(OUTPUTS), self.rows];
        self.device.launch(&kernel, grid, (THREADS, 0), &down)
    }
}
