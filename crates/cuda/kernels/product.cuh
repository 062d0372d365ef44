// What the products with bf16 weights in fragment order share.
#pragma once

#include "barrier.cuh"

constexpr u32 BLOCK_BYTES = 1024, BLOCK_COLUMNS = 32, TILE = 16;

// Two neighbours' high and low parts.
__device__ inline void split(float x, float y, u32& high, u32& low) {
    __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
    __nv_bfloat162 l = __floats2bfloat162_rn(x - __low2float(h), y - __high2float(h));
    high = *(u32*)&h;
    low = *(u32*)&l;
}

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

// The segment of a tile, counted over all segments, and the tile in it.
__device__ inline u32 locate(const Stream& p, u32 index, u32& tile) {
    u32 segment = 0;
    tile = index;
    while (segment + 1 < p.count && tile >= p.segments[segment].tiles) tile -= p.segments[segment++].tiles;
    return segment;
}

// SwiGLU in f32. Below -88 the quotient is minus zero, as its limit.
__device__ inline float swiglu(float gate, float up) {
    return __fdividef(gate, 1.f + __expf(-gate)) * up;
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
