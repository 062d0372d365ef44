"""What Lathe's formats of activations and powers of two of MX blocks are checked against: compressed-tensors and torchao.

usage: activation_formats.py        (needs numpy, torch, safetensors, compressed-tensors 0.20, torchao 0.18; run from anywhere)

Writes tests/fixtures/tensor/activations.safetensors for crates/tensor/tests/activations.rs:
- `rows`: [n, 64] numbers: random ones of very different sizes, ties, numbers that saturate, denormals, zeros, a NaN;
- for each format of activations its name, with the same rows as compressed-tensors' dynamic quantization and dequantization give
  them (NVFP4 with a global scale made of each row);
- `mxfp4.floor`, `mxfp4.ceil`, `mxfp4.even` and the same for `mxfp8`: as torchao's reference for MX formats gives them.
"""

import pathlib

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam
from safetensors.numpy import save_file
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/fixtures/tensor/activations.safetensors"
WIDTH = 64
MX = dict(type="float", strategy="group", group_size=32, dynamic=True, scale_dtype=torch.uint8)
FORMATS = {
    "int4-token": dict(num_bits=4, type="int", strategy="token", dynamic=True),
    "int8-token": dict(num_bits=8, type="int", strategy="token", dynamic=True),
    "fp8-token": dict(num_bits=8, type="float", strategy="token", dynamic=True),
    "mxfp8": dict(num_bits=8, **MX),
    "mxfp4": dict(num_bits=4, **MX),
    "nvfp4": dict(num_bits=4, type="float", strategy="tensor_group", group_size=16, dynamic=True, scale_dtype=torch.float8_e4m3fn),
}
MODES = {"floor": ScaleCalculationMode.FLOOR, "ceil": ScaleCalculationMode.RCEIL, "even": ScaleCalculationMode.EVEN}
ELEMENTS = {"mxfp4": torch.float4_e2m1fn_x2, "mxfp8": torch.float8_e4m3fn}


def rows():
    random = np.random.default_rng(7)
    normal = random.normal(size=(8, WIDTH)) * np.exp2(random.integers(-30, 30, size=(8, 1)))
    heavy = random.normal(size=(8, WIDTH)) * np.exp2(random.normal(size=(8, WIDTH)) * 3)
    # Multiples of a quarter between -8 and 8 are ties of many formats; the largest number walks over what saturates.
    ties = [np.concatenate([np.arange(-31, 32) * 0.25, [top]]) for top in [0.5, 4, 5, 6, 6.5, 7, 7.99, 8, 448, 460, 464, 480, 500, 512]]
    small = [np.full(WIDTH, 2.0**-126), np.arange(WIDTH) * 2.0**-149, np.arange(WIDTH) * 2.0**-128, np.zeros(WIDTH)]
    large = [np.linspace(-3e38, 3e38, WIDTH), np.full(WIDTH, 6.0), np.full(WIDTH, -448.0)]
    odd = np.arange(WIDTH, dtype=np.float64)
    odd[40] = np.nan
    return np.concatenate([normal, heavy, ties, small, large, [odd]]).astype(np.float32)


def activations(x, name):
    args = QuantizationArgs(**FORMATS[name])
    if name != "nvfp4":
        scale, zero = compute_dynamic_scales_and_zp(x.unsqueeze(0), args, None)
        return fake_quantize(x.unsqueeze(0), scale, zero, args).squeeze(0)
    out = []
    for row in x:
        whole = generate_gparam(row.min().reshape(1), row.max().reshape(1))
        scale, zero = compute_dynamic_scales_and_zp(row.unsqueeze(0), args, None, global_scale=whole)
        out.append(fake_quantize(row.unsqueeze(0), scale, zero, args, global_scale=whole).squeeze(0))
    return torch.stack(out)


def powers(x, name, mode):
    scale, codes = to_mx(x.contiguous(), ELEMENTS[name], 32, MODES[mode])
    return to_dtype(codes, scale, ELEMENTS[name], 32, torch.float32)


def main():
    x = torch.from_numpy(rows())
    out = {"rows": x.numpy()}
    for name in FORMATS:
        out[name] = activations(x, name).float().numpy()
    for name in ELEMENTS:
        for mode in MODES:
            out[f"{name}.{mode}"] = powers(x, name, mode).float().numpy()
    save_file({key: np.ascontiguousarray(value) for key, value in out.items()}, OUT)


if __name__ == "__main__":
    main()
