"""What Lathe's scaled formats are checked against: casts by `ml_dtypes` and `torch`, and signal-to-noise ratios in float64.

usage: scaled_formats.py --fixtures        (needs numpy, ml_dtypes, torch; run from anywhere)

Writes two files for crates/tensor/tests/scaled_formats.rs:
- tests/fixtures/tensor/casts.safetensors: for each small float, numbers (every value, every midpoint between neighbours and the
  float32 on either side of it, denormals, numbers beyond the largest) and the codes that `ml_dtypes` rounds them to after
  clamping to the largest finite value; where torch has the type, it agrees.
- tests/fixtures/tensor/sqnr.json: decibels of signal over quantization noise for Gaussian and Laplace numbers in many formats,
  computed here from the formats' definitions in float64, with nothing shared with the Rust code but the random numbers.
"""

import argparse
import json
import pathlib

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file

FIXTURES = pathlib.Path(__file__).resolve().parents[2] / "tests/fixtures/tensor"
FLOATS = {
    "f8e4m3": (ml_dtypes.float8_e4m3fn, 448.0, torch.float8_e4m3fn),
    "f8e5m2": (ml_dtypes.float8_e5m2, 57344.0, torch.float8_e5m2),
    "f6e2m3": (ml_dtypes.float6_e2m3fn, 7.5, None),
    "f6e3m2": (ml_dtypes.float6_e3m2fn, 28.0, None),
    "f4e2m1": (ml_dtypes.float4_e2m1fn, 6.0, None),
}
MANTISSA = {"f8e4m3": 3, "f8e5m2": 2, "f6e2m3": 3, "f6e3m2": 2, "f4e2m1": 1}


def finite_values(kind):
    """The non-negative finite values, ascending, in float64."""
    dtype, largest, _ = FLOATS[kind]
    bits = {"f8": 8, "f6": 6, "f4": 4}[kind[:2]]
    values = np.arange(2 ** (bits - 1), dtype=np.uint8).view(dtype).astype(np.float64)
    return values[np.isfinite(values) & (values <= largest)]


def casts():
    out = {}
    for kind, (dtype, largest, torch_dtype) in FLOATS.items():
        values = finite_values(kind)
        middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
        numbers = [values.astype(np.float32), middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9)),
                   np.float32([1e-45, 1e-39, 1e-30, largest * 1.01, largest * 1.2, 1e20, np.inf])]
        numbers = np.concatenate(numbers).astype(np.float32)
        numbers = np.concatenate([numbers, -numbers])
        clamped = np.clip(numbers, -largest, largest)
        codes = clamped.astype(dtype).view(np.uint8)
        if torch_dtype is not None:
            assert np.array_equal(codes, torch.from_numpy(clamped).to(torch_dtype).view(torch.uint8).numpy()), kind
        out[f"{kind}.numbers"], out[f"{kind}.codes"] = numbers, codes
    save_file(out, FIXTURES / "casts.safetensors")


def uniform(seed, count):
    """SplitMix64, in (0, 1)."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def samples():
    count, shape = 1 << 19, (512, 1024)
    gaussian = np.sqrt(-2 * np.log(uniform(1, count))) * np.cos(2 * np.pi * uniform(2, count))
    u = uniform(3, count) - 0.5
    laplace = -np.sign(u) * np.log(1 - 2 * np.abs(u))
    return {"gaussian": gaussian.astype(np.float32).reshape(shape), "laplace": laplace.astype(np.float32).reshape(shape)}


def round_scale(scale, kind):
    if kind == "f32":
        return scale.astype(np.float32).astype(np.float64)
    dtype = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn}[kind]
    return scale.astype(np.float32).astype(dtype).astype(np.float64)


def nearest(x, values):
    """The nearest of +-values; ties hardly occur."""
    magnitude = np.abs(x)
    i = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    pick = np.where(magnitude - values[i - 1] < values[i] - magnitude, values[i - 1], values[i])
    return np.sign(x) * pick


def blocks_of(x, block):
    """x as [blocks, elements] and the way back."""
    rows, columns = x.shape
    if block == "tensor":
        return x.reshape(1, -1)
    if block == "channel":
        return x
    if block.startswith("tile"):
        r, c = map(int, block[4:].split("x"))
        return x.reshape(rows // r, r, columns // c, c).transpose(0, 2, 1, 3).reshape(-1, r * c)
    return x.reshape(-1, int(block[1:]))


def integer(x, bits, scale_kind, asymmetric):
    levels = 2**bits - 1
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    if asymmetric:
        scale = round_scale((high - low) / levels, scale_kind)
        zero = np.clip(np.round(bottom - low / scale), bottom, top)
    else:
        scale, zero = round_scale(np.maximum(high, -low) / (levels / 2), scale_kind), 0
    return (np.clip(np.round(x / scale) + zero, bottom, top) - zero) * scale


def power(x, kind, rounding):
    largest_value = FLOATS[kind][1]
    top = np.floor(np.log2(largest_value))
    largest = np.abs(x).max(1, keepdims=True)
    floor = np.floor(np.log2(largest)) - top
    values = finite_values(kind)
    if rounding == "floor":
        exponent = floor
    elif rounding == "ceil":
        exponent = np.ceil(np.log2(largest / largest_value))
    elif rounding == "even":
        half_step = 2.0 ** (np.floor(np.log2(largest)) - MANTISSA[kind] - 1)
        exponent = np.floor(np.log2(largest + half_step)) - top
    else:
        candidates = [floor - 1, floor, floor + 1]
        errors = [((nearest(x / 2**e, values) * 2**e - x) ** 2).sum(1) for e in candidates]
        exponent = np.choose(np.argmin(errors, axis=0)[:, None], candidates)
    return nearest(x / 2**exponent, values) * 2**exponent


def quantized(x, name, rounding):
    parts = name.removesuffix("-asym").split("-")
    kind, block, scale_kind = parts
    whole = np.abs(x).max()
    x = blocks_of(x, block)
    if kind.startswith("int"):
        return x, integer(x, int(kind[3:]), scale_kind, name.endswith("-asym"))
    if scale_kind == "e8m0":
        return x, power(x, kind, rounding)
    largest, values = np.abs(x).max(1, keepdims=True), finite_values(kind)
    if scale_kind == "e4m3global":
        whole = whole / (448 * FLOATS[kind][1])
        scale = np.maximum(round_scale(largest / FLOATS[kind][1] / whole, "e4m3"), 2.0**-9) * whole
    else:
        scale = round_scale(largest / FLOATS[kind][1], scale_kind)
    return x, nearest(x / scale, values) * scale


GRID = [f"int{bits}-{block}-f32{zero}" for bits in (8, 4, 3, 2) for block in ("tensor", "channel", "g64") for zero in ("", "-asym")]
FORMATS = [*GRID, "int8-channel-bf16-asym", "int7-g64-f16", "int6-g64-f32-asym", "int5-g32-f16",
           "int4-g128-bf16", "int4-g128-f16-asym", "int4-g32-f16", "int3-g64-f16", "int3-g64-f16-asym", "int2-g32-f16", "int2-g32-f16-asym",
           "f8e4m3-tensor-f32", "f8e4m3-channel-f32", "f8e5m2-tensor-f32", "f8e5m2-channel-f32", "f8e4m3-tile128x128-f32", "f8e4m3-g128-f32",
           "f8e4m3-g32-e8m0", "f8e5m2-g32-e8m0", "f6e2m3-g32-e8m0", "f6e3m2-g32-e8m0", "f4e2m1-g32-e8m0", "f4e2m1-g16-e4m3global"]


def sqnr():
    table = {}
    for source, data in samples().items():
        for name in FORMATS:
            for rounding in ["floor", "ceil", "even", "mse"] if "e8m0" in name else ["floor"]:
                x, q = quantized(data.astype(np.float64), name, rounding)
                key = f"{name}/{rounding}" if "e8m0" in name else name
                table.setdefault(source, {})[key] = round(10 * float(np.log10((x**2).sum() / ((q - x) ** 2).sum())), 3)
    (FIXTURES / "sqnr.json").write_text(json.dumps(table, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", action="store_true", required=True, help="write the files")
    parser.parse_args()
    casts()
    sqnr()


if __name__ == "__main__":
    main()
