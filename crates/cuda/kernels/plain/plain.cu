// The plain kernels: one correct kernel an op. Activations are f32, a row a token. They are the
// oracle on the device for the kernels that replace them. Parameter structs are those of
// `src/parameters.rs`, field by field.

#include "common.cuh"

// ---- embed: out[row] = table[token - first] * multiplier, zero outside the table

struct Embed {
    const Row* rows;
    const u32* chosen;
    const void* table;
    float* out;
    u32 width, first_token, tokens;
    float multiplier;
    // Of matrices in fragment order.
    const float* scales;
    u32 tile_bytes, group_units, half_scales;
};

template <typename T>
__device__ inline void embed(const Embed& p) {
    u32 token = token_of(p.rows[blockIdx.x], p.chosen);
    bool inside = token >= p.first_token && token - p.first_token < p.tokens;
    const T* table = (const T*)p.table + (size_t)(token - p.first_token) * p.width;
    float* out = p.out + (size_t)blockIdx.x * p.width;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x)
        out[i] = inside ? load(table, i) * p.multiplier : 0.f;
}
extern "C" __global__ void embed_f32(const __grid_constant__ Embed p) { embed<float>(p); }
extern "C" __global__ void embed_bf16(const __grid_constant__ Embed p) { embed<__nv_bfloat16>(p); }

// ---- norm: one block a group of a row; sums in f64, as the reference's

struct Norm {
    const float* input;
    const float* weight;
    const float* bias;
    float* out;
    u32 n, groups;
    u32 weight_per_element, bias_per_element;
    u32 layer;
    float offset, epsilon;
};

__device__ inline double block_sum(double x) {
    __shared__ double part[8];
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    double sum = 0;
    for (u32 warp = 0; warp < blockDim.x / 32; warp++) sum += part[warp];
    return sum;
}

extern "C" __global__ void normalise(const __grid_constant__ Norm p) {
    const float* in = p.input + (size_t)blockIdx.x * p.n;
    float* out = p.out + (size_t)blockIdx.x * p.n;
    double mean = 0;
    if (p.layer) {
        double sum = 0;
        for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) sum += in[i];
        mean = block_sum(sum) / p.n;
    }
    double squares = 0;
    for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) squares += (in[i] - mean) * (in[i] - mean);
    double inverse = 1.0 / sqrt(block_sum(squares) / p.n + (double)p.epsilon);
    u32 start = blockIdx.x % p.groups * p.n;
    for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) {
        float scale = p.weight ? p.offset + p.weight[p.weight_per_element ? start + i : i] : 1.f;
        float shift = p.bias ? p.bias[p.bias_per_element ? start + i : i] : 0.f;
        out[i] = __fadd_rn(__fmul_rn((float)((in[i] - mean) * inverse), scale), shift);
    }
}

// ---- linear: out[row, o] = cap(scale * (input[row] . matrix[o] + bias[o])); a warp an output of
// eight rows, so that a weight is read once for eight rows. A row's sum does not depend on the
// other rows.

constexpr u32 LINEAR_ROWS = 8;

struct Linear {
    const float* input;
    const void* matrix;
    const float* bias;
    const u32* pick;  // the input row of each row, or null
    float* out;
    u32 rows, outputs, width;
    float scale, cap;
};

template <typename T>
__device__ inline void linear(const Linear& p) {
    u32 output = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (output >= p.outputs) return;
    u32 first = blockIdx.y * LINEAR_ROWS, rows = min(LINEAR_ROWS, p.rows - first);
    const T* matrix = (const T*)p.matrix + (size_t)output * p.width;
    const float* input[LINEAR_ROWS];
    float sum[LINEAR_ROWS];
#pragma unroll
    for (u32 r = 0; r < LINEAR_ROWS; r++) {
        u32 row = first + min(r, rows - 1);
        input[r] = p.input + (size_t)(p.pick ? p.pick[row] : row) * p.width;
        sum[r] = 0.f;
    }
    for (u32 i = lane; i < p.width; i += 32) {
        float weight = load(matrix, i);
#pragma unroll
        for (u32 r = 0; r < LINEAR_ROWS; r++) sum[r] += weight * input[r][i];
    }
#pragma unroll
    for (u32 r = 0; r < LINEAR_ROWS; r++) {
        float x = warp_sum(sum[r]) + (p.bias ? p.bias[output] : 0.f);
        if (lane == 0 && r < rows)
            p.out[(size_t)(first + r) * p.outputs + output] = soft_cap(x * p.scale, p.cap);
    }
}
extern "C" __global__ void linear_f32(const __grid_constant__ Linear p) { linear<float>(p); }
extern "C" __global__ void linear_bf16(const __grid_constant__ Linear p) {
    linear<__nv_bfloat16>(p);
}

// ---- hadamard: each block of n elements x becomes x H^T; H is given whole, [n, n]

struct HadamardBlocks {
    const float* input;
    const float* matrix;
    float* out;
    u32 n;
};

extern "C" __global__ void hadamard(const __grid_constant__ HadamardBlocks p) {
    extern __shared__ float x[];
    for (u32 i = threadIdx.x; i < p.n; i += blockDim.x)
        x[i] = p.input[(size_t)blockIdx.x * p.n + i];
    __syncthreads();
    for (u32 o = threadIdx.x; o < p.n; o += blockDim.x) {
        float sum = 0.f;
        // The matrix is stored transposed, so that neighbours read neighbours.
        for (u32 i = 0; i < p.n; i++) sum += x[i] * p.matrix[(size_t)i * p.n + o];
        p.out[(size_t)blockIdx.x * p.n + o] = sum;
    }
}

// ---- rope: a block a row; the angle is rounded to f32, its sine is exact

struct RopeTurn {
    const Row* rows;
    const float* input;
    const float* frequencies;  // [2, pairs]: of short and of long texts
    float* out;
    u32 heads, head_width, offset, pairs, interleaved;
    float magnitude;
};

extern "C" __global__ void rope(const __grid_constant__ RopeTurn p) {
    u32 width = p.heads * p.head_width, position = p.rows[blockIdx.x].position;
    const float* frequencies = p.frequencies + (p.rows[blockIdx.x].long_rope ? p.pairs : 0);
    const float* in = p.input + (size_t)blockIdx.x * width;
    float* out = p.out + (size_t)blockIdx.x * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
        u32 at = i % p.head_width;
        if (at < p.offset || at >= p.offset + 2 * p.pairs) out[i] = in[i];
    }
    for (u32 i = threadIdx.x; i < p.heads * p.pairs; i += blockDim.x) {
        u32 head = i / p.pairs, pair = i % p.pairs;
        double sin, cos;
        sincos((double)__fmul_rn((float)position, frequencies[pair]), &sin, &cos);
        float s = __fmul_rn((float)sin, p.magnitude), c = __fmul_rn((float)cos, p.magnitude);
        u32 a = head * p.head_width + p.offset + (p.interleaved ? 2 * pair : pair);
        u32 b = a + (p.interleaved ? 1 : p.pairs);
        float x = in[a], y = in[b];
        // Not fused, as the reference: a code of the cache may hang on the last bit.
        out[a] = __fsub_rn(__fmul_rn(x, c), __fmul_rn(y, s));
        out[b] = __fadd_rn(__fmul_rn(y, c), __fmul_rn(x, s));
    }
}

// ---- the cache: a block a row, a warp a vector

struct WriteKv {
    Cache cache;
    const Row* rows;
    const float* first;
    const float* second;
    u32 first_count, first_dim, second_count, second_dim;
};

template <int FORMAT>
__device__ inline void write_kv(const WriteKv& p) {
    Row row = p.rows[blockIdx.x];
    uint8_t* token = token_at(p.cache, row.sequence, row.cached + row.place);
    u32 first_bytes = vector_bytes<FORMAT>(p.first_dim),
        second_bytes = vector_bytes<FORMAT>(p.second_dim);
    for (u32 v = threadIdx.x / 32; v < p.first_count + p.second_count; v += blockDim.x / 32) {
        if (v < p.first_count) {
            const float* in = p.first + ((size_t)blockIdx.x * p.first_count + v) * p.first_dim;
            store_vector<FORMAT>(in, token + v * first_bytes, p.first_dim);
        } else {
            u32 w = v - p.first_count;
            const float* in = p.second + ((size_t)blockIdx.x * p.second_count + w) * p.second_dim;
            uint8_t* to = token + p.first_count * first_bytes + w * second_bytes;
            store_vector<FORMAT>(in, to, p.second_dim);
        }
    }
}

// ---- attend: a block of four warps a head of a row; each warp takes every fourth slot with a
// softmax of its own, and they are joined at the end

constexpr u32 ATTEND_WARPS = 4;

struct Attend {
    Cache cache;
    const Row* rows;
    const float* query;  // [rows, heads, key_dim]; latent: the turned queries [rows, heads, rank]
    const float* query_rope;  // latent: first rotary element of a row's first head, else null
    const float* sinks;
    float* out;  // [rows, heads, value_dim]
    u32 heads, kv_heads, key_dim, value_dim, rope_dim;
    u32 rope_stride, rope_head_stride;  // elements of a row and of a head in `query_rope`
    u32 window;                         // 0: none
    float scale, cap;
};

template <int FORMAT>
__device__ inline void attend(const Attend& p) {
    extern __shared__ float shared[];
    float* query = shared;
    float* sums = shared + p.key_dim + p.rope_dim;
    __shared__ float most_of[ATTEND_WARPS], total_of[ATTEND_WARPS];
    u32 index = blockIdx.x, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Row row = p.rows[index];
    for (u32 i = threadIdx.x; i < p.key_dim; i += blockDim.x)
        query[i] = p.query[((size_t)index * p.heads + head) * p.key_dim + i];
    for (u32 i = threadIdx.x; i < p.rope_dim; i += blockDim.x)
        query[p.key_dim + i] =
            p.query_rope[(size_t)index * p.rope_stride + head * p.rope_head_stride + i];
    float* sum = sums + warp * p.value_dim;
    for (u32 i = lane; i < p.value_dim; i += 32) sum[i] = 0.f;
    __syncthreads();

    u32 kv_head = head / (p.heads / p.kv_heads);
    u32 key_bytes = vector_bytes<FORMAT>(p.key_dim);
    u32 second = p.kv_heads * key_bytes;
    float most = -INFINITY, total = 0.f;
    u32 begin = p.window && row.position + 1 > p.window ? row.position + 1 - p.window : 0;
    // A tree's rows lie at slots behind `cached`, whatever their positions.
    if (row.tree) begin = min(begin, row.cached);
    u32 end = row.cached + (row.tree ? 64 : row.place + 1);
    // A slot always goes to the same warp, so that no schedule changes the order of a sum.
    for (u32 slot = begin / ATTEND_WARPS * ATTEND_WARPS + warp; slot < end; slot += ATTEND_WARPS) {
        if (slot < begin) continue;
        u32 position = slot;
        if (slot >= row.cached && row.tree) {
            u32 other = slot - row.cached;
            if (!(row.ancestors >> other & 1)) continue;
            position = p.rows[row.first_row + other].position;
        }
        if (p.window && position + p.window <= row.position) continue;
        const uint8_t* token = token_at(p.cache, row.sequence, slot);
        const uint8_t* key = token + kv_head * key_bytes;
        float key_scale = vector_scale<FORMAT>(key), dot = 0.f;
        for (u32 i = lane; i < p.key_dim; i += 32)
            dot += query[i] * element<FORMAT>(key, i, key_scale);
        const uint8_t* value = key;
        if (p.rope_dim) {
            const uint8_t* rope_key = token + second;
            float scale = vector_scale<FORMAT>(rope_key);
            for (u32 i = lane; i < p.rope_dim; i += 32)
                dot += query[p.key_dim + i] * element<FORMAT>(rope_key, i, scale);
        } else {
            value = token + second + kv_head * vector_bytes<FORMAT>(p.value_dim);
        }
        float score = soft_cap(warp_sum(dot) * p.scale, p.cap);
        float raised = fmaxf(most, score);
        float keep = expf(most - raised), weight = expf(score - raised);
        most = raised;
        total = total * keep + weight;
        float value_scale = vector_scale<FORMAT>(value);
        for (u32 i = lane; i < p.value_dim; i += 32)
            sum[i] = sum[i] * keep + weight * element<FORMAT>(value, i, value_scale);
    }
    if (lane == 0) {
        most_of[warp] = most;
        total_of[warp] = total;
    }
    __syncthreads();

    float sink = p.sinks ? p.sinks[head] : -INFINITY;
    float all = sink;
    for (u32 w = 0; w < ATTEND_WARPS; w++) all = fmaxf(all, most_of[w]);
    float denominator = p.sinks ? expf(sink - all) : 0.f;
    for (u32 w = 0; w < ATTEND_WARPS; w++) denominator += total_of[w] * expf(most_of[w] - all);
    float* out = p.out + ((size_t)index * p.heads + head) * p.value_dim;
    for (u32 i = threadIdx.x; i < p.value_dim; i += blockDim.x) {
        float x = 0.f;
        for (u32 w = 0; w < ATTEND_WARPS; w++)
            x += sums[w * p.value_dim + i] * expf(most_of[w] - all);
        out[i] = x / denominator;
    }
}

// ---- latent attention's products: queries into latent space, and sums of latents out of it

struct LatentTurn {
    const float* query;
    const void* key_up;
    float* out;
    u32 heads, query_dim, nope_dim, rank;
};

template <typename T>
__device__ inline void latent_turn(const LatentTurn& p) {
    size_t index = (size_t)blockIdx.x * p.heads + blockIdx.y;
    const float* query = p.query + index * p.query_dim;
    const T* key_up = (const T*)p.key_up + (size_t)blockIdx.y * p.nope_dim * p.rank;
    for (u32 r = threadIdx.x; r < p.rank; r += blockDim.x) {
        float sum = 0.f;
        for (u32 n = 0; n < p.nope_dim; n++) sum += query[n] * load(key_up, (size_t)n * p.rank + r);
        p.out[index * p.rank + r] = sum;
    }
}
extern "C" __global__ void latent_turn_f32(const __grid_constant__ LatentTurn p) {
    latent_turn<float>(p);
}
extern "C" __global__ void latent_turn_bf16(const __grid_constant__ LatentTurn p) {
    latent_turn<__nv_bfloat16>(p);
}

struct LatentMix {
    const float* mixed;  // [rows, heads, rank]
    const void* value_up;
    float* out;
    u32 heads, value_dim, rank;
};

template <typename T>
__device__ inline void latent_mix(const LatentMix& p) {
    size_t index = (size_t)blockIdx.x * p.heads + blockIdx.y;
    const float* mixed = p.mixed + index * p.rank;
    const T* value_up = (const T*)p.value_up + (size_t)blockIdx.y * p.value_dim * p.rank;
    for (u32 v = threadIdx.x / 32; v < p.value_dim; v += blockDim.x / 32) {
        float sum = 0.f;
        for (u32 r = threadIdx.x % 32; r < p.rank; r += 32)
            sum += mixed[r] * load(value_up, (size_t)v * p.rank + r);
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) p.out[index * p.value_dim + v] = sum;
    }
}
extern "C" __global__ void latent_mix_f32(const __grid_constant__ LatentMix p) {
    latent_mix<float>(p);
}
extern "C" __global__ void latent_mix_bf16(const __grid_constant__ LatentMix p) {
    latent_mix<__nv_bfloat16>(p);
}

// ---- elementwise

struct Activate {
    const float* gate;
    const float* up;
    float* out;
    u64 elements;
    u32 kind;
    float alpha, limit;
};

extern "C" __global__ void activate(const __grid_constant__ Activate p) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.elements) p.out[i] = activation(p.kind, p.gate[i], p.up[i], p.alpha, p.limit);
}

struct AddScaled {
    const float* left;
    const float* right;
    float* out;
    u64 elements;
    float scale;
};

extern "C" __global__ void add_scaled(const __grid_constant__ AddScaled p) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.elements) p.out[i] = __fadd_rn(p.left[i], __fmul_rn(p.right[i], p.scale));
}

struct GateRows {
    const float* input;
    const float* gate;
    float* out;
    u64 elements;
    u32 run;  // neighbours that share a gate
};

extern "C" __global__ void gate_sigmoid(const __grid_constant__ GateRows p) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.elements) p.out[i] = p.input[i] * sigmoid(p.gate[i / p.run]);
}

struct SliceRows {
    const float* input;
    float* out;
    u64 elements;
    u32 width_in, width_out, start;
};

extern "C" __global__ void slice(const __grid_constant__ SliceRows p) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.elements)
        p.out[i] = p.input[i / p.width_out * p.width_in + p.start + i % p.width_out];
}

// ---- route: a warp a row. Sums run in the reference's order, by one lane, so that a choice does
// not hang on rounding

struct RouteRows {
    const float* logits;
    const float* correction;
    u32* experts_out;
    float* weights_out;
    u32 experts, per_token, score, normalise, groups, groups_kept, top_two;
    float scaling;
};

enum Score { SOFTMAX = 0, SOFTMAX_OF_CHOSEN = 1, SIGMOID = 2 };

// The index of the largest of n, the lowest on ties; every lane gets it.
__device__ inline u32 warp_best(const float* x, u32 n) {
    float most = -INFINITY;
    u32 at = 0xffffffffu;
    for (u32 i = threadIdx.x % 32; i < n; i += 32)
        if (at == 0xffffffffu || x[i] > most) {
            most = x[i];
            at = i;
        }
    for (int step = 16; step > 0; step >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, most, step);
        u32 index = __shfl_xor_sync(0xffffffffu, at, step);
        bool better = index != 0xffffffffu &&
                      (at == 0xffffffffu || other > most || (other == most && index < at));
        if (better) {
            most = other;
            at = index;
        }
    }
    return at;
}

__device__ inline void softmax_of(const float* in, float* out, u32 n) {
    float most = -INFINITY;
    for (u32 i = 0; i < n; i++) most = fmaxf(most, in[i]);
    double sum = 0;
    for (u32 i = 0; i < n; i++) sum += exp((double)(in[i] - most));
    for (u32 i = 0; i < n; i++) out[i] = (float)(exp((double)(in[i] - most)) / sum);
}

extern "C" __global__ void route(const __grid_constant__ RouteRows p) {
    extern __shared__ float shared[];
    float* scores = shared;
    float* preference = scores + p.experts;
    float* group_score = preference + p.experts;
    float* kept = group_score + p.groups;
    float* chosen = kept + p.groups;
    u32 lane = threadIdx.x;
    const float* logits = p.logits + (size_t)blockIdx.x * p.experts;
    if (p.score == SOFTMAX) {
        if (lane == 0) softmax_of(logits, scores, p.experts);
    } else {
        for (u32 i = lane; i < p.experts; i += 32)
            scores[i] = p.score == SIGMOID ? sigmoid(logits[i]) : logits[i];
    }
    __syncwarp();
    for (u32 i = lane; i < p.experts; i += 32)
        preference[i] = scores[i] + (p.correction ? p.correction[i] : 0.f);
    __syncwarp();
    if (p.groups) {
        u32 size = p.experts / p.groups;
        for (u32 g = lane; g < p.groups; g += 32) {
            float best = -INFINITY, next = -INFINITY;
            for (u32 i = g * size; i < (g + 1) * size; i++) {
                float x = preference[i];
                if (x > best) {
                    next = best;
                    best = x;
                } else if (x > next)
                    next = x;
            }
            group_score[g] = p.top_two && size > 1 ? best + next : best;
            kept[g] = 0.f;
        }
        __syncwarp();
        for (u32 n = 0; n < p.groups_kept; n++) {
            u32 g = warp_best(group_score, p.groups);
            __syncwarp();
            if (lane == 0) {
                kept[g] = 1.f;
                group_score[g] = -INFINITY;
            }
            __syncwarp();
        }
        for (u32 i = lane; i < p.experts; i += 32)
            if (kept[i / size] == 0.f) preference[i] = -INFINITY;
        __syncwarp();
    }
    u32* experts = p.experts_out + (size_t)blockIdx.x * p.per_token;
    float* weights = p.weights_out + (size_t)blockIdx.x * p.per_token;
    for (u32 n = 0; n < p.per_token; n++) {
        u32 expert = warp_best(preference, p.experts);
        __syncwarp();
        if (lane == 0) {
            experts[n] = expert;
            chosen[n] = scores[expert];
            preference[expert] = -INFINITY;
        }
        __syncwarp();
    }
    if (lane != 0) return;
    if (p.score == SOFTMAX_OF_CHOSEN) softmax_of(chosen, chosen, p.per_token);
    float sum = 1.f;
    if (p.normalise) {
        sum = 0.f;
        for (u32 n = 0; n < p.per_token; n++) sum += chosen[n];
        sum += 1e-20f;
    }
    for (u32 n = 0; n < p.per_token; n++) weights[n] = __fdiv_rn(chosen[n], sum) * p.scaling;
}

// ---- experts: a warp an output. A choice of another rank's expert adds nothing

struct Experts {
    const float* input;  // gate and up: [rows, width]; down: [rows * per_token, width]
    const u32* experts;
    const float* weights;
    const void* first;   // gate, or down
    const void* second;  // up
    const float* first_bias;
    const float* second_bias;
    float* out;  // [rows * per_token, outputs], or [rows, outputs]
    u32 per_token, width, outputs, first_expert, held, weigh_input, kind;
    float alpha, limit;
};

template <typename T>
__device__ inline void experts_gate_up(const Experts& p) {
    u32 output = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, slot = blockIdx.y,
        lane = threadIdx.x % 32;
    if (output >= p.outputs) return;
    u32 expert = p.experts[slot] - p.first_expert;
    float* out = p.out + (size_t)slot * p.outputs + output;
    if (expert >= p.held) {
        if (lane == 0) *out = 0.f;
        return;
    }
    size_t row = (size_t)expert * p.outputs + output;
    const float* input = p.input + (size_t)(slot / p.per_token) * p.width;
    const T* gate_row = (const T*)p.first + row * p.width;
    const T* up_row = (const T*)p.second + row * p.width;
    float weight = p.weigh_input ? p.weights[slot] : 1.f, gate = 0.f, up = 0.f;
    for (u32 i = lane; i < p.width; i += 32) {
        float x = __fmul_rn(input[i], weight);
        gate += load(gate_row, i) * x;
        up += load(up_row, i) * x;
    }
    gate = warp_sum(gate) + (p.first_bias ? p.first_bias[row] : 0.f);
    up = warp_sum(up) + (p.second_bias ? p.second_bias[row] : 0.f);
    if (lane == 0) *out = activation(p.kind, gate, up, p.alpha, p.limit);
}
extern "C" __global__ void experts_gate_up_f32(const __grid_constant__ Experts p) {
    experts_gate_up<float>(p);
}
extern "C" __global__ void experts_gate_up_bf16(const __grid_constant__ Experts p) {
    experts_gate_up<__nv_bfloat16>(p);
}

template <typename T>
__device__ inline void experts_down(const Experts& p) {
    u32 output = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (output >= p.outputs) return;
    float sum = 0.f;
    for (u32 n = 0; n < p.per_token; n++) {
        u32 slot = blockIdx.y * p.per_token + n, expert = p.experts[slot] - p.first_expert;
        if (expert >= p.held) continue;
        size_t row = (size_t)expert * p.outputs + output;
        const float* input = p.input + (size_t)slot * p.width;
        const T* matrix = (const T*)p.first + row * p.width;
        float dot = 0.f;
        for (u32 i = lane; i < p.width; i += 32) dot += load(matrix, i) * input[i];
        dot = warp_sum(dot) + (p.first_bias ? p.first_bias[row] : 0.f);
        sum = __fadd_rn(sum, __fmul_rn(p.weigh_input ? 1.f : p.weights[slot], dot));
    }
    if (lane == 0) p.out[(size_t)blockIdx.y * p.outputs + output] = sum;
}
extern "C" __global__ void experts_down_f32(const __grid_constant__ Experts p) {
    experts_down<float>(p);
}
extern "C" __global__ void experts_down_bf16(const __grid_constant__ Experts p) {
    experts_down<__nv_bfloat16>(p);
}

#define CACHE_KERNELS(name, FORMAT)                                                 \
    extern "C" __global__ void write_kv_##name(const __grid_constant__ WriteKv p) { \
        write_kv<FORMAT>(p);                                                        \
    }                                                                               \
    extern "C" __global__ void attend_##name(const __grid_constant__ Attend p) {    \
        attend<FORMAT>(p);                                                          \
    }
CACHE_KERNELS(f32, F32)
CACHE_KERNELS(f16, F16)
CACHE_KERNELS(bf16, BF16)
CACHE_KERNELS(int16, INT16)
CACHE_KERNELS(fp8, FP8)
CACHE_KERNELS(int8, INT8)
