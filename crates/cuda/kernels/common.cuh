// What the kernels share: rows of a step, the paged cache, activations.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

typedef unsigned long long u64;
typedef uint32_t u32;

// A row of the step.
struct Row {
    u64 ancestors;  // bit j: sees row j of its sequence; only where `tree` is 1
    u32 token, position, first_row, place, cached, sequence, tree;
    u32 choice;     // 1 + the choice of the step before whose token this is; 0: `token` is
    u32 long_rope;  // 1: turns by the frequencies of long texts
    u32 unused;
};

// The row's token; `chosen` are those of the step before, all bits set where there is none.
__device__ inline u32 token_of(const Row& row, const u32* chosen) {
    if (row.choice == 0) return row.token;
    u32 token = chosen[row.choice - 1];
    return token == 0xffffffffu ? 0 : token;
}

__device__ inline float load(const float* p, size_t i) { return p[i]; }
__device__ inline float load(const __nv_bfloat16* p, size_t i) { return __bfloat162float(p[i]); }

// A kernel that calls both may be launched while the kernel before it still runs: it reads what
// others write after `wait_dependencies` alone.
__device__ inline void launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ inline void wait_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ inline float warp_sum(float x) {
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ inline float soft_cap(float x, float cap) {
    return cap > 0.f ? cap * tanhf(x / cap) : x;
}

// ---- the paged cache: page, layer's part, position, then the first and the second vectors, each
// with its f32 scale before its codes

enum KvFormat { F32 = 0, F16 = 1, BF16 = 2, INT16 = 3, FP8 = 4, INT8 = 5 };

struct Cache {
    uint8_t* pool;
    const u32* tables;  // [sequence, group, stride] page numbers
    const u32* firsts;  // [sequence, group] first block held
    u64 page_bytes, layer_offset;
    u32 groups, group, stride, block_tokens, token_bytes;
};

__device__ inline uint8_t* token_at(const Cache& c, u32 sequence, u32 slot) {
    u32 table = sequence * c.groups + c.group;
    u32 page = c.tables[(size_t)table * c.stride + slot / c.block_tokens - c.firsts[table]];
    return c.pool + page * c.page_bytes + c.layer_offset +
           (size_t)(slot % c.block_tokens) * c.token_bytes;
}

template <int FORMAT>
__device__ inline u32 vector_bytes(u32 n) {
    if (FORMAT == F32) return 4 * n;
    if (FORMAT == F16 || FORMAT == BF16) return 2 * n;
    return FORMAT == INT16 ? 2 * n + 4 : n + 4;
}

// Vectors may begin at any byte: numbers of several bytes are put together.
__device__ inline u32 bytes2(const uint8_t* p) { return p[0] | (u32)p[1] << 8; }
__device__ inline u32 bytes4(const uint8_t* p) { return bytes2(p) | bytes2(p + 2) << 16; }
__device__ inline void put2(uint8_t* p, u32 x) {
    p[0] = x;
    p[1] = x >> 8;
}
__device__ inline void put4(uint8_t* p, u32 x) {
    put2(p, x);
    put2(p + 2, x >> 16);
}

template <int FORMAT>
__device__ inline float vector_scale(const uint8_t* vector) {
    return FORMAT >= INT16 ? __uint_as_float(bytes4(vector)) : 1.f;
}

template <int FORMAT>
__device__ inline float element(const uint8_t* vector, u32 i, float scale) {
    if (FORMAT == F32) return ((const float*)vector)[i];
    if (FORMAT == F16) return __half2float(((const __half*)vector)[i]);
    if (FORMAT == BF16) return __bfloat162float(((const __nv_bfloat16*)vector)[i]);
    if (FORMAT == INT16) return (float)(int16_t)bytes2(vector + 4 + 2 * i) * scale;
    if (FORMAT == INT8) return (float)(int8_t)vector[4 + i] * scale;
    __nv_fp8_e4m3 code;
    code.__x = vector[4 + i];
    return (float)code * scale;
}

// A warp stores a vector.
template <int FORMAT>
__device__ inline void store_vector(const float* in, uint8_t* vector, u32 n) {
    u32 lane = threadIdx.x % 32;
    float inverse = 0.f;
    float code_max = FORMAT == INT16 ? 32767.f : FORMAT == FP8 ? 448.f : 127.f;
    if (FORMAT >= INT16) {
        float most = 0.f;
        for (u32 i = lane; i < n; i += 32) most = fmaxf(most, fabsf(in[i]));
        for (int step = 16; step > 0; step >>= 1)
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
        float scale = __fdiv_rn(most, code_max);
        inverse = scale > 0.f ? __fdiv_rn(1.f, scale) : 0.f;
        if (lane == 0) put4(vector, __float_as_uint(scale));
    }
    for (u32 i = lane; i < n; i += 32) {
        float x = in[i];
        if (FORMAT == F32) ((float*)vector)[i] = x;
        if (FORMAT == F16) ((__half*)vector)[i] = __float2half_rn(x);
        if (FORMAT == BF16) ((__nv_bfloat16*)vector)[i] = __float2bfloat16_rn(x);
        if (FORMAT >= INT16) {
            float code = fminf(fmaxf(__fmul_rn(x, inverse), -code_max), code_max);
            if (FORMAT == INT16) put2(vector + 4 + 2 * i, (u32)(uint16_t)(int16_t)roundf(code));
            if (FORMAT == INT8) vector[4 + i] = (uint8_t)(int8_t)roundf(code);
            if (FORMAT == FP8)
                vector[4 + i] = __nv_cvt_float_to_fp8(code, __NV_SATFINITE, __NV_E4M3);
        }
    }
}

// ---- activations

__device__ inline float sigmoid(float x) { return (float)(1.0 / (1.0 + exp(-(double)x))); }

enum ActivationKind {
    SWIGLU = 0,
    GEGLU_TANH = 1,
    GEGLU_ERF = 2,
    SWIGLU_CLAMPED = 3,
    SILU = 4,
    GELU_TANH = 5,
    RELU_SQUARED = 6
};

__device__ inline float gelu_tanh(float gate) {
    double x = gate, inner = 0.79788456080286535588 * (x + 0.044715 * x * x * x);
    return (float)(0.5 * x * (1.0 + tanh(inner)));
}

__device__ inline float activation(u32 kind, float gate, float up, float alpha, float limit) {
    switch (kind) {
        case SWIGLU: return gate * sigmoid(gate) * up;
        case GEGLU_TANH: return gelu_tanh(gate) * up;
        case GEGLU_ERF:
            return (float)(0.5 * gate * (1.0 + erf((double)gate * 0.70710678118654752440))) * up;
        case SWIGLU_CLAMPED: {
            gate = fminf(gate, limit);
            return gate * sigmoid(alpha * gate) * (fminf(fmaxf(up, -limit), limit) + 1.f);
        }
        case SILU: return gate * sigmoid(gate);
        case GELU_TANH: return gelu_tanh(gate);
        default: gate = fmaxf(gate, 0.f); return gate * gate;
    }
}
