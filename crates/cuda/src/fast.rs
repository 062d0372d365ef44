//! How the fast kernels are launched.

use lathe_program::{
    AttendSpec, BackendError, KvFormat, LinearPart, NormKind, Op, RopeStyle, Weight,
};

use crate::device::LaunchShape;
use crate::executor::CudaExecutor;
use crate::gemm::{FINISH_ROWS, GEMM_OUTPUTS, GEMM_THREADS, GemmKernel, PREPARE_THREADS};
use crate::launch::{Product, SWIGLU, activation};
use crate::packed::{PackedFormat, TILE};
use crate::parameters::*;
use crate::units::*;

/// Head sizes that `prefill.cu` has kernels for.
const PREFILL_HEAD_DIMS: [usize; 2] = [64, 128];

fn stream_name(format: PackedFormat, rows: usize) -> String {
    format!("stream_{}_{rows}", format.name())
}

/// Says how the matrices lie.
fn lay_out(parameters: &mut Stream, format: PackedFormat) {
    parameters.tile_bytes = format.tile_bytes(parameters.width as usize) as u32;
    (parameters.group_units, parameters.half_scales) = format.groups();
}

impl CudaExecutor {
    /// Lets the kernels have the shared memory that they may need.
    pub(crate) fn prepare_kernels(&self) -> Result<(), BackendError> {
        let allow = |kernel: &str, bytes| self.device.allow_shared(kernel, bytes);
        for head_dim in PREFILL_HEAD_DIMS {
            allow(&format!("prefill_{head_dim}"), prefill_shared_bytes(head_dim))?;
        }
        let int4 = PackedFormat::Int4 { group_units: 0, half_scales: false };
        for format in [PackedFormat::Bf16, PackedFormat::Fp8, int4] {
            for rows in 1..=STREAM_ROWS {
                allow(&stream_name(format, rows), SHARED_BYTES)?;
            }
            for kernel in GemmKernel::all() {
                let bytes = kernel.shared_bytes(format);
                allow(&kernel.name(format, false), bytes)?;
                allow(&kernel.name(format, true), bytes)?;
            }
        }
        Ok(())
    }

    /// Submits the kernels of ops that run together.
    pub(crate) fn launch_unit(&self, unit: &Unit) -> Result<(), BackendError> {
        let program = &self.program;
        match unit {
            Unit::Op(at) => self.launch(&program.ops[*at]),
            Unit::TurnAndStore(at) => self.turn_and_store(*at),
            Unit::Streamed(it) => self.streamed(it),
        }
    }

    fn streamed(&self, it: &Streamed) -> Result<(), BackendError> {
        let ops = &self.program.ops;
        let Some((rows, format, parameters)) = self.product_of(it) else {
            return ops[it.first..it.end].iter().try_for_each(|op| self.launch(op));
        };
        let written = &parameters.segments[..if parameters.paired == 1 { 1 } else { 3 }];
        // Blocks that are done write while others still read the input.
        let overwrites = written.iter().any(|segment| segment.out == parameters.input);
        if streams(rows, parameters.width as usize, format.chunk_bytes()) && !overwrites {
            return self.stream(rows, format, parameters);
        }
        self.gemm(rows, format, parameters)
    }

    fn segment(&self, part: &LinearPart) -> Segment {
        self.segment_of(part.weight, self.weights.optional(part.bias), self.value(part.out))
    }

    fn segment_of(&self, weight: Weight, bias: u64, out: u64) -> Segment {
        let outputs = self.program.weight(weight).shape[0];
        let (matrix, scales) = (self.weights.address(weight), self.weights.scales(weight));
        let tiles = outputs.div_ceil(TILE) as u32;
        Segment { matrix, scales, bias, out, outputs: outputs as u32, tiles }
    }

    /// The rows of a product, and the product with what is before and after it.
    fn product_of(&self, it: &Streamed) -> Option<(usize, PackedFormat, Stream)> {
        let ops = &self.program.ops;
        let weight = match &ops[it.product] {
            Op::Linear { parts, .. } => parts.first()?.weight,
            Op::Logits { head, .. } => *head,
            _ => return None,
        };
        let format = self.weights.stored(weight).packed()?;
        let mut parameters = match &ops[it.product] {
            Op::Linear { input, parts } => {
                let mut segments = [Segment::default(); 3];
                for (segment, part) in segments.iter_mut().zip(parts) {
                    *segment = self.segment(part);
                }
                let width = self.width(*input) as u32;
                let count = parts.len() as u32;
                Stream { segments, count, width, scale: 1.0, ..Stream::default() }
            }
            Op::Logits { input, head, scale, softcap, .. } => Stream {
                segments: [
                    self.segment_of(*head, 0, self.logits.address()),
                    Segment::default(),
                    Segment::default(),
                ],
                count: 1,
                width: self.width(*input) as u32,
                pick: self.step.pick(),
                scale: *scale,
                cap: softcap.unwrap_or(0.0),
                ..Stream::default()
            },
            _ => return None,
        };
        lay_out(&mut parameters, format);
        let logits = matches!(&ops[it.product], Op::Logits { .. });
        let rows = if logits { self.choices } else { self.rows };
        parameters.input = ops[it.first].inputs().next().map(|input| self.value(input))?;
        if let Some(Op::Norm { weight, kind, epsilon, .. }) = it.norm.map(|at| &ops[at]) {
            parameters.norm = self.weights.optional(*weight);
            parameters.normed = 1;
            parameters.epsilon = *epsilon;
            parameters.offset = if let NormKind::Rms { offset } = kind { *offset } else { 0.0 };
        }
        match it.after {
            After::Nothing => {}
            After::Activate(at) => {
                let Op::Activate { kind, out, .. } = &ops[at] else { return None };
                parameters.paired = 1;
                parameters.segments[0].out = self.value(*out);
                (parameters.kind, parameters.alpha, parameters.limit) = activation(*kind);
            }
            After::Add(at) => {
                let Op::Add { left, scale, out, .. } = &ops[at] else { return None };
                parameters.residual = self.value(*left);
                parameters.add_scale = *scale;
                parameters.segments[0].out = self.value(*out);
            }
        }
        Some((rows, format, parameters))
    }

    fn stream(
        &self,
        rows: usize,
        format: PackedFormat,
        mut parameters: Stream,
    ) -> Result<(), BackendError> {
        let width = parameters.width as usize;
        let chunk_bytes = format.chunk_bytes();
        let stages = stream_stages(rows, width, chunk_bytes).unwrap_or(STAGES_MIN);
        parameters.stages = stages as u32;
        let shape = LaunchShape {
            grid: [PROCESSORS, 1, 1],
            threads: STREAM_THREADS,
            shared_bytes: stream_fixed_bytes(rows, width) + stages * (chunk_bytes + 16),
            dependent: true,
        };
        self.device.launch_shaped(&stream_name(format, rows), shape, &parameters)
    }

    /// A product with a matrix in fragment order.
    pub(crate) fn packed_product(
        &self,
        product: &Product,
        format: PackedFormat,
    ) -> Result<(), BackendError> {
        let [rows, _, width] = product.sizes;
        let segment = self.segment_of(product.weight, product.bias, product.out);
        let mut parameters = Stream {
            segments: [segment, Segment::default(), Segment::default()],
            count: 1,
            input: product.input,
            pick: product.pick,
            width: width as u32,
            scale: product.scale,
            cap: product.cap,
            ..Stream::default()
        };
        lay_out(&mut parameters, format);
        match streams(rows, width, format.chunk_bytes()) && product.input != product.out {
            true => self.stream(rows, format, parameters),
            false => self.gemm(rows, format, parameters),
        }
    }

    fn gemm(&self, rows: usize, format: PackedFormat, product: Stream) -> Result<(), BackendError> {
        if rows == 0 {
            return Ok(());
        }
        let kernel = GemmKernel::of(rows);
        let width = product.width as usize;
        let paired = product.paired == 1;
        let held = &product.segments[..product.count as usize];
        let tiles = held.iter().map(|segment| segment.tiles as usize).sum::<usize>();
        let cut = kernel.cut(rows, tiles, width, paired);
        let padded = kernel.padded(rows) as u32;
        let prepare = Prepare {
            input: product.input,
            norm: product.norm,
            pick: product.pick,
            out: self.prepared.address(),
            width: product.width,
            padded,
            parts: kernel.parts as u32,
            normed: product.normed,
            offset: product.offset,
            epsilon: product.epsilon,
            factor: format.activation_factor(),
        };
        let shape = LaunchShape {
            grid: [rows, 1, 1],
            threads: PREPARE_THREADS,
            shared_bytes: 0,
            dependent: true,
        };
        self.device.launch_shaped("prepare_rows", shape, &prepare)?;
        let gemm = Gemm {
            product,
            x: prepare.out,
            sums: self.product_sums.address(),
            rows: rows as u32,
            parts: prepare.parts,
            padded,
            tiles: tiles as u32,
            columns: kernel.columns as u32,
            across: cut.across as u32,
            down: cut.down as u32,
            slabs: cut.slabs as u32,
            share: cut.share as u32,
            plain: u32::from(product.cap == 0.0 && (!paired || product.kind == SWIGLU)),
        };
        let shape = LaunchShape {
            grid: [PROCESSORS, 1, 1],
            threads: GEMM_THREADS,
            shared_bytes: kernel.shared_bytes(format),
            dependent: true,
        };
        self.device.launch_shaped(&kernel.name(format, paired), shape, &gemm)?;
        if cut.share == 0 {
            return Ok(());
        }
        let shape = LaunchShape {
            grid: [cut.down, rows.div_ceil(FINISH_ROWS), 1],
            threads: FINISH_ROWS * GEMM_OUTPUTS,
            shared_bytes: 0,
            dependent: true,
        };
        self.device.launch_shaped("gemm_finish", shape, &gemm)
    }

    /// The sines and cosines of the step's rows, for `turn_and_store`.
    pub(crate) fn rope_angles(&self) -> Result<(), BackendError> {
        if !self.units.iter().any(|unit| matches!(unit, Unit::TurnAndStore(_))) {
            return Ok(());
        }
        for (index, table) in self.program.ropes.iter().enumerate() {
            let pairs = table.inverse_frequencies.len();
            let parameters = RopeAngles {
                rows: self.step.rows(),
                frequencies: self.ropes[index].address(),
                out: self.angles[index].address(),
                pairs: pairs as u32,
                magnitude: table.magnitude,
            };
            let shape = LaunchShape {
                grid: [self.rows, 1, 1],
                threads: pairs.next_multiple_of(32).clamp(32, 256),
                shared_bytes: 0,
                dependent: true,
            };
            self.device.launch_shaped("rope_angles", shape, &parameters)?;
        }
        Ok(())
    }

    fn turn_and_store(&self, at: usize) -> Result<(), BackendError> {
        let ops = &self.program.ops;
        let (
            Op::Rope { input: query, heads, offset, rope, out: query_out },
            Op::Rope { input: key, heads: kv_heads, out: key_out, .. },
            Op::WriteKv { value, layer, .. },
        ) = (&ops[at], &ops[at + 1], &ops[at + 2])
        else {
            return Ok(());
        };
        let table = &self.program.ropes[rope.0 as usize];
        let parameters = TurnAndStore {
            cache: self.cache.view(*layer, &self.step),
            rows: self.step.rows(),
            query: self.value(*query),
            key: self.value(*key),
            value: self.value(*value),
            angles: self.angles[rope.0 as usize].address(),
            query_out: self.value(*query_out),
            key_out: self.value(*key_out),
            heads: *heads as u32,
            kv_heads: *kv_heads as u32,
            dim: (self.width(*key) / kv_heads) as u32,
            value_dim: (self.width(*value) / kv_heads) as u32,
            offset: *offset as u32,
            pairs: table.inverse_frequencies.len() as u32,
            interleaved: u32::from(table.style == RopeStyle::Interleaved),
        };
        let warps = 4;
        let shape = LaunchShape {
            grid: [self.rows, (heads + 2 * kv_heads).div_ceil(warps), 1],
            threads: warps * 32,
            shared_bytes: 0,
            dependent: true,
        };
        self.device.launch_shaped("turn_and_store", shape, &parameters)
    }

    /// Whether `attend_split` has a kernel for these heads and this cache.
    pub(crate) fn splits(&self, spec: &AttendSpec) -> bool {
        let queries = spec.heads / spec.kv_heads;
        !self.exact
            && self.cache.format() == KvFormat::BF16
            && spec.head_dim == spec.value_dim
            && matches!(spec.head_dim, 32 | 64 | 128)
            && queries <= 8
    }

    /// Whether the step's tiles fit these heads and this cache.
    pub(crate) fn tiled(&self, spec: &AttendSpec) -> bool {
        !self.exact
            && self.step.tile_count() > 0
            && self.cache.format() == KvFormat::BF16
            && spec.head_dim == spec.value_dim
            && PREFILL_HEAD_DIMS.contains(&spec.head_dim)
            && spec.heads / spec.kv_heads * self.step.tile_rows() <= PREFILL_TILE
    }

    pub(crate) fn prefill(
        &self,
        cache: CacheView,
        query: u64,
        spec: &AttendSpec,
        out: u64,
    ) -> Result<(), BackendError> {
        let parameters = Prefill {
            cache,
            rows: self.step.rows(),
            tiles: self.step.tiles(),
            query,
            sinks: self.weights.optional(spec.sinks),
            out,
            kv_heads: spec.kv_heads as u32,
            queries: (spec.heads / spec.kv_heads) as u32,
            window: spec.window.unwrap_or(0) as u32,
            scale: spec.scale,
            cap: spec.softcap.unwrap_or(0.0),
        };
        let shape = LaunchShape {
            grid: [self.step.tile_count(), spec.kv_heads, 1],
            threads: PREFILL_THREADS,
            shared_bytes: prefill_shared_bytes(spec.head_dim),
            dependent: true,
        };
        self.device.launch_shaped(&format!("prefill_{}", spec.head_dim), shape, &parameters)
    }

    pub(crate) fn attend_split(
        &self,
        cache: CacheView,
        query: u64,
        spec: &AttendSpec,
        out: u64,
    ) -> Result<(), BackendError> {
        let AttendSpec { heads, kv_heads, head_dim, .. } = *spec;
        let queries = heads / kv_heads;
        let shares = (ATTEND_BLOCKS / (self.rows * kv_heads)).clamp(1, ATTEND_SHARES_MAX);
        let split = AttendSplit {
            cache,
            rows: self.step.rows(),
            query,
            parts: self.attention_parts.address(),
            kv_heads: kv_heads as u32,
            queries: queries as u32,
            shares: shares as u32,
            window: spec.window.unwrap_or(0) as u32,
            scale: spec.scale,
            cap: spec.softcap.unwrap_or(0.0),
        };
        let shape = LaunchShape {
            grid: [self.rows, kv_heads * shares, 1],
            threads: ATTEND_THREADS,
            shared_bytes: 0,
            dependent: true,
        };
        let kernel = format!("attend_split_{head_dim}_{}", queries.next_power_of_two());
        self.device.launch_shaped(&kernel, shape, &split)?;
        let join = AttendJoin {
            parts: split.parts,
            sinks: self.weights.optional(spec.sinks),
            out,
            heads: heads as u32,
            shares: shares as u32,
            dim: head_dim as u32,
        };
        let shape = LaunchShape { grid: [self.rows, heads, 1], threads: head_dim, ..shape };
        self.device.launch_shaped("attend_join", shape, &join)
    }

    /// The token of each choice's largest logit, to `best_tokens`.
    pub(crate) fn best(&self) -> Result<(), BackendError> {
        let parameters = Best {
            logits: self.logits.address(),
            parts: self.best_parts.address(),
            out: self.best_tokens.address(),
            vocabulary: self.program.vocabulary as u32,
        };
        let shape = LaunchShape {
            grid: [self.choices, BEST_PARTS, 1],
            threads: BEST_THREADS,
            shared_bytes: 0,
            dependent: true,
        };
        self.device.launch_shaped("best_parts", shape, &parameters)?;
        let shape = LaunchShape { grid: [self.choices, 1, 1], threads: 32, ..shape };
        self.device.launch_shaped("best_of_parts", shape, &parameters)
    }
}
