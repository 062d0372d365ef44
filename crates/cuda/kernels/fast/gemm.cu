// Products of many rows: weights in fragment order go from shared memory to registers, activations
// lie in shared memory as bf16, warpgroups multiply. A tile is 128 outputs and N columns; a column
// is a row's bf16 activation, or its high or low part where there are two.

#include "product.cuh"
#include "wgmma.cuh"

// ---- prepare: activations as bf16 in the order in which the tensor cores read them: parts of 64
// columns, then N columns of 128 bytes, 16-byte pieces swizzled by the column's number

constexpr u32 PREPARE_THREADS = 256, PART_COLUMNS = 64, COLUMN_BYTES = PART_COLUMNS * 2;

struct Prepare {
    const float* input;
    const float* norm;  // weight of an RMS norm of the input, or null
    const u32* pick;    // the input row of each row, or null
    uint8_t* out;
    u32 width, padded, parts, normed;  // padded: rows times parts, up to whole tiles
    float offset, epsilon, factor;
};

// The columns of a piece follow the weights' order: column 8 t + 4 h + 2 q + e of a block of 32 is
// number 16 h + 8 q + 2 t + e.
__device__ inline void load_piece(float2 (&v)[4], const float* from, u32 piece) {
    const float* at = from + piece / 4 * BLOCK_COLUMNS + piece / 2 % 2 * 4 + piece % 2 * 2;
#pragma unroll
    for (u32 t = 0; t < 4; t++) v[t] = __ldcg((const float2*)(at + 8 * t));
}

extern "C" __global__ void __launch_bounds__(PREPARE_THREADS)
    prepare_rows(const __grid_constant__ Prepare p) {
    __shared__ float warps[PREPARE_THREADS / 32];
    launch_dependents();
    wait_dependencies();
    u32 row = blockIdx.x, thread = threadIdx.x, pieces = p.width / 8;
    const float* in = p.input + (size_t)(p.pick ? p.pick[row] : row) * p.width;
    float2 v[4], w[4];
    float inverse = 1.f;
    if (p.normed) {
        float sum = 0.f;
        for (u32 piece = thread; piece < pieces; piece += PREPARE_THREADS) {
            load_piece(v, in, piece);
#pragma unroll
            for (u32 t = 0; t < 4; t++) sum += v[t].x * v[t].x + v[t].y * v[t].y;
        }
        sum = warp_sum(sum);
        if (thread % 32 == 0) warps[thread / 32] = sum;
        __syncthreads();
        sum = 0.f;
        for (u32 warp = 0; warp < PREPARE_THREADS / 32; warp++) sum += warps[warp];
        inverse = rsqrtf(sum / p.width + p.epsilon);
    }
    bool scaled = p.normed && p.norm;
    for (u32 piece = thread; piece < pieces; piece += PREPARE_THREADS) {
        load_piece(v, in, piece);
        if (scaled) load_piece(w, p.norm, piece);
        uint4 high, low;
        u32* h = (u32*)&high;
        u32* l = (u32*)&low;
#pragma unroll
        for (u32 t = 0; t < 4; t++) {
            float x = v[t].x * inverse * p.factor, y = v[t].y * inverse * p.factor;
            if (scaled) {
                x *= p.offset + w[t].x;
                y *= p.offset + w[t].y;
            }
            split(x, y, h[t], l[t]);
        }
        u64 part = piece / (PART_COLUMNS / 8), at = piece % (PART_COLUMNS / 8);
        u64 column = (u64)row * p.parts;
        uint8_t* to = p.out + part * p.padded * COLUMN_BYTES;
        *(uint4*)(to + column * COLUMN_BYTES + (at ^ column % 8) * 16) = high;
        column++;
        if (p.parts == 2) *(uint4*)(to + column * COLUMN_BYTES + (at ^ column % 8) * 16) = low;
    }
}

// ---- gemm: one block a multiprocessor. A warp copies in bulk into a ring, two warpgroups multiply

constexpr u32 GEMM_WARPS = 8, GEMM_TILES = 8, GEMM_OUTPUTS = GEMM_TILES * TILE;
constexpr u32 RING_BYTES = 222 * 1024, STAGES_MAX = 12;
constexpr u32 GEMM_CONSUMERS = GEMM_WARPS * 32, GEMM_THREADS = GEMM_CONSUMERS + 128;

struct Gemm {
    Stream product;    // not normed
    const uint8_t* x;  // prepared
    float* sums;       // [pieces, rows of a tile, 128]: where a tile's sums wait for what follows
    u32 rows, parts, padded;
    u32 tiles;                  // of 16 outputs, of all segments
    u32 columns, across, down;  // columns of a tile; tiles of the rows, tiles of 128 outputs
    u32 slabs;                  // stages of a tile
    u32 share;  // stages of a block, neighbouring ones; 0: blocks take whole tiles by turns
    u32 plain;  // 1: what follows is a factor, a residual or SwiGLU
};

// The stages of a block, tile by tile. A tile's pieces are numbered by block and tile.
struct Walk {
    u32 at, end, slabs, stride;

    __device__ Walk(const Gemm& p) {
        u32 all = p.across * p.down * p.slabs;
        slabs = p.slabs;
        stride = p.share ? 0 : (gridDim.x - 1) * p.slabs;
        at = blockIdx.x * (p.share ? p.share : p.slabs);
        end = p.share ? min(all, at + p.share) : all;
    }
    __device__ bool more() const { return at < end; }
    __device__ u32 tile() const { return at / slabs; }
    __device__ u32 first() const { return at % slabs; }
    __device__ u32 last() const { return min(slabs, first() + end - at); }
    __device__ void next() { at += last() - first() + stride; }
};

// The tile of 16 outputs in a slot of a block's tile: in the order of the segments, or four of the
// gate and four of the up matrix.
__device__ inline u32 tile_of(const Gemm& p, u32 down, u32 slot) {
    if (!p.product.paired) return min(down * GEMM_TILES + slot, p.tiles - 1);
    u32 units = p.product.segments[0].tiles;
    return min(down * (GEMM_TILES / 2) + slot % 4, units - 1) + slot / 4 * units;
}

// A stage: weights of eight tiles, scales of their groups, activations.
template <u32 FORMAT, u32 N, u32 BLOCKS>
struct Shape {
    static constexpr u32 CODES = BLOCKS * block_bytes<FORMAT>();  // of a tile
    static constexpr u32 SCALES = FORMAT == PACKED_INT4 ? 1024 : 0;
    static constexpr u32 WEIGHTS = GEMM_TILES * CODES + SCALES;
    static constexpr u32 PART = N * COLUMN_BYTES;
    static constexpr u32 STAGE = WEIGHTS + BLOCKS / 2 * PART;
    static constexpr u32 FIT = RING_BYTES / STAGE, STAGES = FIT < STAGES_MAX ? FIT : STAGES_MAX;
};
// Scales of a tile in a stage: up to two groups of 64 columns.
constexpr u32 TILE_SCALES = 2 * GROUP_SCALE_BYTES;

// Copies one stage: its weights, its activations, or both.
template <class S, u32 FORMAT, u32 BLOCKS>
__device__ inline void fill(const Gemm& p, const uint8_t* tile, u32 across, u32 slab, u32 stage,
                            u32 full, bool weights, bool activations) {
    u32 lane = threadIdx.x % 32, blocks = p.product.width / BLOCK_COLUMNS, first = slab * BLOCKS;
    u32 here = min(BLOCKS, blocks - first), parts = (here + 1) / 2,
        bytes = here * block_bytes<FORMAT>();
    u32 codes = first * block_bytes<FORMAT>(), scales = 0, scale_bytes = 0,
        group = p.product.group_units;
    if (FORMAT == PACKED_INT4) {
        u32 chunk = first / INT4_CHUNK_BLOCKS, unit = first % INT4_CHUNK_BLOCKS / 2;
        codes = chunk * int4_chunk_bytes(group) + first % INT4_CHUNK_BLOCKS * block_bytes<FORMAT>();
        if (group) {
            scales = int4_scales(chunk, p.product.width, group) +
                     group_of(unit, group) * GROUP_SCALE_BYTES;
            scale_bytes = (group_of(unit + here / 2 - 1, group) - group_of(unit, group) + 1) *
                          GROUP_SCALE_BYTES;
        }
    }
    if (weights && lane == 0)
        barrier_expect(full, GEMM_TILES * (bytes + scale_bytes) + parts * S::PART);
    __syncwarp();
    if (weights && lane < GEMM_TILES) {
        bulk_copy(stage + lane * S::CODES, tile + codes, bytes, full);
        if (scale_bytes)
            bulk_copy(stage + GEMM_TILES * S::CODES + lane * TILE_SCALES, tile + scales,
                      scale_bytes, full);
    }
    u32 part = lane - GEMM_TILES;
    if (activations && part < parts) {
        size_t at =
            (size_t)(slab * (BLOCKS / 2) + part) * p.padded * COLUMN_BYTES + across * S::PART;
        bulk_copy(stage + S::WEIGHTS + part * S::PART, p.x + at, S::PART, full);
    }
}

// Where the lane's tile begins.
__device__ inline const uint8_t* matrix_of(const Gemm& p, u32 down) {
    u32 tile, segment = locate(p.product, tile_of(p, down, threadIdx.x % GEMM_TILES), tile);
    return p.product.segments[segment].matrix + (size_t)tile * p.product.tile_bytes;
}

template <class S, u32 FORMAT, u32 BLOCKS>
__device__ inline void produce(const Gemm& p, u32 ring, u32 full, u32 empty) {
    constexpr u32 STAGES = S::STAGES;
    u32 slot = 0, parity = 1, ahead = 0;
    // The weights of the first stages are on their way before the kernel before this one is done.
    for (Walk walk(p); walk.more() && ahead < STAGES; walk.next()) {
        u32 tile = walk.tile(), last = walk.last();
        const uint8_t* from = matrix_of(p, tile / p.across);
        for (u32 slab = walk.first(); slab < last && ahead < STAGES; slab++, ahead++)
            fill<S, FORMAT, BLOCKS>(p, from, tile % p.across, slab, ring + ahead * S::STAGE,
                                    full + ahead * 8, true, false);
    }
    wait_dependencies();
    u32 done = 0;
    for (Walk walk(p); walk.more(); walk.next()) {
        u32 tile = walk.tile(), last = walk.last();
        const uint8_t* from = matrix_of(p, tile / p.across);
        for (u32 slab = walk.first(); slab < last; slab++, done++) {
            // The first round passes at once: the phase before the first counts as done.
            barrier_wait(empty + slot * 8, parity);
            fill<S, FORMAT, BLOCKS>(p, from, tile % p.across, slab, ring + slot * S::STAGE,
                                    full + slot * 8, done >= ahead, true);
            if (++slot == STAGES) {
                slot = 0;
                parity ^= 1;
            }
        }
    }
}

// A stage's weights of a warp, in registers.
template <u32 BLOCKS>
struct Fragments {
    u32 a[2 * BLOCKS][4];
};

// Scales of a lane's two rows of a tile, each twice.
__device__ inline void load_scales(u32 (&to)[2], const Stream& p, const uint8_t* scales) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 n = 0; n < 2; n++) {
        float scale =
            group_scale(*(const uint16_t*)(scales + (lane / 4 + n * 8) * 2), p.half_scales);
        __nv_bfloat162 both = __float2bfloat162_rn(scale);
        to[n] = *(u32*)&both;
    }
}

__device__ inline u32 times(u32 a, u32 b) {
    __nv_bfloat162 x = __hmul2(*(__nv_bfloat162*)&a, *(__nv_bfloat162*)&b);
    return *(u32*)&x;
}

// A tile's registers of the products of 16 bytes. Scales of groups go into the weights.
template <class S, u32 FORMAT, u32 BLOCKS>
__device__ inline void load_tile(u32 (&a)[steps_of<FORMAT>()][4], const Stream& p,
                                 const uint8_t* stage, u32 slot, u32 vector, u32 unit) {
    uint4 v = *(const uint4*)(stage + slot * S::CODES + vector * 512 + threadIdx.x % 32 * 16);
#pragma unroll
    for (u32 step = 0; step < steps_of<FORMAT>(); step++) widen<FORMAT>(v, step, a[step]);
    if (FORMAT != PACKED_INT4 || !p.group_units) return;
    u32 group = group_of(unit + vector, p.group_units) - group_of(unit, p.group_units), scales[2];
    load_scales(scales, p,
                stage + GEMM_TILES * S::CODES + slot * TILE_SCALES + group * GROUP_SCALE_BYTES);
#pragma unroll
    for (u32 step = 0; step < steps_of<FORMAT>(); step++)
#pragma unroll
        for (u32 n = 0; n < 4; n++) a[step][n] = times(a[step][n], scales[n % 2]);
}

template <class S, u32 FORMAT, u32 BLOCKS, bool PAIRED>
__device__ inline void load_fragments(Fragments<BLOCKS>& to, const Stream& p, const uint8_t* stage,
                                      u32 warp, u32 first, u32 here) {
    constexpr u32 STEPS = steps_of<FORMAT>();
#pragma unroll
    for (u32 vector = 0; vector < 2 * BLOCKS / STEPS; vector++) {
        u32 a[STEPS][4] = {}, b[STEPS][4] = {};
        bool there = vector * STEPS / 2 < here;
        if (there)
            load_tile<S, FORMAT, BLOCKS>(a, p, stage, PAIRED ? warp % 4 : warp, vector, first / 2);
        // Warpgroups take the upper and the lower halves of the tiles of gate and up.
        if (PAIRED && there)
            load_tile<S, FORMAT, BLOCKS>(b, p, stage, 4 + warp % 4, vector, first / 2);
#pragma unroll
        for (u32 step = 0; step < STEPS; step++)
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
                u32(&x)[4] = PAIRED && n % 2 ? b[step] : a[step];
                u32 upper = x[n / 2 * 2], lower = x[n / 2 * 2 + 1];
                to.a[vector * STEPS + step][n] = PAIRED ? (warp < 4 ? upper : lower) : a[step][n];
            }
    }
}

// The ring, as a warp that multiplies sees it.
struct Ring {
    u32 slot, parity, before;  // before: the slot that is multiplied still; all bits set: none
};

// `first` is the stage's first block of 32 columns, `here` how many there are from there on.
template <class S, u32 FORMAT, u32 N, u32 BLOCKS, bool PAIRED>
__device__ inline void multiply_stage(float (&d)[N / 2], Fragments<BLOCKS>& a, const Stream& p,
                                      Ring& r, const uint8_t* shared, u32 full, u32 empty,
                                      u32 first, u32 here, u32 add) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    barrier_wait(full + r.slot * 8, r.parity);
    const uint8_t* stage = shared + r.slot * S::STAGE;
    load_fragments<S, FORMAT, BLOCKS, PAIRED>(a, p, stage, warp, first % INT4_CHUNK_BLOCKS, here);
    u32 x = (u32)__cvta_generic_to_shared(stage) + S::WEIGHTS;
    wgmma_fence();
#pragma unroll
    for (u32 i = 0; i < 2 * BLOCKS; i++) {
        // Weights of absent blocks are zero; they meet activations that are there.
        u32 at = i / 2 < here ? i / 4 * S::PART + i % 4 * 32 : 0;
        wgmma(d, a.a[i], descriptor(x + at), add | i);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (lane == 0 && r.before != ~0u) barrier_arrive(empty + r.before * 8);
    r.before = r.slot;
    if (++r.slot == S::STAGES) {
        r.slot = 0;
        r.parity ^= 1;
    }
}

// Where a thread's sums of one output go.
struct Target {
    float* out;
    float scale, bias;
    const float* residual;
    u32 stride;  // elements from row to row; 0: the output is not there
};

__device__ inline Target target_of(const Gemm& p, u32 slot_index, u32 within) {
    u32 tile, segment = p.product.paired ? 0 : locate(p.product, slot_index, tile);
    if (p.product.paired) tile = slot_index;
    const Segment& to = p.product.segments[segment];
    u32 output = tile * TILE + within;
    bool inside = slot_index < (p.product.paired ? to.tiles : p.tiles) && output < to.outputs;
    const float* residual = p.product.residual ? p.product.residual + output : nullptr;
    float scale = inside ? scale_of(to, output) : 1.f,
          bias = inside && to.bias ? to.bias[output] : 0.f;
    return {to.out + output, scale, bias, residual, inside ? to.outputs : 0};
}

// The row, in the tile, of element `e` of column group `j`.
template <u32 PARTS>
__device__ inline u32 row_of(u32 j, u32 e) {
    u32 lane = threadIdx.x % 32;
    return PARTS == 2 ? j * 4 + lane % 4 : j * 8 + lane % 4 * 2 + e;
}

// Column groups whose residuals are on their way at once.
constexpr u32 GROUPS_AT_ONCE = 2;

// Writes whole sums whose `plain` is 1.
template <u32 N, bool PAIRED, u32 PARTS>
__device__ inline void write_outputs(const Gemm& p, u32 tile, const float (&d)[N / 2]) {
    constexpr u32 EACH = 2 / PARTS, GROUPS = GROUPS_AT_ONCE;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 down = tile / p.across, first = tile % p.across * (N / PARTS);
    u32 slot = PAIRED ? down * (GEMM_TILES / 2) + warp % 4 : down * GEMM_TILES + warp;
    Target low = target_of(p, slot, PAIRED ? warp / 4 * 8 + lane / 4 : lane / 4), high = {};
    if (PAIRED && low.stride) {
        const Segment& up = p.product.segments[1];
        u32 output = low.out - p.product.segments[0].out;
        high.scale = scale_of(up, output);
        high.bias = up.bias ? up.bias[output] : 0.f;
    }
    if (!PAIRED) high = target_of(p, slot, 8 + lane / 4);
    float scale = p.product.scale, add_scale = p.product.add_scale;
    bool residual = !PAIRED && low.residual;
#pragma unroll
    for (u32 base = 0; base < N / 8; base += GROUPS) {
        float before[GROUPS][EACH][2] = {};
        if (residual) {
#pragma unroll
            for (u32 g = 0; g < GROUPS; g++)
#pragma unroll
                for (u32 e = 0; e < EACH; e++) {
                    size_t row = first + row_of<PARTS>(base + g, e);
                    if (row >= p.rows) continue;
                    if (low.stride) before[g][e][0] = __ldcg(low.residual + row * low.stride);
                    if (high.stride) before[g][e][1] = __ldcg(high.residual + row * high.stride);
                }
        }
#pragma unroll
        for (u32 g = 0; g < GROUPS; g++)
#pragma unroll
            for (u32 e = 0; e < EACH; e++) {
                size_t row = first + row_of<PARTS>(base + g, e);
                if (row >= p.rows) continue;
                const float* c = d + (base + g) * 4;
                float a = (PARTS == 2 ? c[0] + c[1] : c[e]) * low.scale + low.bias;
                float b = (PARTS == 2 ? c[2] + c[3] : c[2 + e]) * high.scale + high.bias;
                if (PAIRED) {
                    if (low.stride) low.out[row * low.stride] = swiglu(a, b);
                    continue;
                }
                a *= scale;
                b *= scale;
                if (residual) {
                    a = __fadd_rn(before[g][e][0], __fmul_rn(a, add_scale));
                    b = __fadd_rn(before[g][e][1], __fmul_rn(b, add_scale));
                }
                if (low.stride) low.out[row * low.stride] = a;
                if (high.stride) high.out[row * high.stride] = b;
            }
    }
}

// Leaves sums for `finish_rows`.
template <u32 N, bool PAIRED, u32 PARTS>
__device__ inline void write_sums(const Gemm& p, u32 tile, u32 piece, const float (&d)[N / 2]) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = tile % p.across * (N / PARTS);
    u32 low = PAIRED ? warp % 4 * TILE + warp / 4 * 8 + lane / 4 : warp * TILE + lane / 4;
    u32 high = PAIRED ? GEMM_OUTPUTS / 2 : 8;
    float* sums = p.sums + (size_t)piece * (N / PARTS) * GEMM_OUTPUTS + low;
#pragma unroll
    for (u32 j = 0; j < N / 8; j++) {
#pragma unroll
        for (u32 e = 0; e < 2 / PARTS; e++) {
            u32 row = row_of<PARTS>(j, e);
            if (first + row >= p.rows) continue;
            const float* c = d + j * 4;
            float* to = sums + row * GEMM_OUTPUTS;
            __stcg(to, PARTS == 2 ? c[0] + c[1] : c[e]);
            __stcg(to + high, PARTS == 2 ? c[2] + c[3] : c[2 + e]);
        }
    }
}

__device__ inline void gemm_consumers_meet() {
    asm volatile("bar.sync 1, %0;" ::"n"(GEMM_CONSUMERS) : "memory");
}

// Does what follows the product for output `at` of a tile and some of its rows, from the sums of
// its pieces, in the order of their columns.
__device__ inline void finish_rows(const Gemm& p, u32 tile, u32 piece, u32 pieces, u32 at, u32 row,
                                   u32 step) {
    const Stream& product = p.product;
    u32 outputs = product.paired ? GEMM_OUTPUTS / 2 : GEMM_OUTPUTS, down = tile / p.across;
    u32 rows_most = p.columns / p.parts, first = tile % p.across * rows_most, segment = 0;
    u32 local = down * (outputs / TILE) + at / TILE;
    if (at >= outputs || local >= (product.paired ? product.segments[0].tiles : p.tiles)) return;
    if (!product.paired) segment = locate(product, local, local);
    const Segment& to = product.segments[segment];
    u32 output = local * TILE + at % TILE, rows = min(rows_most, p.rows - first);
    if (output >= to.outputs) return;
    for (; row < rows; row += step) {
        float sum[2] = {};
        for (u32 i = 0; i < pieces; i++) {
            const float* from =
                p.sums + ((size_t)(piece + i) * rows_most + row) * GEMM_OUTPUTS + at;
            sum[0] += __ldcg(from);
            if (product.paired) sum[1] += __ldcg(from + outputs);
        }
        finish(product, to, first + row, output, sum);
    }
}

// Where a block has a share of a tile, `gemm_finish` goes on. Where what follows is not plain, the
// block itself does.
template <u32 N, bool PAIRED, u32 PARTS>
__device__ inline void finish_by_sums(const Gemm& p, u32 tile, const float (&d)[N / 2]) {
    write_sums<N, PAIRED, PARTS>(p, tile, blockIdx.x + (p.share ? tile : 0), d);
    if (p.share) return;
    gemm_consumers_meet();
    finish_rows(p, tile, blockIdx.x, 1, threadIdx.x % GEMM_OUTPUTS, threadIdx.x / GEMM_OUTPUTS,
                GEMM_CONSUMERS / GEMM_OUTPUTS);
    // The next tile's sums take the same place.
    gemm_consumers_meet();
}

template <u32 FORMAT, u32 N, u32 BLOCKS, bool PAIRED, u32 PARTS>
__device__ inline void gemm(const Gemm& p) {
    extern __shared__ uint8_t unaligned[];
    using S = Shape<FORMAT, N, BLOCKS>;
    constexpr u32 STAGES = S::STAGES;
    uint8_t* shared = (uint8_t*)(((size_t)unaligned + 1023) / 1024 * 1024);
    u32 ring = (u32)__cvta_generic_to_shared(shared), full = ring + STAGES * S::STAGE;
    u32 empty = full + STAGES * 8, thread = threadIdx.x, warp = thread / 32;
    launch_dependents();
    if (thread == 0) {
        for (u32 slot = 0; slot < STAGES; slot++) {
            barrier_init(full + slot * 8, 1);
            barrier_init(empty + slot * 8, GEMM_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp >= GEMM_WARPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == GEMM_WARPS) produce<S, FORMAT, BLOCKS>(p, ring, full, empty);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        u32 blocks = p.product.width / BLOCK_COLUMNS;
        Ring r = {0, 0, ~0u};
        for (Walk walk(p); walk.more(); walk.next()) {
            float d[N / 2];
            Fragments<BLOCKS> a, b;
            u32 slab = walk.first(), last = walk.last(), add = 0;
            for (; slab + 1 < last; slab += 2, add = 1) {
                u32 at = slab * BLOCKS, next = at + BLOCKS;
                multiply_stage<S, FORMAT, N, BLOCKS, PAIRED>(d, a, p.product, r, shared, full,
                                                             empty, at, blocks - at, add);
                multiply_stage<S, FORMAT, N, BLOCKS, PAIRED>(d, b, p.product, r, shared, full,
                                                             empty, next, blocks - next, 1);
            }
            if (slab < last) {
                u32 at = slab * BLOCKS;
                multiply_stage<S, FORMAT, N, BLOCKS, PAIRED>(d, a, p.product, r, shared, full,
                                                             empty, at, blocks - at, add);
            }
            wgmma_wait<0>();
            if (thread % 32 == 0) barrier_arrive(empty + r.before * 8);
            r.before = ~0u;
            wait_dependencies();
            if (p.plain && !p.share)
                write_outputs<N, PAIRED, PARTS>(p, walk.tile(), d);
            else
                finish_by_sums<N, PAIRED, PARTS>(p, walk.tile(), d);
        }
    }
}

// The weights' format, N columns, stages of so many blocks, a row in so many parts.
#define GEMM(NAME, FORMAT, N, BLOCKS, PARTS)                                 \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1)            \
        gemm_##NAME##_##N##_##PARTS(const __grid_constant__ Gemm p) {        \
        gemm<FORMAT, N, BLOCKS, false, PARTS>(p);                            \
    }                                                                        \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1)            \
        gemm_paired_##NAME##_##N##_##PARTS(const __grid_constant__ Gemm p) { \
        gemm<FORMAT, N, BLOCKS, true, PARTS>(p);                             \
    }
#define GEMMS(NAME, FORMAT)       \
    GEMM(NAME, FORMAT, 16, 4, 2)  \
    GEMM(NAME, FORMAT, 32, 4, 2)  \
    GEMM(NAME, FORMAT, 64, 4, 2)  \
    GEMM(NAME, FORMAT, 128, 2, 2) \
    GEMM(NAME, FORMAT, 128, 2, 1) \
    GEMM(NAME, FORMAT, 256, 2, 1)
GEMMS(bf16, PACKED_BF16)
GEMMS(fp8, PACKED_FP8)
GEMMS(int4, PACKED_INT4)

// ---- gemm_finish: a thread an output of a row, where blocks had shares of tiles

constexpr u32 FINISH_ROWS = 2;

extern "C" __global__ void __launch_bounds__(FINISH_ROWS* GEMM_OUTPUTS)
    gemm_finish(const __grid_constant__ Gemm p) {
    launch_dependents();
    wait_dependencies();
    u32 row = blockIdx.y * FINISH_ROWS + threadIdx.x / GEMM_OUTPUTS, rows = p.columns / p.parts;
    if (row >= p.rows) return;
    u32 tile = blockIdx.x * p.across + row / rows;
    u32 first = tile * p.slabs / p.share, last = ((tile + 1) * p.slabs - 1) / p.share;
    u32 at = threadIdx.x % GEMM_OUTPUTS;
    finish_rows(p, tile, first + tile, last - first + 1, at, row % rows, rows);
}
