//! The arguments of the kernels, field by field those of the structures in `kernels`. Addresses
//! are the device's; 0 stands for what is absent.

/// A kernel's only argument.
///
/// # Safety
/// The type is `repr(C)` and its fields are those of the kernel's structure.
pub(crate) unsafe trait Parameters {}

macro_rules! parameters {
    ($($name:ident { $($field:ident: $kind:ty),* $(,)? })*) => { $(
        #[repr(C)]
        #[derive(Clone, Copy, Default)]
        pub(crate) struct $name { $(pub(crate) $field: $kind),* }
        // SAFETY: the fields are those of the kernel's structure.
        unsafe impl Parameters for $name {}
    )* };
}

parameters! {
    Embed {
        rows: u64, chosen: u64, table: u64, out: u64, width: u32, first_token: u32, tokens: u32,
        multiplier: f32, scales: u64, tile_bytes: u32, group_units: u32, half_scales: u32,
    }
    Norm {
        input: u64, weight: u64, bias: u64, out: u64, n: u32, groups: u32,
        weight_per_element: u32, bias_per_element: u32, layer: u32, offset: f32, epsilon: f32,
    }
    Linear {
        input: u64, matrix: u64, bias: u64, pick: u64, out: u64,
        rows: u32, outputs: u32, width: u32, scale: f32, cap: f32,
    }
    HadamardBlocks { input: u64, matrix: u64, out: u64, n: u32 }
    RopeTurn {
        rows: u64, input: u64, frequencies: u64, out: u64,
        heads: u32, head_width: u32, offset: u32, pairs: u32, interleaved: u32, magnitude: f32,
    }
    CacheView {
        pool: u64, tables: u64, firsts: u64, page_bytes: u64, layer_offset: u64,
        groups: u32, group: u32, stride: u32, block_tokens: u32, token_bytes: u32, unused: u32,
    }
    WriteKv {
        cache: CacheView, rows: u64, first: u64, second: u64,
        first_count: u32, first_dim: u32, second_count: u32, second_dim: u32,
    }
    Attend {
        cache: CacheView, rows: u64, query: u64, query_rope: u64, sinks: u64, out: u64,
        heads: u32, kv_heads: u32, key_dim: u32, value_dim: u32, rope_dim: u32,
        rope_stride: u32, rope_head_stride: u32, window: u32, scale: f32, cap: f32,
    }
    LatentTurn {
        query: u64, key_up: u64, out: u64,
        heads: u32, query_dim: u32, nope_dim: u32, rank: u32,
    }
    LatentMix { mixed: u64, value_up: u64, out: u64, heads: u32, value_dim: u32, rank: u32 }
    Activate { gate: u64, up: u64, out: u64, elements: u64, kind: u32, alpha: f32, limit: f32 }
    AddScaled { left: u64, right: u64, out: u64, elements: u64, scale: f32 }
    GateRows { input: u64, gate: u64, out: u64, elements: u64, run: u32 }
    SliceRows { input: u64, out: u64, elements: u64, width_in: u32, width_out: u32, start: u32 }
    RouteRows {
        logits: u64, correction: u64, experts_out: u64, weights_out: u64,
        experts: u32, per_token: u32, score: u32, normalise: u32,
        groups: u32, groups_kept: u32, top_two: u32, scaling: f32,
    }
    ExpertsRows {
        input: u64, experts: u64, weights: u64, first: u64, second: u64, first_bias: u64,
        second_bias: u64, out: u64,
        per_token: u32, width: u32, outputs: u32, first_expert: u32, held: u32, weigh_input: u32,
        kind: u32, alpha: f32, limit: f32,
    }
    Pack { rows: u64, out: u64, words: u64, outputs: u32, width: u32 }
    PackCodes {
        codes: u64, scales: u64, out: u64, words: u64,
        outputs: u32, width: u32, row_bytes: u32, tile_bytes: u32, group_units: u32,
    }
    Segment { matrix: u64, scales: u64, bias: u64, out: u64, outputs: u32, tiles: u32 }
    Stream {
        segments: [Segment; 3], input: u64, norm: u64, residual: u64, pick: u64,
        width: u32, count: u32, stages: u32, normed: u32, paired: u32, kind: u32,
        alpha: f32, limit: f32, scale: f32, cap: f32, add_scale: f32, offset: f32, epsilon: f32,
        tile_bytes: u32, group_units: u32, half_scales: u32,
    }
    Prepare {
        input: u64, norm: u64, pick: u64, out: u64,
        width: u32, padded: u32, parts: u32, normed: u32, offset: f32, epsilon: f32, factor: f32,
    }
    Gemm {
        product: Stream, x: u64, sums: u64, rows: u32, parts: u32, padded: u32, tiles: u32,
        columns: u32, across: u32, down: u32, slabs: u32, share: u32, plain: u32,
    }
    AttendSplit {
        cache: CacheView, rows: u64, query: u64, parts: u64,
        kv_heads: u32, queries: u32, shares: u32, window: u32, scale: f32, cap: f32,
    }
    Prefill {
        cache: CacheView, rows: u64, tiles: u64, query: u64, sinks: u64, out: u64,
        kv_heads: u32, queries: u32, window: u32, scale: f32, cap: f32,
    }
    AttendJoin { parts: u64, sinks: u64, out: u64, heads: u32, shares: u32, dim: u32 }
    RopeAngles { rows: u64, frequencies: u64, out: u64, pairs: u32, magnitude: f32 }
    TurnAndStore {
        cache: CacheView, rows: u64, query: u64, key: u64, value: u64, angles: u64,
        query_out: u64, key_out: u64,
        heads: u32, kv_heads: u32, dim: u32, value_dim: u32, offset: u32, pairs: u32,
        interleaved: u32,
    }
    Best { logits: u64, parts: u64, out: u64, vocabulary: u32 }
}

/// A row of the step, as the kernels read it.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Row {
    pub(crate) ancestors: u64,
    pub(crate) token: u32,
    pub(crate) position: u32,
    pub(crate) first_row: u32,
    pub(crate) place: u32,
    pub(crate) cached: u32,
    pub(crate) sequence: u32,
    pub(crate) tree: u32,
    /// 1 + the choice of the step before whose token the row has; 0: it has `token`.
    pub(crate) choice: u32,
    pub(crate) long_rope: u32,
    pub(crate) unused: u32,
}
