// What the products with weights in fragment order share.
#pragma once

#include "barrier.cuh"

constexpr u32 BLOCK_COLUMNS = 32, TILE = 16;

// Weights: tiles of 16 outputs, then blocks of 32 columns. A lane's 16 bytes hold its registers of
// one product of 16 columns as bf16, of two as e4m3, of four as four-bit integers. Integers lie in
// chunks of 1024 columns, and the scales of a chunk's groups follow its codes: [group, 16 outputs].
enum Format { PACKED_BF16 = 0, PACKED_FP8 = 1, PACKED_INT4 = 2 };

template <u32 FORMAT>
__host__ __device__ constexpr u32 block_bytes() {
    return FORMAT == PACKED_BF16 ? 1024 : FORMAT == PACKED_FP8 ? 512 : 256;
}
// Products of 16 columns that 16 bytes of a lane hold.
template <u32 FORMAT>
__host__ __device__ constexpr u32 steps_of() {
    return 1u << FORMAT;
}

constexpr u32 INT4_CHUNK_BLOCKS = 32, INT4_CHUNK_CODES = 8192, GROUP_SCALE_BYTES = TILE * 2;

// Bytes 1 and 3 of e4m3 as two bf16, divided by 2^120: exponents keep their bits, so that
// subnormal numbers stay what they are. Activations are multiplied by 2^96, so that sums stay far
// from the ends of f32, and scales of outputs by 2^24.
constexpr float FP8_ACTIVATIONS = 7.9228162514264337593543950336e28f;
__device__ inline u32 widen_fp8(u32 w) { return (w >> 4 & 0x07f007f0u) | (w & 0x80008000u); }

// Nibbles n and n + 4 as two bf16, less 8: bits of 128 + nibble, then less 136.
__device__ inline u32 widen_int4(u32 w, u32 n) {
    u32 bits, offset = 0x43084308u;
    // (w >> 4 n & mask) | 128
    asm("lop3.b32 %0, %1, %2, %3, 0xea;"
        : "=r"(bits)
        : "r"(w >> 4 * n), "r"(0x000f000fu), "r"(0x43004300u));
    __nv_bfloat162 x = __hsub2(*(__nv_bfloat162*)&bits, *(__nv_bfloat162*)&offset);
    return *(u32*)&x;
}

// The four registers of product `step` of a lane's 16 bytes.
template <u32 FORMAT>
__device__ inline void widen(uint4 v, u32 step, u32 (&a)[4]) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    if (FORMAT == PACKED_BF16) {
#pragma unroll
        for (u32 n = 0; n < 4; n++) a[n] = words[n];
    } else if (FORMAT == PACKED_FP8) {
#pragma unroll
        for (u32 n = 0; n < 4; n++) a[n] = widen_fp8(words[2 * step + n / 2] << n % 2 * 8);
    } else {
#pragma unroll
        for (u32 n = 0; n < 4; n++) a[n] = widen_int4(words[step], n);
    }
}

// Two neighbours' high and low parts.
__device__ inline void split(float x, float y, u32& high, u32& low) {
    __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
    __nv_bfloat162 l = __floats2bfloat162_rn(x - __low2float(h), y - __high2float(h));
    high = *(u32*)&h;
    low = *(u32*)&l;
}

struct Segment {
    const uint8_t* matrix;
    const float* scales;  // of outputs, or null
    const float* bias;
    float* out;  // [rows, outputs]
    u32 outputs, tiles;
};

struct Stream {
    Segment segments[3];
    const float* input;
    const float* norm;      // weight of an RMS norm of the input, or null
    const float* residual;  // added to the product, or null
    const u32* pick;        // the input row of each row, or null
    u32 width, count, stages, normed;
    u32 paired;  // 1: segments 0 and 1 are gate and up, and the activation goes to 0's output
    u32 kind;
    float alpha, limit;
    float scale, cap, add_scale, offset, epsilon;
    u32 tile_bytes;
    // int4: units of 64 columns that share a scale (0: all), and whether scales are f16, not bf16.
    u32 group_units, half_scales;
};

__device__ inline float scale_of(const Segment& to, u32 output) {
    return to.scales ? to.scales[output] : 1.f;
}

// A scale of a group.
__device__ inline float group_scale(u32 bits, u32 half) {
    return half ? __half2float(__ushort_as_half(bits)) : __uint_as_float(bits << 16);
}

// The group of a unit; groups have one, two, four, eight or 16 units.
__device__ inline u32 group_of(u32 unit, u32 group_units) {
    return unit >> (31 - __clz(group_units));
}

// int4: bytes of a chunk, and where the scales of a chunk's groups begin.
__device__ inline u32 int4_scale_bytes(u32 units, u32 group_units) {
    return group_units ? (group_of(units - 1, group_units) + 1) * GROUP_SCALE_BYTES : 0;
}
__device__ inline u32 int4_chunk_bytes(u32 group_units) {
    return INT4_CHUNK_CODES + int4_scale_bytes(INT4_CHUNK_BLOCKS / 2, group_units);
}
// Where in a tile the scales of a chunk's groups begin.
__device__ inline u32 int4_scales(u32 chunk, u32 width, u32 group_units) {
    u32 units = min(INT4_CHUNK_BLOCKS / 2, width / 64 - chunk * (INT4_CHUNK_BLOCKS / 2));
    return chunk * int4_chunk_bytes(group_units) + units * 2 * block_bytes<PACKED_INT4>();
}

// The segment of a tile, counted over all segments, and the tile in it.
__device__ inline u32 locate(const Stream& p, u32 index, u32& tile) {
    u32 segment = 0;
    tile = index;
    while (segment + 1 < p.count && tile >= p.segments[segment].tiles)
        tile -= p.segments[segment++].tiles;
    return segment;
}

// SwiGLU in f32. Below -88 the quotient is minus zero, as its limit.
__device__ inline float swiglu(float gate, float up) {
    return __fdividef(gate, 1.f + __expf(-gate)) * up;
}

// Does what follows a product and writes the output; `sum` are those of gate and up where paired.
__device__ inline void finish(const Stream& p, const Segment& to, u64 row, u32 output,
                              const float* sum) {
    float value = sum[0] * scale_of(to, output) + (to.bias ? to.bias[output] : 0.f);
    u64 place = row * to.outputs + output;
    if (p.paired) {
        const Segment& second = p.segments[1];
        float up = sum[1] * scale_of(second, output) + (second.bias ? second.bias[output] : 0.f);
        value = activation(p.kind, value, up, p.alpha, p.limit);
    } else {
        value = soft_cap(value * p.scale, p.cap);
        if (p.residual)
            value = __fadd_rn(__ldcg(p.residual + place), __fmul_rn(value, p.add_scale));
    }
    to.out[place] = value;
}
