// Products of few rows on tensor cores, with weights in fragment order. An activation is split in
// two bf16 parts, high and low, which take two columns of a tensor-core product: sums are nearly as
// good as those of f32.

#include "product.cuh"

constexpr u32 BF16_BLOCK = block_bytes<PACKED_BF16>();
// Codes of a chunk: 512 bytes are 16 bytes of each lane.
constexpr u32 CHUNK_CODES = 8192, UNIT_BYTES = 512, CHUNK_UNITS = CHUNK_CODES / UNIT_BYTES;
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
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < p.words;
         i += (u64)gridDim.x * blockDim.x) {
        u32 word = i % (BF16_BLOCK / 4);
        u64 block = i / (BF16_BLOCK / 4);
        u64 row = block / blocks * TILE + word_row(word);
        u32 column = block % blocks * BLOCK_COLUMNS + word_column(word);
        p.out[i] = row < p.outputs ? *(const u32*)(p.rows + (row * p.width + column) * 2) : 0;
    }
}

// ---- pack codes: row-major [outputs, row_bytes], four bits low ones first, into fragment order

struct PackCodes {
    const uint8_t* codes;
    const uint16_t* scales;  // [outputs, groups], or null
    uint8_t* out;
    u64 words;  // of codes, with the rows that fill up the last tile
    u32 outputs, width, row_bytes, tile_bytes, group_units;
};

// Row in the tile and column in the block of register `n` of product `h` of a block's two; the
// column is that of the first of two.
__device__ inline u32 code_row(u32 lane, u32 n) { return lane / 4 + n % 2 * 8; }
__device__ inline u32 code_column(u32 lane, u32 h, u32 n) {
    return lane % 4 * 8 + h * 4 + n / 2 * 2;
}

extern "C" __global__ void pack_fp8(const __grid_constant__ PackCodes p) {
    u32 tile_words = p.tile_bytes / 4;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < p.words;
         i += (u64)gridDim.x * blockDim.x) {
        u32 word = i % tile_words, lane = word / 4 % 32, block = word / 128, packed = 0;
        for (u32 n = 0; n < 4; n++) {
            u32 r = word % 2 * 2 + n % 2;
            u64 row = i / tile_words * TILE + code_row(lane, r);
            u32 column = block * BLOCK_COLUMNS + code_column(lane, word / 2 % 2, r) + n / 2;
            u32 code = row < p.outputs ? p.codes[row * p.row_bytes + column] : 0;
            packed |= code << (n / 2 * 2 + (n % 2 ? 0 : 1)) * 8;
        }
        *(u32*)(p.out + i * 4) = packed;
    }
}

// Where word `word` of a tile's codes lies.
__device__ inline u32 int4_place(u32 word, u32 group_units) {
    return word / (INT4_CHUNK_CODES / 4) * int4_chunk_bytes(group_units) +
           word % (INT4_CHUNK_CODES / 4) * 4;
}
extern "C" __global__ void pack_int4(const __grid_constant__ PackCodes p) {
    u32 tile_words = p.width * TILE / 8;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < p.words;
         i += (u64)gridDim.x * blockDim.x) {
        u32 word = i % tile_words, lane = word / 4 % 32, step = word % 4, packed = 0;
        u64 tile = i / tile_words;
        for (u32 n = 0; n < 8; n++) {
            u64 row = tile * TILE + code_row(lane, n % 4);
            u32 column = word / 128 * 64 + step / 2 * BLOCK_COLUMNS +
                         code_column(lane, step % 2, n % 4) + n / 4;
            u32 code = row < p.outputs
                           ? p.codes[row * p.row_bytes + column / 2] >> column % 2 * 4 & 15
                           : 0;
            packed |= (code ^ 8) << 4 * n;
        }
        uint8_t* out = p.out + tile * p.tile_bytes;
        *(u32*)(out + int4_place(word, p.group_units)) = packed;
        // A unit's first words bring the scales of the group that begins with it.
        u32 unit = word / 128, row = word % 128;
        if (!p.group_units || unit % p.group_units || row >= TILE) continue;
        u64 output = tile * TILE + row;
        u32 chunk = unit / (INT4_CHUNK_BLOCKS / 2), groups = p.width / 64 / p.group_units;
        u32 at = unit % (INT4_CHUNK_BLOCKS / 2) / p.group_units * TILE + row;
        uint16_t scale = output < p.outputs ? p.scales[output * groups + unit / p.group_units] : 0;
        *(uint16_t*)(out + int4_scales(chunk, p.width, p.group_units) + at * 2) = scale;
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
    const float* scales;  // of tokens, or null
    u32 tile_bytes, group_units, half_scales;
};

extern "C" __global__ void embed_packed(const __grid_constant__ EmbedPacked p) {
    launch_dependents();
    wait_dependencies();
    u32 token = token_of(p.rows[blockIdx.x], p.chosen) - p.first_token;
    bool inside = token < p.tokens;
    const uint8_t* tile = p.table + (u64)(token / TILE) * (p.width / BLOCK_COLUMNS) * BF16_BLOCK;
    u32 row = token % TILE;
    for (u32 i = threadIdx.x * 2; i < p.width; i += blockDim.x * 2) {
        u32 column = i % BLOCK_COLUMNS, lane = row % 8 * 4 + column / 8;
        u32 word = column / 4 % 2 * 128 + lane * 4 + column / 2 % 2 * 2 + row / 8;
        u32 pair = inside ? *(const u32*)(tile + i / BLOCK_COLUMNS * BF16_BLOCK + word * 4) : 0;
        float* out = p.out + (u64)blockIdx.x * p.width + i;
        out[0] = __uint_as_float(pair << 16) * p.multiplier;
        out[1] = __uint_as_float(pair & 0xffff0000u) * p.multiplier;
    }
}

// One number of a matrix of codes, before its output's scale.
template <u32 FORMAT>
__device__ inline float code_at(const EmbedPacked& p, const uint8_t* tile, u32 row, u32 i) {
    u32 block = i / BLOCK_COLUMNS, column = i % BLOCK_COLUMNS, lane = row % 8 * 4 + column / 8;
    u32 h = column / 4 % 2, n = column / 2 % 2 * 2 + row / 8, e = column % 2;
    if (FORMAT == PACKED_FP8) {
        u32 at = block * block_bytes<PACKED_FP8>() + lane * 16 + (h * 2 + n / 2) * 4 + e * 2 +
                 (n % 2 ? 0 : 1);
        // As `widen_fp8`, and the scales are for what that makes.
        return __uint_as_float(widen_fp8((u32)tile[at] << 8) << 16) * FP8_ACTIVATIONS;
    }
    u32 word = block / 2 * 128 + lane * 4 + block % 2 * 2 + h, unit = block / 2;
    u32 code = *(const u32*)(tile + int4_place(word, p.group_units)) >> 4 * (n + 4 * e) & 15;
    float value = (float)code - 8.f;
    if (!p.group_units) return value;
    u32 chunk = unit / (INT4_CHUNK_BLOCKS / 2),
        group = unit % (INT4_CHUNK_BLOCKS / 2) / p.group_units;
    const uint8_t* scales = tile + int4_scales(chunk, p.width, p.group_units);
    return value *
           group_scale(*(const uint16_t*)(scales + (group * TILE + row) * 2), p.half_scales);
}

template <u32 FORMAT>
__device__ inline void embed_codes(const EmbedPacked& p) {
    launch_dependents();
    wait_dependencies();
    u32 token = token_of(p.rows[blockIdx.x], p.chosen) - p.first_token;
    bool inside = token < p.tokens;
    const uint8_t* tile = p.table + (u64)(token / TILE) * p.tile_bytes;
    float scale = inside && p.scales ? p.scales[token] : 1.f;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        float x = inside ? code_at<FORMAT>(p, tile, token % TILE, i) * scale : 0.f;
        p.out[(u64)blockIdx.x * p.width + i] = x * p.multiplier;
    }
}
extern "C" __global__ void embed_fp8(const __grid_constant__ EmbedPacked p) {
    embed_codes<PACKED_FP8>(p);
}
extern "C" __global__ void embed_int4(const __grid_constant__ EmbedPacked p) {
    embed_codes<PACKED_INT4>(p);
}

__device__ inline void multiply(float* c, uint4 a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// ---- stream: up to four rows. One block a multiprocessor; a warp copies weights in bulk into a
// ring of chunks, eight warps multiply.

__device__ inline void consumers_meet() {
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
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
    for (u32 n = 0; n < QUADS; n++)
        sum += v[n].x * v[n].x + v[n].y * v[n].y + v[n].z * v[n].z + v[n].w * v[n].w;
    return sum;
}

// Puts the input's rows into shared memory, normalised where the op is, split in two parts.
template <u32 ROWS, u32 FORMAT>
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
                if (FORMAT == PACKED_FP8) {
                    t.x *= FP8_ACTIVATIONS;
                    t.y *= FP8_ACTIVATIONS;
                    t.z *= FP8_ACTIVATIONS;
                    t.w *= FP8_ACTIVATIONS;
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

// A warp's part of a chunk: four units of 512 bytes from `first` on, `units` in all. What is not
// there counts as zeros, which meet activations that are there; no branch keeps loads apart.
template <u32 FORMAT>
__device__ inline void multiply_units(float (&c)[4][4], const Stream& p, const uint8_t* chunk,
                                      const uint8_t* x, u32 first, u32 units) {
    constexpr u32 UNITS = CHUNK_UNITS / GROUP_WARPS, STEPS = steps_of<FORMAT>(),
                  UNIT_BLOCK_BYTES = STEPS * 32;
    constexpr u32 ZEROS = FORMAT == PACKED_INT4 ? 0x88888888u : 0;
    u32 lane = threadIdx.x % 32;
    uint4 v[UNITS];
    float scales[UNITS][2];
#pragma unroll
    for (u32 u = 0; u < UNITS; u++) {
        u32 unit = first + u;
        v[u] = make_uint4(ZEROS, ZEROS, ZEROS, ZEROS);
        if (unit < units) v[u] = *(const uint4*)(chunk + unit * UNIT_BYTES + lane * 16);
        if (FORMAT != PACKED_INT4) continue;
        scales[u][0] = scales[u][1] = 1.f;
        if (p.group_units) {
            const uint8_t* at =
                chunk + units * UNIT_BYTES +
                (group_of(min(unit, units - 1), p.group_units) * TILE + lane / 4) * 2;
            scales[u][0] = group_scale(*(const uint16_t*)at, p.half_scales);
            scales[u][1] = group_scale(*(const uint16_t*)(at + 16), p.half_scales);
        }
    }
    // Two products share 32 columns of the activation.
    uint4 b = {};
#pragma unroll
    for (u32 u = 0; u < UNITS; u++) {
        u32 unit = first + u;
        const uint8_t* from = x + (unit < units ? unit : 0) * UNIT_BLOCK_BYTES / 64 * 64;
        float sum[2][4] = {};
#pragma unroll
        for (u32 step = 0; step < STEPS; step++) {
            u32 product = u * STEPS + step, a[4];
            if (product % 2 == 0) b = *(const uint4*)(from + step / 2 * 64);
            widen<FORMAT>(v[u], step, a);
            float (&to)[4] = FORMAT == PACKED_INT4 ? sum[step % 2] : c[product % 4];
            bool odd = product % 2;
            multiply(to, make_uint4(a[0], a[1], a[2], a[3]), odd ? b.z : b.x, odd ? b.w : b.y);
        }
        if (FORMAT != PACKED_INT4) continue;
#pragma unroll
        for (u32 i = 0; i < 4; i++) c[u][i] += (sum[0][i] + sum[1][i]) * scales[u][i / 2];
    }
}

template <u32 ROWS, u32 FORMAT>
__device__ inline void stream(const Stream& p) {
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr u32 TILES = PART_TILES / ROWS, TILE_SUMS = TILE * ROWS;
    constexpr u32 UNIT_COLUMNS = 16 * steps_of<FORMAT>();
    u32 all_units = p.width / UNIT_COLUMNS, chunks = (all_units + CHUNK_UNITS - 1) / CHUNK_UNITS;
    u32 chunk_bytes =
        CHUNK_CODES + (FORMAT == PACKED_INT4 ? int4_scale_bytes(CHUNK_UNITS, p.group_units) : 0);
    // 64 bytes between columns: eight lanes' reads of two columns meet in no bank.
    u32 column_bytes = 2 * p.width + 64;
    uint8_t* x = shared + p.stages * chunk_bytes;
    float* parts = (float*)(x + 2 * ROWS * column_bytes);
    float* reduced = parts + TILES * WARPS * TILE_SUMS;
    u64* barriers = (u64*)(reduced + 4 * WARPS);
    u32 ring = (u32)__cvta_generic_to_shared(shared),
        full = (u32)__cvta_generic_to_shared(barriers);
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
                const uint8_t* from = p.segments[segment].matrix + (size_t)tile * p.tile_bytes;
                for (u32 chunk = 0; chunk < chunks; chunk++) {
                    u32 bytes = min(chunk_bytes, p.tile_bytes - chunk * chunk_bytes);
                    // The first round passes at once: the phase before the first counts as done.
                    barrier_wait(empty + slot * 8, parity);
                    barrier_expect(full + slot * 8, bytes);
                    bulk_copy(ring + slot * chunk_bytes, from + (size_t)chunk * chunk_bytes, bytes,
                              full + slot * 8);
                    if (++slot == p.stages) {
                        slot = 0;
                        parity ^= 1;
                    }
                }
            }
        }
        return;
    }

    stage_rows<ROWS, FORMAT>(p, x, reduced, column_bytes);
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
                        u32 units_here = min(CHUNK_UNITS, all_units - chunk * CHUNK_UNITS);
                        const uint8_t* activations = mine + chunk * CHUNK_UNITS * UNIT_COLUMNS * 2;
                        multiply_units<FORMAT>(c, p, shared + slot * chunk_bytes, activations,
                                               sub * (CHUNK_UNITS / GROUP_WARPS), units_here);
                        __syncwarp();
                        if (lane == 0) barrier_arrive(empty + slot * 8);
                    }
                    turn ^= 1;
                    if (++slot == p.stages) {
                        slot = 0;
                        parity ^= 1;
                    }
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
                    float* sums =
                        parts + (local * WARPS + warp) * TILE_SUMS + row * TILE + lane / 4;
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
            if (output < p.segments[segment].outputs)
                finish(p, p.segments[segment], row, output, sum);
        }
        consumers_meet();
    }
}

#define STREAM(NAME, FORMAT, ROWS)                                  \
    extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, 1) \
        stream_##NAME##_##ROWS(const __grid_constant__ Stream p) {  \
        stream<ROWS, FORMAT>(p);                                    \
    }
STREAM(bf16, PACKED_BF16, 1)
STREAM(bf16, PACKED_BF16, 2)
STREAM(bf16, PACKED_BF16, 3)
STREAM(bf16, PACKED_BF16, 4)
STREAM(fp8, PACKED_FP8, 1)
STREAM(fp8, PACKED_FP8, 2)
STREAM(fp8, PACKED_FP8, 3)
STREAM(fp8, PACKED_FP8, 4)
STREAM(int4, PACKED_INT4, 1)
STREAM(int4, PACKED_INT4, 2)
STREAM(int4, PACKED_INT4, 3)
STREAM(int4, PACKED_INT4, 4)
