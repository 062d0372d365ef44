"""compressed-tensors' own dequantization with scales and products in float32, for packed_files.py and quantized_fixtures.py."""

import torch
from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import dequantize


def wide(state, scheme, form):
    """The weight of a module whose tensors are `state`, stored as `form`."""
    args, scale, zeros = scheme.weights, state["weight_scale"], state.get("weight_zero_point")
    if form == "pack-quantized":
        shape = tuple(state["weight_shape"].tolist())
        codes = unpack_from_int32(state["weight_packed"], args.num_bits, shape)
        if zeros is not None:
            zeros = unpack_from_int32(zeros, args.num_bits, (shape[0], scale.shape[-1]), packed_dim=0)
    elif "weight_packed" in state:
        packed = state["weight_packed"]
        unpack = {4: unpack_fp4_from_uint8, 6: unpack_fp6_from_uint8}[args.num_bits]
        codes = unpack(packed, packed.shape[0], packed.shape[1] * 8 // args.num_bits, dtype=torch.float32)
    else:
        codes = state["weight"]
    if scale.dtype == torch.uint8:
        scale = torch.exp2(scale.float() - 127)
    return dequantize(codes, scale.float(), zeros, args, dtype=torch.float32, global_scale=state.get("weight_global_scale"))
