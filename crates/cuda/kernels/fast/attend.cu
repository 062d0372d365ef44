// Attention over a bf16 cache, split over positions (flash-decoding), and what stands around it:
// rotary turns with the cache's writes, and the largest logit.

#include "common.cuh"

constexpr u32 ATTEND_WARPS = 4, ATTEND_THREADS = ATTEND_WARPS * 32;
// Elements that a lane reads at once.
constexpr u32 LANE_ELEMENTS = 8;
// Slots of a share are a multiple of it.
constexpr u32 SHARE_UNIT = 32;

// ---- attend_split: a block a row, key head and share of the slots. All query heads of the key
// head are served by one read. It leaves for each query head: sums of values, then the largest
// score, then the sum of weights.

struct AttendSplit {
    Cache cache;
    const Row* rows;
    const float* query;  // [rows, kv_heads * queries, dim]
    float* parts;        // [rows, heads, shares, dim + 2]
    u32 kv_heads, queries, shares, window;
    float scale, cap;
};

__device__ inline void unpack(uint4 v, float* x) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

// Whether `row` sees a slot of its sequence.
__device__ inline bool sees(const Row* rows, const Row& row, u32 slot, u32 window) {
    u32 position = slot;
    if (row.tree && slot >= row.cached) {
        u32 other = slot - row.cached;
        if (!(row.ancestors >> other & 1)) return false;
        position = rows[row.first_row + other].position;
    }
    return !(window && position + window <= row.position);
}

template <u32 DIM, u32 QUERIES>
__device__ inline void attend_split(const AttendSplit& p) {
    constexpr u32 LANES = DIM / LANE_ELEMENTS, TOKENS = 32 / LANES, AT_ONCE = QUERIES > 4 ? 2 : 4;
    constexpr u32 STREAMS = ATTEND_WARPS * TOKENS;  // slots that are summed apart
    __shared__ float sums[STREAMS][QUERIES][DIM];
    __shared__ float most_of[STREAMS][QUERIES], total_of[STREAMS][QUERIES];
    launch_dependents();
    wait_dependencies();
    u32 index = blockIdx.x, kv_head = blockIdx.y / p.shares, share = blockIdx.y % p.shares;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, element = lane % LANES * LANE_ELEMENTS;
    u32 mine = warp * TOKENS + lane / LANES;
    Row row = p.rows[index];
    u32 begin = p.window && row.position + 1 > p.window ? row.position + 1 - p.window : 0;
    // A tree's rows lie at slots behind `cached`, whatever their positions.
    if (row.tree) begin = min(begin, row.cached);
    u32 end = row.cached + (row.tree ? 64 - __clzll(row.ancestors) : row.place + 1);
    begin = begin / SHARE_UNIT * SHARE_UNIT;
    u32 size = ((end - begin + p.shares - 1) / p.shares + SHARE_UNIT - 1) / SHARE_UNIT * SHARE_UNIT;
    u32 first = begin + share * size, last = min(end, first + size);
    u32 visible_from =
        p.window && !row.tree && row.position + 1 > p.window ? row.position + 1 - p.window : 0;

    float query[QUERIES][LANE_ELEMENTS], sum[QUERIES][LANE_ELEMENTS], most[QUERIES], total[QUERIES];
#pragma unroll
    for (u32 q = 0; q < QUERIES; q++) {
        const float* from =
            p.query +
            (((size_t)index * p.kv_heads + kv_head) * p.queries + min(q, p.queries - 1)) * DIM +
            element;
        *(float4*)query[q] = __ldcg((const float4*)from);
        *(float4*)(query[q] + 4) = __ldcg((const float4*)(from + 4));
        most[q] = -INFINITY;
        total[q] = 0.f;
#pragma unroll
        for (u32 i = 0; i < LANE_ELEMENTS; i++) sum[q][i] = 0.f;
    }
    u32 key_at = (kv_head * DIM + element) * 2,
        value_at = ((p.kv_heads + kv_head) * DIM + element) * 2;
    for (u32 base = first; base < last; base += STREAMS * AT_ONCE) {
        uint4 keys[AT_ONCE], values[AT_ONCE];
        bool seen[AT_ONCE];
#pragma unroll
        for (u32 n = 0; n < AT_ONCE; n++) {
            u32 slot = base + n * STREAMS + mine;
            seen[n] = slot < last && slot >= visible_from && sees(p.rows, row, slot, p.window);
            keys[n] = values[n] = make_uint4(0, 0, 0, 0);
            if (seen[n]) {
                const uint8_t* token = token_at(p.cache, row.sequence, slot);
                keys[n] = __ldcg((const uint4*)(token + key_at));
                values[n] = __ldcg((const uint4*)(token + value_at));
            }
        }
#pragma unroll
        for (u32 n = 0; n < AT_ONCE; n++) {
            float key[LANE_ELEMENTS], value[LANE_ELEMENTS];
            unpack(keys[n], key);
            unpack(values[n], value);
#pragma unroll
            for (u32 q = 0; q < QUERIES; q++) {
                float score = 0.f;
#pragma unroll
                for (u32 i = 0; i < LANE_ELEMENTS; i++) score += query[q][i] * key[i];
#pragma unroll
                for (u32 step = LANES / 2; step > 0; step >>= 1)
                    score += __shfl_xor_sync(0xffffffffu, score, step);
                if (!seen[n]) continue;
                score = soft_cap(score * p.scale, p.cap);
                float raised = fmaxf(most[q], score);
                float keep = __expf(most[q] - raised), weight = __expf(score - raised);
                most[q] = raised;
                total[q] = total[q] * keep + weight;
#pragma unroll
                for (u32 i = 0; i < LANE_ELEMENTS; i++)
                    sum[q][i] = sum[q][i] * keep + weight * value[i];
            }
        }
    }
#pragma unroll
    for (u32 q = 0; q < QUERIES; q++) {
#pragma unroll
        for (u32 i = 0; i < LANE_ELEMENTS; i++) sums[mine][q][element + i] = sum[q][i];
        if (lane % LANES == 0) {
            most_of[mine][q] = most[q];
            total_of[mine][q] = total[q];
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < p.queries * DIM; i += ATTEND_THREADS) {
        u32 q = i / DIM, at = i % DIM;
        float all = -INFINITY, x = 0.f, weights = 0.f;
        for (u32 s = 0; s < STREAMS; s++) all = fmaxf(all, most_of[s][q]);
        if (all > -INFINITY) {
            for (u32 s = 0; s < STREAMS; s++) {
                float keep = __expf(most_of[s][q] - all);
                x += sums[s][q][at] * keep;
                weights += total_of[s][q] * keep;
            }
        }
        size_t head = ((size_t)index * p.kv_heads + kv_head) * p.queries + q;
        float* out = p.parts + (head * p.shares + share) * (DIM + 2);
        out[at] = x;
        if (at == 0) {
            out[DIM] = all;
            out[DIM + 1] = weights;
        }
    }
}

#define ATTEND_SPLIT(DIM, QUERIES)                                              \
    extern "C" __global__ void __launch_bounds__(ATTEND_THREADS)                \
        attend_split_##DIM##_##QUERIES(const __grid_constant__ AttendSplit p) { \
        attend_split<DIM, QUERIES>(p);                                          \
    }
ATTEND_SPLIT(32, 1)
ATTEND_SPLIT(32, 2)
ATTEND_SPLIT(32, 4)
ATTEND_SPLIT(32, 8)
ATTEND_SPLIT(64, 1)
ATTEND_SPLIT(64, 2)
ATTEND_SPLIT(64, 4)
ATTEND_SPLIT(64, 8)
ATTEND_SPLIT(128, 1)
ATTEND_SPLIT(128, 2)
ATTEND_SPLIT(128, 4)
ATTEND_SPLIT(128, 8)

// ---- attend_join: a block a row and head adds the shares

struct AttendJoin {
    const float* parts;
    const float* sinks;
    float* out;  // [rows, heads, dim]
    u32 heads, shares, dim;
};

constexpr u32 SHARES_MAX = 32;

extern "C" __global__ void attend_join(const __grid_constant__ AttendJoin p) {
    __shared__ float keeps[SHARES_MAX];
    __shared__ float weights;
    launch_dependents();
    wait_dependencies();
    size_t head = (size_t)blockIdx.x * p.heads + blockIdx.y;
    u32 stride = p.dim + 2, lane = threadIdx.x;
    const float* parts = p.parts + head * p.shares * stride;
    if (lane < 32) {
        float sink = p.sinks ? p.sinks[blockIdx.y] : -INFINITY;
        bool held = lane < p.shares;
        float most = held ? __ldcg(parts + lane * stride + p.dim) : -INFINITY;
        float total = held ? __ldcg(parts + lane * stride + p.dim + 1) : 0.f;
        float all = fmaxf(most, sink);
        for (int step = 16; step > 0; step >>= 1)
            all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, step));
        float keep = __expf(most - all);
        keeps[lane] = keep;
        total = warp_sum(total * keep) + __expf(sink - all);
        if (lane == 0) weights = total;
    }
    __syncthreads();
    float x = 0.f;
#pragma unroll 8
    for (u32 s = 0; s < p.shares; s++) x += __ldcg(parts + s * stride + threadIdx.x) * keeps[s];
    p.out[head * p.dim + threadIdx.x] = x / weights;
}

// ---- rope_angles: a block a row, once a step; the angle is rounded to f32, its sine is exact

struct RopeAngles {
    const Row* rows;
    const float* frequencies;  // [2, pairs]: of short and of long texts
    float2* out;               // [rows, pairs]: sine and cosine, times the magnitude
    u32 pairs;
    float magnitude;
};

extern "C" __global__ void rope_angles(const __grid_constant__ RopeAngles p) {
    launch_dependents();
    wait_dependencies();
    Row row = p.rows[blockIdx.x];
    const float* frequencies = p.frequencies + (row.long_rope ? p.pairs : 0);
    for (u32 pair = threadIdx.x; pair < p.pairs; pair += blockDim.x) {
        double sin, cos;
        sincos((double)__fmul_rn((float)row.position, frequencies[pair]), &sin, &cos);
        float s = __fmul_rn((float)sin, p.magnitude), c = __fmul_rn((float)cos, p.magnitude);
        p.out[(size_t)blockIdx.x * p.pairs + pair] = make_float2(s, c);
    }
}

// ---- turn_and_store: a warp a head of queries, keys or values. Queries and keys are turned, keys
// and values go to the cache as bf16.

struct TurnAndStore {
    Cache cache;
    const Row* rows;
    const float* query;
    const float* key;
    const float* value;
    const float2* angles;  // of `rope_angles`
    float* query_out;
    float* key_out;
    u32 heads, kv_heads, dim, value_dim, offset, pairs, interleaved;
};

extern "C" __global__ void turn_and_store(const __grid_constant__ TurnAndStore p) {
    launch_dependents();
    wait_dependencies();
    u32 head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 index = blockIdx.x, keys = p.heads + p.kv_heads;
    if (head >= keys + p.kv_heads) return;
    Row row = p.rows[index];
    uint8_t* token =
        head < p.heads ? nullptr : token_at(p.cache, row.sequence, row.cached + row.place);
    if (head >= keys) {
        u32 at = head - keys;
        const float* in = p.value + ((size_t)index * p.kv_heads + at) * p.value_dim;
        store_vector<BF16>(in, token + (p.kv_heads * p.dim + at * p.value_dim) * 2, p.value_dim);
        return;
    }
    bool is_key = head >= p.heads;
    u32 at = is_key ? head - p.heads : head, heads = is_key ? p.kv_heads : p.heads;
    const float* in = (is_key ? p.key : p.query) + ((size_t)index * heads + at) * p.dim;
    float* out = (is_key ? p.key_out : p.query_out) + ((size_t)index * heads + at) * p.dim;
    for (u32 i = lane; i < p.dim; i += 32)
        if (i < p.offset || i >= p.offset + 2 * p.pairs) out[i] = in[i];
    const float2* angles = p.angles + (size_t)index * p.pairs;
    for (u32 pair = lane; pair < p.pairs; pair += 32) {
        float2 angle = __ldcg(angles + pair);
        float s = angle.x, c = angle.y;
        u32 a = p.offset + (p.interleaved ? 2 * pair : pair), b = a + (p.interleaved ? 1 : p.pairs);
        float x = in[a], y = in[b];
        out[a] = __fsub_rn(__fmul_rn(x, c), __fmul_rn(y, s));
        out[b] = __fadd_rn(__fmul_rn(y, c), __fmul_rn(x, s));
    }
    __syncwarp();
    if (is_key) store_vector<BF16>(out, token + at * p.dim * 2, p.dim);
}

// ---- the largest logit: blocks find the best of a part of a row, then a warp the best of these.
// NaN counts as minus infinity, plus infinity as the largest f32, ties go to the lower id.

constexpr u32 BEST_PARTS = 32, BEST_THREADS = 256;

struct Best {
    const float* logits;
    u64* parts;  // [choices, BEST_PARTS]
    u32* out;    // [choices]: the token, or 0xffffffff if all logits are minus infinity
    u32 vocabulary;
};

// Larger for a larger logit, then for a lower id; 0 for minus infinity.
__device__ inline u64 rank_of(float x, u32 id) {
    if (isnan(x) || x == -INFINITY) return 0;
    u32 bits = __float_as_uint(fminf(x, 3.402823466e38f) + 0.f);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (u64)bits << 32 | (0xffffffffu - id);
}

__device__ inline u64 warp_most(u64 x) {
    for (int step = 16; step > 0; step >>= 1) {
        u64 other = __shfl_xor_sync(0xffffffffu, x, step);
        if (other > x) x = other;
    }
    return x;
}

extern "C" __global__ void best_parts(const __grid_constant__ Best p) {
    __shared__ u64 warps[BEST_THREADS / 32];
    launch_dependents();
    wait_dependencies();
    const float* logits = p.logits + (size_t)blockIdx.x * p.vocabulary;
    u64 best = 0;
    for (u32 i = blockIdx.y * BEST_THREADS + threadIdx.x; i < p.vocabulary;
         i += BEST_PARTS * BEST_THREADS) {
        u64 rank = rank_of(__ldcg(logits + i), i);
        if (rank > best) best = rank;
    }
    best = warp_most(best);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = warp_most(threadIdx.x < BEST_THREADS / 32 ? warps[threadIdx.x] : 0);
    if (threadIdx.x == 0) p.parts[blockIdx.x * BEST_PARTS + blockIdx.y] = best;
}

extern "C" __global__ void best_of_parts(const __grid_constant__ Best p) {
    launch_dependents();
    wait_dependencies();
    u64 best = warp_most(__ldcg(p.parts + blockIdx.x * BEST_PARTS + threadIdx.x));
    if (threadIdx.x == 0) p.out[blockIdx.x] = best == 0 ? 0xffffffffu : 0xffffffffu - (u32)best;
}
