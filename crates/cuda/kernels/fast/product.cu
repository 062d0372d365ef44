// Products with bf16 weights on tensor cores. Weights lie in fragment order: a tile of 16 outputs,
// then blocks of 32 columns, 1024 bytes each. An activation is split in two bf16 parts, high and
// low, which take two columns of a tensor-core product: sums are nearly as good as f32's.

#include "common.cuh"

constexpr u32 BLOCK_BYTES = 1024, CHUNK_BLOCKS = 8, CHUNK_BYTES = BLOCK_BYTES * CHUNK_BLOCKS;
constexpr u32 BLOCK_COLUMNS = 32, TILE = 16;
constexpr u32 WARPS = 8, CONSUMERS = WARPS * 32;
// Warps of a group share a chunk; groups take chunks by turns.
constexpr u32 GROUPS = 2, GROUP_WARPS = WARPS / GROUPS;
// Sums of that many tile rows wait in shared memory until the warps' parts are added.
constexpr u32 PART_TILES = 16;

// ---- pack: row-major [outputs, width] into fragment order; a thread a word of two columns

struct Pack {
    const uint8_t* rows;
    u32* out;
    u64 words;
    u32 outputs, width;
};

// The word's output row in the tile, and its first column in the block. A lane's four words are one
// operand of m16n8k16; columns are permuted so that a lane reads 8 neighbours of an activation.
__device__ inline u32 word_row(u32 word) { return word / 4 % 32 / 4 + 8 * (word & 1); }
__device__ inline u32 word_column(u32 word) {
    return 8 * (word / 4 % 4) + 4 * (word / 128) + (word >> 1 & 1) * 2;
}

extern "C" __global__ void pack_bf16(const __grid_constant__ Pack p) {
    u32 blocks = p.width / BLOCK_COLUMNS;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < p.words; i += (u64)gridDim.x * blockDim.x) {
        u32 word = i % (BLOCK_BYTES / 4);
        u64 block = i / (BLOCK_BYTES / 4);
        u64 row = block / blocks * TILE + word_row(word);
        u32 column = block % blocks * BLOCK_COLUMNS + word_column(word);
        p.out[i] = row < p.outputs ? *(const u32*)(p.rows + (row * p.width + column) * 2) : 0;
    }
}

// ---- embed from fragment order

struct EmbedPacked {
    const Row* rows;
    const u32* chosen;
    const uint8_t* table;
    float* out;
    u32 width, first_token, tokens;
    float multiplier;
};

extern "C" __global__ void embed_packed(const __grid_constant__ EmbedPacked p) {
    launch_dependents();
    wait_dependencies();
    u32 token = token_of(p.rows[blockIdx.x], p.chosen) - p.first_token;
    bool inside = token < p.tokens;
    const uint8_t* tile = p.table + (u64)(token / TILE) * (p.width / BLOCK_COLUMNS) * BLOCK_BYTES;
    u32 row = token % TILE;
    for (u32 i = threadIdx.x * 2; i < p.width; i += blockDim.x * 2) {
        u32 column = i % BLOCK_COLUMNS, lane = row % 8 * 4 + column / 8;
        u32 word = column / 4 % 2 * 128 + lane * 4 + column / 2 % 2 * 2 + row / 8;
        u32 pair = inside ? *(const u32*)(tile + i / BLOCK_COLUMNS * BLOCK_BYTES + word * 4) : 0;
        float* out = p.out + (u64)blockIdx.x * p.width + i;
        out[0] = __uint_as_float(pair << 16) * p.multiplier;
        out[1] = __uint_as_float(pair & 0xffff0000u) * p.multiplier;
    }
}

__device__ inline void multiply(float* c, uint4 a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Two neighbours' high and low parts.
__device__ inline void split(float x, float y, u32& high, u32& low) {
    __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
    __nv_bfloat162 l = __floats2bfloat162_rn(x - __low2float(h), y - __high2float(h));
    high = *(u32*)&h;
    low = *(u32*)&l;
}

// ---- stream: up to four rows. One block a multiprocessor; a warp copies weights in bulk into a
// ring of chunks, eight warps multiply.

struct Segment {
    const uint8_t* matrix;
    const float* bias;
    float* out;  // [rows, outputs]
    u32 outputs, tiles;
};

struct Stream {
    Segment segments[3];
    const float* input;
    const float* norm;  // weight of an RMS norm of the input, or null
    const float* residual;  // added to the product, or null
    const u32* pick;  // the input row of each row, or null
    u32 width, count, stages, normed;
    u32 paired;  // 1: segments 0 and 1 are gate and up, and the activation goes to 0's output
    u32 kind;
    float alpha, limit;
    float scale, cap, add_scale, offset, epsilon;
};

__device__ inline void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ inline void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}"
        ::"r"(barrier), "r"(parity) : "memory");
}
__device__ inline void barrier_arrive(u32 barrier) {
    asm volatile("{\n.reg .b64 t;\nmbarrier.arrive.shared::cta.b64 t, [%0];\n}" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("{\n.reg .b64 t;\nmbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1;\n}" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ inline void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

// The segment of a tile, counted over all segments, and the tile in it.
__device__ inline u32 locate(const Stream& p, u32 index, u32& tile) {
    u32 segment = 0;
    tile = index;
    while (segment + 1 < p.count && tile >= p.segments[segment].tiles) tile -= p.segments[segment++].tiles;
    return segment;
}

// Does what follows a product and writes the output; `sum` are those of gate and up where paired.
__device__ inline void finish(const Stream& p, const Segment& to, u64 row, u32 output, const float* sum) {
    float value = sum[0] + (to.bias ? to.bias[output] : 0.f);
    u64 place = row * to.outputs + output;
    if (p.paired) {
        const float* bias = p.segments[1].bias;
        value = activation(p.kind, value, sum[1] + (bias ? bias[output] : 0.f), p.alpha, p.limit);
    } else {
        value = soft_cap(value * p.scale, p.cap);
        if (p.residual) value = __fadd_rn(__ldcg(p.residual + place), __fmul_rn(value, p.add_scale));
    }
    to.out[place] = value;
}

// Quads of a row that a thread holds, all on their way at once.
constexpr u32 QUADS = 8, SPAN = CONSUMERS * 4 * QUADS;

__device__ inline void load_quads(float4 (&v)[QUADS], const float* from, u32 base, u32 width) {
#pragma unroll
    for (u32 n = 0; n < QUADS; n++) {
        u32 i = base + (n * CONSUMERS + threadIdx.x) * 4;
        v[n] = i < width ? __ldcg((const float4*)(from + i)) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
}

__device__ inline float squares(const float4 (&v)[QUADS]) {
    float sum = 0.f;
#pragma unroll
    for (u32 n = 0; n < QUADS; n++) sum += v[n].x * v[n].x + v[n].y * v[n].y + v[n].z * v[n].z + v[n].w * v[n].w;
    return sum;
}

// Puts the input's rows into shared memory, normalised where the op is, split in two parts.
template <u32 ROWS>
__device__ inline void stage_rows(const Stream& p, uint8_t* x, float* reduced, u32 column_bytes) {
    u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    bool scaled = p.normed && p.norm;
    float offset = scaled ? p.offset : 0.f;
    float4 v[QUADS], w[QUADS];
    // The norm's weights do not change: they are on their way before the input is there.
    if (scaled) load_quads(w, p.norm, 0, p.width);
    wait_dependencies();
#pragma unroll 1
    for (u32 row = 0; row < ROWS; row++) {
        const float* in = p.input + (size_t)(p.pick ? p.pick[row] : row) * p.width;
        uint8_t* high = x + 2 * row * column_bytes;
        uint8_t* low = high + column_bytes;
        float inverse = 1.f;
        load_quads(v, in, 0, p.width);
        if (p.normed) {
            float sum = squares(v);
            for (u32 base = SPAN; base < p.width; base += SPAN) {
                float4 more[QUADS];
                load_quads(more, in, base, p.width);
                sum += squares(more);
            }
            sum = warp_sum(sum);
            if (lane == 0) reduced[row * WARPS + warp] = sum;
            consumers_meet();
            sum = 0.f;
            for (u32 w = 0; w < WARPS; w++) sum += reduced[row * WARPS + w];
            inverse = rsqrtf(sum / p.width + p.epsilon);
        }
        for (u32 base = 0; base < p.width; base += SPAN) {
            if (base > 0) load_quads(v, in, base, p.width);
            if (scaled && p.width > SPAN) load_quads(w, p.norm, base, p.width);
#pragma unroll
            for (u32 n = 0; n < QUADS; n++) {
                u32 i = base + (n * CONSUMERS + thread) * 4;
                if (i >= p.width) break;
                float4 t = v[n];
                if (p.normed) {
                    float4 scale = scaled ? w[n] : make_float4(1.f, 1.f, 1.f, 1.f);
                    t.x = t.x * inverse * (offset + scale.x);
                    t.y = t.y * inverse * (offset + scale.y);
                    t.z = t.z * inverse * (offset + scale.z);
                    t.w = t.w * inverse * (offset + scale.w);
                }
                uint2 h, l;
                split(t.x, t.y, h.x, l.x);
                split(t.z, t.w, h.y, l.y);
                *(uint2*)(high + i * 2) = h;
                *(uint2*)(low + i * 2) = l;
            }
        }
    }
    consumers_meet();
}

template <u32 ROWS>
__device__ inline void stream(const Stream& p) {
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr u32 TILES = PART_TILES / ROWS, TILE_SUMS = TILE * ROWS;
    u32 blocks = p.width / BLOCK_COLUMNS, chunks = (blocks + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS;
    // 64 bytes between columns: eight lanes' reads of two columns meet in no bank.
    u32 column_bytes = 2 * p.width + 64;
    uint8_t* x = shared + p.stages * CHUNK_BYTES;
    float* parts = (float*)(x + 2 * ROWS * column_bytes);
    float* reduced = parts + TILES * WARPS * TILE_SUMS;
    u64* barriers = (u64*)(reduced + 4 * WARPS);
    u32 ring = (u32)__cvta_generic_to_shared(shared), full = (u32)__cvta_generic_to_shared(barriers);
    u32 empty = full + p.stages * 8;
    u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    u32 unit_parts = p.paired ? 2 : 1, units = p.segments[0].tiles;
    if (!p.paired)
        for (u32 s = 1; s < p.count; s++) units += p.segments[s].tiles;
    launch_dependents();
    if (thread == 0) {
        for (u32 slot = 0; slot < p.stages; slot++) {
            barrier_init(full + slot * 8, 1);
            barrier_init(empty + slot * 8, GROUP_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (warp == WARPS) {
        if (lane != 0) return;
        u32 slot = 0, parity = 1;
        for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
            for (u32 part = 0; part < unit_parts; part++) {
                u32 tile, segment = locate(p, p.paired ? unit + part * units : unit, tile);
                const uint8_t* from = p.segments[segment].matrix + (size_t)tile * blocks * BLOCK_BYTES;
                for (u32 chunk = 0; chunk < chunks; chunk++) {
                    u32 bytes = min(CHUNK_BLOCKS, blocks - chunk * CHUNK_BLOCKS) * BLOCK_BYTES;
                    // The first round passes at once: the phase before the first counts as done.
                    barrier_wait(empty + slot * 8, parity);
                    barrier_expect(full + slot * 8, bytes);
                    bulk_copy(ring + slot * CHUNK_BYTES, from + (size_t)chunk * CHUNK_BYTES, bytes, full + slot * 8);
                    if (++slot == p.stages) { slot = 0; parity ^= 1; }
                }
            }
        }
        return;
    }

    stage_rows<ROWS>(p, x, reduced, column_bytes);
    u32 group = warp / GROUP_WARPS, sub = warp % GROUP_WARPS;
    const uint8_t* mine = x + lane / 4 % (2 * ROWS) * column_bytes + lane % 4 * 16;
    u32 turn = 0, slot = 0, parity = 0;  // of the next chunk
    u32 batch = TILES / unit_parts * gridDim.x;
    for (u32 first = blockIdx.x; first < units; first += batch) {
        u32 local = 0;
        for (u32 unit = first; unit < min(units, first + batch); unit += gridDim.x) {
            for (u32 part = 0; part < unit_parts; part++, local++) {
                float c[4][4] = {};
                for (u32 chunk = 0; chunk < chunks; chunk++) {
                    if (turn == group) {
                        barrier_wait(full + slot * 8, parity);
                        const uint8_t* weights = shared + slot * CHUNK_BYTES + lane * 16;
                        u32 last = min(CHUNK_BLOCKS, blocks - chunk * CHUNK_BLOCKS);
#pragma unroll
                        for (u32 b = 0; b < CHUNK_BLOCKS / GROUP_WARPS; b++) {
                            u32 block = sub * (CHUNK_BLOCKS / GROUP_WARPS) + b;
                            if (block < last) {
                                uint4 v = *(const uint4*)(mine + (chunk * CHUNK_BLOCKS + block) * 64);
                                const uint8_t* at = weights + block * BLOCK_BYTES;
                                multiply(c[b * 2 % 4], *(const uint4*)at, v.x, v.y);
                                multiply(c[b * 2 % 4 + 1], *(const uint4*)(at + 512), v.z, v.w);
                            }
                        }
                        __syncwarp();
                        if (lane == 0) barrier_arrive(empty + slot * 8);
                    }
                    turn ^= 1;
                    if (++slot == p.stages) { slot = 0; parity ^= 1; }
                }
                // Columns 2r and 2r + 1 are row r's parts.
                float low = 0.f, high = 0.f;
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    low += c[i][0] + c[i][1];
                    high += c[i][2] + c[i][3];
                }
                u32 row = lane % 4;
                if (row < ROWS) {
                    float* sums = parts + (local * WARPS + warp) * TILE_SUMS + row * TILE + lane / 4;
                    sums[0] = low;
                    sums[8] = high;
                }
            }
        }
        consumers_meet();
        u32 done = local / unit_parts;
        for (u32 i = thread; i < done * TILE_SUMS; i += CONSUMERS) {
            u32 index = i / TILE_SUMS, at = i % TILE_SUMS, row = at / TILE;
            float sum[2] = {};
            for (u32 part = 0; part < unit_parts; part++)
                for (u32 w = 0; w < WARPS; w++)
                    sum[part] += parts[((index * unit_parts + part) * WARPS + w) * TILE_SUMS + at];
            u32 tile, segment = locate(p, first + index * gridDim.x, tile);
            u32 output = tile * TILE + at % TILE;
            if (output < p.segments[segment].outputs) finish(p, p.segments[segment], row, output, sum);
        }
        consumers_meet();
    }
}

#define STREAM(ROWS)                                                                     \
    extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, 1)                      \
        stream_##ROWS(const __grid_constant__ Stream p) { stream<ROWS>(p); }
STREAM(1)
STREAM(2)
STREAM(3)
STREAM(4)

// ---- many rows: a block of four warps takes 64 outputs of 32 rows, and a share of the columns.
// Shares are added by `rows_finish`, in order.

constexpr u32 ROWS_TILE = 32, ROWS_WARPS = 4, ROWS_THREADS = ROWS_WARPS * 32;
constexpr u32 SLICE_BLOCKS = 4, SLICE = SLICE_BLOCKS * BLOCK_COLUMNS;

struct ManyRows {
    Stream product;  // not normed
    float* parts;  // [shares, rows, tiles * 16]
    u32 rows, tiles, slices, shares;  // tiles of all segments; slices of a share
};

constexpr u32 ROWS_COLUMNS = 2 * ROWS_TILE, ROWS_COLUMN_BYTES = SLICE * 2 + 64;
// A thread brings four neighbouring columns of so many rows, that many apart.
constexpr u32 ROWS_LOADS = ROWS_TILE * SLICE / 4 / ROWS_THREADS, ROWS_STEP = ROWS_THREADS / (SLICE / 4);

// One slice of a warp's weights and of a thread's activations, on their way.
struct SliceLoads {
    uint4 w[SLICE_BLOCKS][2];
    float4 x[ROWS_LOADS];
};

__device__ inline void load_slice(SliceLoads& to, const ManyRows& p, const uint8_t* weights, u32 block, u32 end) {
#pragma unroll
    for (u32 b = 0; b < SLICE_BLOCKS; b++) {
        const uint8_t* at = weights + (size_t)min(block + b, end - 1) * BLOCK_BYTES;
        to.w[b][0] = __ldg((const uint4*)at);
        to.w[b][1] = __ldg((const uint4*)(at + 512));
    }
    u32 column = block * BLOCK_COLUMNS + threadIdx.x % (SLICE / 4) * 4;
#pragma unroll
    for (u32 i = 0; i < ROWS_LOADS; i++) {
        u32 row = blockIdx.y * ROWS_TILE + threadIdx.x / (SLICE / 4) + i * ROWS_STEP;
        to.x[i] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (row < p.rows && column < end * BLOCK_COLUMNS) {
            size_t from = p.product.pick ? p.product.pick[row] : row;
            to.x[i] = *(const float4*)(p.product.input + from * p.product.width + column);
        }
    }
}

extern "C" __global__ void __launch_bounds__(ROWS_THREADS, 2) many_rows(const __grid_constant__ ManyRows p) {
    __shared__ __align__(128) uint8_t staged[2][ROWS_COLUMNS * ROWS_COLUMN_BYTES];
    u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    u32 tile = blockIdx.x * ROWS_WARPS + warp, first_row = blockIdx.y * ROWS_TILE;
    u32 blocks = p.product.width / BLOCK_COLUMNS;
    u32 begin = blockIdx.z * p.slices * SLICE_BLOCKS, end = min(blocks, begin + p.slices * SLICE_BLOCKS);
    u32 local, segment = locate(p.product, min(tile, p.tiles - 1), local);
    const uint8_t* weights = p.product.segments[segment].matrix + (size_t)local * blocks * BLOCK_BYTES + lane * 16;
    u32 column = thread % (SLICE / 4) * 4, row0 = thread / (SLICE / 4), turn = 0;
    float c[ROWS_COLUMNS / 8][4] = {};
    SliceLoads next;
    load_slice(next, p, weights, begin, end);
    for (u32 block = begin; block < end; block += SLICE_BLOCKS, turn ^= 1) {
        uint8_t* x = staged[turn];
#pragma unroll
        for (u32 i = 0; i < ROWS_LOADS; i++) {
            u32 row = row0 + i * ROWS_STEP;
            uint2 h, l;
            split(next.x[i].x, next.x[i].y, h.x, l.x);
            split(next.x[i].z, next.x[i].w, h.y, l.y);
            *(uint2*)(x + 2 * row * ROWS_COLUMN_BYTES + column * 2) = h;
            *(uint2*)(x + (2 * row + 1) * ROWS_COLUMN_BYTES + column * 2) = l;
        }
        uint4 w[SLICE_BLOCKS][2];
#pragma unroll
        for (u32 b = 0; b < SLICE_BLOCKS; b++) { w[b][0] = next.w[b][0]; w[b][1] = next.w[b][1]; }
        // The other buffer's readers have passed here before it is written again.
        __syncthreads();
        if (block + SLICE_BLOCKS < end) load_slice(next, p, weights, block + SLICE_BLOCKS, end);
        // Activations beyond the end are zero, so that whole slices may be multiplied.
        const uint8_t* mine = x + lane / 4 * ROWS_COLUMN_BYTES + lane % 4 * 16;
#pragma unroll
        for (u32 b = 0; b < SLICE_BLOCKS; b++) {
#pragma unroll
            for (u32 n = 0; n < ROWS_COLUMNS / 8; n++) {
                uint4 v = *(const uint4*)(mine + n * 8 * ROWS_COLUMN_BYTES + b * 64);
                multiply(c[n], w[b][0], v.x, v.y);
                multiply(c[n], w[b][1], v.z, v.w);
            }
        }
    }
    if (tile >= p.tiles) return;
    u32 width = p.tiles * TILE, output = tile * TILE + lane / 4;
    for (u32 n = 0; n < ROWS_COLUMNS / 8; n++) {
        u32 row = first_row + n * 4 + lane % 4;
        if (row >= p.rows) continue;
        float* out = p.parts + ((size_t)blockIdx.z * p.rows + row) * width + output;
        out[0] = c[n][0] + c[n][1];
        out[8] = c[n][2] + c[n][3];
    }
}

// A thread an output: adds the shares, then does what follows the product.
extern "C" __global__ void rows_finish(const __grid_constant__ ManyRows p) {
    const Stream& product = p.product;
    u32 width = p.tiles * TILE, written = product.paired ? product.segments[0].tiles * TILE : width;
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    u64 row = i / written;
    u32 column = i % written;
    if (row >= p.rows) return;
    u32 tile, segment = locate(product, column / TILE, tile);
    const Segment& to = product.segments[segment];
    u32 output = tile * TILE + column % TILE;
    if (output >= to.outputs) return;
    float sum[2] = {};
    for (u32 share = 0; share < p.shares; share++) {
        const float* part = p.parts + (share * (u64)p.rows + row) * width + column;
        sum[0] += part[0];
        if (product.paired) sum[1] += part[written];
    }
    finish(product, to, row, output, sum);
}
