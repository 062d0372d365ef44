// Products with bf16 weights on tensor cores. Weights lie in fragment order: a tile of 16 outputs,
// then blocks of 32 columns, 1024 bytes each. An activation is split in two bf16 parts, high and
// low, which take two columns of a tensor-core product: sums are nearly as good as f32's.

#include "product.cuh"

constexpr u32 CHUNK_BLOCKS = 8, CHUNK_BYTES = BLOCK_BYTES * CHUNK_BLOCKS;
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

// ---- stream: up to four rows. One block a multiprocessor; a warp copies weights in bulk into a
// ring of chunks, eight warps multiply.

__device__ inline void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

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
