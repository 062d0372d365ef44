// Attention of many rows of a sequence over a bf16 cache, on warpgroups. A block takes a tile of
// rows and one key head with all its query heads; it reads the slots that they see once.

#include "barrier.cuh"
#include "wgmma.cuh"

// Rows of the step that follow each other in one sequence.
struct RowTile {
    u32 first, count;
};

struct Prefill {
    Cache cache;
    const Row* rows;  // none of a tree
    const RowTile* tiles;
    const float* query;  // [rows, kv_heads * queries, dim]
    const float* sinks;
    float* out;                     // [rows, kv_heads * queries, dim]
    u32 kv_heads, queries, window;  // queries: query heads of a key head
    float scale, cap;
};

constexpr u32 KEYS = 128, STAGES = 2, GROUP = 128, GROUPS = 2,
              PREFILL_THREADS = GROUP * (GROUPS + 1);
constexpr u32 SLAB_COLUMNS = 64, SLAB_BYTES = KEYS * SLAB_COLUMNS * 2;
// Rows times query heads of a block, and bytes of 64 columns of their queries.
constexpr u32 QUERY_SLAB_BYTES = GROUPS * 64 * 128;
constexpr float LOG2_E = 1.4426950408889634f;

__device__ inline void copy_piece(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Brings keys and values of the slots from `begin` to `end` into the ring. A thread finds a slot;
// then neighbouring lanes copy neighbouring pieces of the slots of their warp. Slots behind the end
// repeat the last one: they are not seen, and their numbers are finite.
template <u32 DIM>
__device__ inline void bring(const Prefill& p, u32 sequence, u32 kv_head, u32 begin, u32 end,
                             u32 ring, u32 full, u32 empty) {
    constexpr u32 HALF = DIM / SLAB_COLUMNS * SLAB_BYTES, PIECES = DIM / 8, AT_ONCE = 32 / PIECES;
    u32 thread = threadIdx.x % GROUP, lane = threadIdx.x % 32, stage = 0, parity = 1, before = ~0u;
    u32 piece = lane % PIECES, key_at = kv_head * DIM * 2 + piece * 16,
        value_at = p.kv_heads * DIM * 2;
    for (u32 slot = begin; slot < end; slot += KEYS) {
        u64 mine = (u64)token_at(p.cache, sequence, min(slot + thread, end - 1));
        barrier_wait(empty + stage * 8, parity);
        u32 to = ring + stage * 2 * HALF + piece / 8 * SLAB_BYTES;
#pragma unroll
        for (u32 i = 0; i < 32; i += AT_ONCE) {
            u32 other = i + lane / PIECES, row = thread / 32 * 32 + other;
            const uint8_t* token = (const uint8_t*)__shfl_sync(0xffffffffu, mine, other) + key_at;
            u32 at = to + row * 128 + (piece ^ row) % 8 * 16;
            copy_piece(at, token);
            copy_piece(at + HALF, token + value_at);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        if (before != ~0u) {
            asm volatile("cp.async.wait_group 1;\nfence.proxy.async.shared::cta;" ::: "memory");
            __syncwarp();
            if (lane == 0) barrier_arrive(full + before * 8);
        }
        before = stage;
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
    asm volatile("cp.async.wait_group 0;\nfence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (lane == 0) barrier_arrive(full + before * 8);
}

__device__ inline u32 pack_pair(float x, float y) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *(u32*)&pair;
}

__device__ inline float raise_two(float x) {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
    return x;
}

// As `soft_cap`, by one exponential; a cap times 2^-22 is the largest error.
__device__ inline float quick_soft_cap(float x, float cap) {
    float raised = raise_two(x / cap * (2.f * LOG2_E));
    return cap - __fdividef(2.f * cap, raised + 1.f);
}

// The largest or the sum over the four lanes that share a row.
__device__ inline float quad_most(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// One of the two rows of a thread.
struct Half {
    bool there;
    size_t place;        // of its head in `query` and `out`
    u32 head, from, to;  // the slots that it sees
    float most, total;
};

__device__ inline Half half_of(const Prefill& p, const RowTile& tile, u32 kv_head, u32 index) {
    Half half = {};
    u32 row = index / p.queries;
    half.there = row < tile.count;
    Row it = p.rows[tile.first + min(row, tile.count - 1)];
    half.head = kv_head * p.queries + index % p.queries;
    half.place = (size_t)(tile.first + row) * p.kv_heads * p.queries + half.head;
    half.to = half.there ? it.cached + it.place + 1 : 0;
    half.from = p.window && it.position + 1 > p.window ? it.position + 1 - p.window : 0;
    half.most = -INFINITY;
    return half;
}

// The scores of row `half` of a thread for 128 slots.
template <class Change>
__device__ inline void for_each(float (&s)[KEYS / 2], u32 half, Change change) {
#pragma unroll
    for (u32 j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (u32 e = 0; e < 2; e++) change(s[j * 4 + half * 2 + e], j * 8 + e);
}

// Scores become weights, two to the power of `unit` times their distance from the largest. The
// result is the factor for what was summed before.
__device__ inline float soften(float (&s)[KEYS / 2], u32 half, Half& row, float unit) {
    float most = row.most, total = 0.f;
    for_each(s, half, [&](float& x, u32) { most = fmaxf(most, x); });
    most = quad_most(most);
    // A row that has seen no slot yet keeps zeros.
    float base = most == -INFINITY ? 0.f : most * unit, keep = raise_two(row.most * unit - base);
    for_each(s, half, [&](float& x, u32) {
        x = raise_two(x * unit - base);
        total += x;
    });
    row.total = row.total * keep + total;
    row.most = most;
    return keep;
}

template <u32 DIM>
__device__ inline void attend_tile(const Prefill& p, const RowTile& tile, u32 kv_head, u32 begin,
                                   u32 end, u32 ring, u32 full, u32 empty) {
    constexpr u32 HALF = DIM / SLAB_COLUMNS * SLAB_BYTES;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, stage = 0, parity = 0;
    u32 index = warp * 16 + lane / 4;
    Half rows[2] = {half_of(p, tile, kv_head, index), half_of(p, tile, kv_head, index + 8)};
    // The queries lie in shared memory as the keys do; each warp brings its own.
    u32 queries = ring + STAGES * 2 * HALF + warp / 4 * 64 * 128, place = index % 64;
#pragma unroll
    for (u32 half = 0; half < 2; half++)
#pragma unroll
        for (u32 i = 0; i < DIM / 8; i++) {
            const Half& row = rows[half];
            float2 x = make_float2(0.f, 0.f);
            if (row.there)
                x = __ldcg((const float2*)(p.query + row.place * DIM + i * 8 + lane % 4 * 2));
            u32 at = i / 8 * QUERY_SLAB_BYTES + (place + half * 8) * 128 + ((i ^ place) % 8) * 16 +
                     lane % 4 * 4;
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(queries + at), "r"(pack_pair(x.x, x.y))
                         : "memory");
        }
    asm volatile("fence.proxy.async.shared::cta;\nbar.sync %0, 128;" ::"r"(1 + warp / 4)
                 : "memory");
    float o[DIM / 2] = {}, unit = (p.cap > 0.f ? 1.f : p.scale) * LOG2_E;
    // All rows of the block see the slots in between.
    u32 all_from = 0, all_to = end;
    if (p.window) {
        Row last = p.rows[tile.first + tile.count - 1];
        all_from = last.position + 1 > p.window ? last.position + 1 - p.window : 0;
    }
    Row first = p.rows[tile.first];
    all_to = first.cached + first.place + 1;
    for (u32 slot = begin; slot < end; slot += KEYS) {
        float s[KEYS / 2];
        u32 keys = ring + stage * 2 * HALF, values = keys + HALF;
        barrier_wait(full + stage * 8, parity);
        wgmma_fence();
#pragma unroll
        for (u32 i = 0; i < DIM / 16; i++)
            wgmma_shared(s, descriptor(queries + i / 4 * QUERY_SLAB_BYTES + i % 4 * 32),
                         descriptor(keys + i / 4 * SLAB_BYTES + i % 4 * 32), i);
        wgmma_commit();
        wgmma_wait<0>();
        if (p.cap > 0.f)
#pragma unroll
            for (u32 half = 0; half < 2; half++)
                for_each(s, half, [&](float& x, u32) { x = quick_soft_cap(x * p.scale, p.cap); });
        if (slot < all_from || slot + KEYS > all_to)
#pragma unroll
            for (u32 half = 0; half < 2; half++)
                for_each(s, half, [&](float& x, u32 at) {
                    u32 it = slot + lane % 4 * 2 + at;
                    if (it < rows[half].from || it >= rows[half].to) x = -INFINITY;
                });
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float keep = soften(s, half, rows[half], unit);
#pragma unroll
            for (u32 j = 0; j < DIM / 8; j++) {
                o[j * 4 + half * 2] *= keep;
                o[j * 4 + half * 2 + 1] *= keep;
            }
        }
        u32 weights[KEYS / 16][4];
#pragma unroll
        for (u32 i = 0; i < KEYS / 16; i++)
#pragma unroll
            for (u32 n = 0; n < 4; n++)
                weights[i][n] = pack_pair(s[i * 8 + n * 2], s[i * 8 + n * 2 + 1]);
        wgmma_fence();
#pragma unroll
        for (u32 i = 0; i < KEYS / 16; i++)
            wgmma<1>(o, weights[i], descriptor(values + i * 16 * 128, SLAB_BYTES), 1);
        wgmma_commit();
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(empty + stage * 8);
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        Half& row = rows[half];
        float total = quad_sum(row.total), keep = 1.f;
        if (p.sinks) {
            float sink = p.sinks[row.head] * LOG2_E, most = fmaxf(row.most * unit, sink);
            keep = raise_two(row.most * unit - most);
            total = total * keep + raise_two(sink - most);
        }
        float inverse = keep / total;
        if (!row.there) continue;
#pragma unroll
        for (u32 j = 0; j < DIM / 8; j++) {
            float2 x =
                make_float2(o[j * 4 + half * 2] * inverse, o[j * 4 + half * 2 + 1] * inverse);
            *(float2*)(p.out + row.place * DIM + j * 8 + lane % 4 * 2) = x;
        }
    }
}

template <u32 DIM>
__device__ inline void prefill(const Prefill& p) {
    extern __shared__ uint8_t unaligned[];
    __shared__ u64 barriers[2 * STAGES];
    u32 ring = ((u32)__cvta_generic_to_shared(unaligned) + 1023) / 1024 * 1024;
    u32 full = (u32)__cvta_generic_to_shared(barriers), empty = full + STAGES * 8;
    launch_dependents();
    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < STAGES; stage++) {
            barrier_init(full + stage * 8, GROUP / 32);
            barrier_init(empty + stage * 8, GROUPS * GROUP / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    wait_dependencies();
    // The last tiles see the most: they begin first.
    RowTile tile = p.tiles[gridDim.x - 1 - blockIdx.x];
    Row first = p.rows[tile.first], last = p.rows[tile.first + tile.count - 1];
    u32 kv_head = blockIdx.y, end = last.cached + last.place + 1;
    u32 begin = p.window && first.position + 1 > p.window ? first.position + 1 - p.window : 0;
    if (threadIdx.x >= GROUPS * GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
        bring<DIM>(p, first.sequence, kv_head, begin, end, ring, full, empty);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        attend_tile<DIM>(p, tile, kv_head, begin, end, ring, full, empty);
    }
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 1)
    prefill_64(const __grid_constant__ Prefill p) {
    prefill<64>(p);
}
extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 1)
    prefill_128(const __grid_constant__ Prefill p) {
    prefill<128>(p);
}
