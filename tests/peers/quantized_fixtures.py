"""Writes tests/fixtures/quantized/<name>/: one tiny Llama in every quantized layout that is read, made by the code of those who
own the layout, and expected.json: the SHA-256 of each matrix as that code dequantizes it, in little-endian float32.

usage: quantized_fixtures.py GPTQMODEL      (needs torch, safetensors, compressed-tensors, bitsandbytes, nvidia-modelopt)

GPTQMODEL is an unpacked source distribution of the package of that name: its packers for GPTQ and AWQ are taken from there
without importing the package, which wants a GPU. Products of a code and its scale are computed in float32, where the layout's
own code would round them to the scale's type; that rounding, where it exists, is checked to give what that code gives.
"""

import __future__
import ast
import contextlib
import hashlib
import importlib.util
import json
import math
import pathlib
import shutil
import sys
import types

import bitsandbytes.functional as bnb
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from safetensors.torch import save_file
from wide_dequantization import wide

OUT = pathlib.Path(__file__).resolve().parents[1] / "fixtures/quantized"
CONFIG = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=160,
              num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
              hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True, attention_bias=False,
              mlp_bias=False, bos_token_id=1, eos_token_id=2, dtype="bfloat16")
SHAPES = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
          "mlp.gate_proj": (160, 64), "mlp.up_proj": (160, 64), "mlp.down_proj": (64, 160)}
GROUP = 32
expected = {}


def matrices():
    torch.manual_seed(5)
    return {f"model.layers.0.{name}": torch.randn(shape) * 0.08 for name, shape in SHAPES.items()}


def others():
    torch.manual_seed(6)
    norms = ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"]
    tensors = {f"{name}.weight": (1 + 0.1 * torch.randn(64)).bfloat16() for name in norms}
    return tensors | {"model.embed_tokens.weight": torch.randn(64, 64).bfloat16()}


def write(name, tensors, values, quantization, beside=None):
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = {key: value.contiguous() for key, value in (others() | tensors).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = CONFIG | (dict(quantization_config=quantization) if quantization else {})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if beside:
        (folder / "hf_quant_config.json").write_text(json.dumps(beside, indent=2) + "\n")
    # Tables disagree about the sign of fp4's second zero: both count as one.
    digest = lambda value: hashlib.sha256((value.detach().float() + 0.0).contiguous().numpy().astype("<f4").tobytes()).hexdigest()
    expected[name] = {f"{module}.weight": digest(value) for module, value in values.items()}


# compressed-tensors ----------------------------------------------------------------------------------------------------------

def scales_of(weight, args):
    """Scales, zero points and a global scale in the library's conventions, searched for nowhere: ranges of each block."""
    rows, columns = weight.shape
    strategy, size = args.strategy, args.group_size
    if strategy == "tensor":
        blocks, shape = weight.reshape(1, -1), (1,)
    elif strategy == "channel":
        blocks, shape = weight, (rows, 1)
    elif strategy == "block":
        height, width = args.block_structure
        down, along = math.ceil(rows / height), math.ceil(columns / width)
        padded = torch.zeros(down * height, along * width)
        padded[:rows, :columns] = weight
        blocks = padded.view(down, height, along, width).transpose(1, 2).reshape(down * along, -1)
        shape = (down, along)
    else:
        blocks, shape = weight.reshape(rows * columns // size, size), (rows, columns // size)
    largest = blocks.abs().amax(-1)
    zeros = None
    if args.type == "int":
        top = 2 ** (args.num_bits - 1)
        if args.symmetric:
            scale = (largest / (top - 0.5)).bfloat16()
        else:
            low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
            scale = ((high - low) / (2 * top - 1)).bfloat16()
            zeros = (-top - torch.round(low / scale.float())).clamp(-top, top - 1).to(torch.int8).view(shape)
        return scale.view(shape), zeros, None
    limit = {4: 6.0, 6: 7.5, 8: 448.0}[args.num_bits]
    if str(args.scale_dtype) == "torch.uint8":
        return torch.exp2(torch.ceil(torch.log2(largest / limit))).view(shape), None, None
    if strategy == "tensor_group":
        divisor = (448.0 * 6.0 / weight.abs().max()).reshape(1)
        return (largest / 6.0 * divisor).to(torch.float8_e4m3fn).float().view(shape), None, divisor
    return (largest / limit).bfloat16().view(shape), None, None


def compressed(name, groups, top, pick=lambda module: "group_0", extra=lambda module, state: state, **more):
    config = dict(quant_method="compressed-tensors", format=top, quantization_status="compressed", global_compression_ratio=None,
                  kv_cache_scheme=None, ignore=["lm_head"], config_groups=groups, **more)
    parsed = QuantizationConfig.model_validate(config)
    tensors, values = {}, {}
    for module, weight in matrices().items():
        scheme = parsed.config_groups[pick(module)]
        scheme.format = scheme.format or top
        scale, zeros, divisor = scales_of(weight, scheme.weights)
        state = dict(weight=weight, weight_scale=scale.float())
        state |= dict(weight_zero_point=zeros) if zeros is not None else {}
        state |= dict(weight_global_scale=divisor) if divisor is not None else {}
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        state = compressor.compress(state, scheme)
        if state["weight_scale"].dtype == torch.float32:
            state["weight_scale"] = scale.bfloat16()
        values[module] = wide(state, scheme, scheme.format)
        native = compressor.decompress(state, scheme)["weight"]
        assert torch.equal(native, values[module].to(native.dtype)), (name, module)
        tensors |= {f"{module}.{part}": value for part, value in extra(module, state).items()}
    write(name, tensors, values, config)


def group(weights, targets=("Linear",), activations=None, **more):
    return dict(targets=list(targets), weights=dict(dynamic=False, symmetric=True) | weights, input_activations=activations,
                output_activations=None, **more)


TOKEN = dict(type="float", num_bits=8, symmetric=True, strategy="token", dynamic=True)
FP8 = dict(type="float", num_bits=8)
MX = dict(type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")
NVFP4 = dict(type="float", num_bits=4, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
INT8 = dict(type="int", num_bits=8)
INT4 = dict(type="int", num_bits=4, strategy="group", group_size=GROUP)


def static_input(module, state):
    return state | dict(input_scale=torch.tensor([0.1]))


def compressed_all():
    one = lambda *a, **k: {"group_0": group(*a, **k)}
    compressed("ct-fp8-tensor", one(FP8 | dict(strategy="tensor"), activations=dict(FP8, strategy="tensor", dynamic=False)),
               "float-quantized", extra=static_input)
    compressed("ct-fp8-channel", one(FP8 | dict(strategy="channel"), activations=TOKEN), "float-quantized")
    compressed("ct-fp8-block", one(FP8 | dict(strategy="block", block_structure=[128, 128]),
                                   activations=dict(FP8, strategy="group", group_size=128, dynamic=True)), "float-quantized")
    compressed("ct-int8-channel", one(INT8 | dict(strategy="channel"), activations=dict(INT8, strategy="token", dynamic=True)),
               "int-quantized")
    compressed("ct-int8-asym", one(INT8 | dict(strategy="channel", symmetric=False)), "naive-quantized")
    compressed("ct-int4-asym", one(INT4 | dict(symmetric=False)), "pack-quantized")
    compressed("ct-mxfp8", one(MX | dict(num_bits=8)), "mxfp8-quantized")
    compressed("ct-mxfp6", one(MX | dict(num_bits=6)), "mxfp6-pack-quantized")
    compressed("ct-mxfp4", one(MX | dict(num_bits=4), activations=dict(MX, num_bits=4, dynamic=True)), "mxfp4-pack-quantized")
    nvfp4_input = lambda module, state: state | dict(input_global_scale=torch.tensor([300.0]))
    compressed("ct-nvfp4", one(NVFP4, activations=dict(NVFP4, dynamic="local")), "nvfp4-pack-quantized", extra=nvfp4_input)
    # By name, by pattern and by class; the pattern would take o_proj too.
    mixed = {
        "group_0": group(INT4, ["re:.*self_attn.*"], format="pack-quantized"),
        "group_1": group(FP8 | dict(strategy="channel"), format="float-quantized"),
        "group_2": group(NVFP4, ["model.layers.0.self_attn.o_proj"], format="nvfp4-pack-quantized"),
    }
    pick = lambda module: "group_2" if module.endswith("o_proj") else "group_0" if "self_attn" in module else "group_1"
    compressed("ct-mixed", mixed, "mixed-precision", pick)


def compressed_in_order():
    """`actorder: group`, which the library has removed: codes of columns whose group is `weight_g_idx`."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    tensors, values = {}, {}
    for module, weight in matrices().items():
        order = shuffled(weight.shape[1], len(tensors))
        codes, scales, _ = integers(weight, 4, order, True)
        signed = (codes.int() - 8).to(torch.int8)
        tensors |= {f"{module}.weight_packed": pack_to_int32(signed, 4), f"{module}.weight_scale": scales,
                    f"{module}.weight_shape": torch.tensor(weight.shape), f"{module}.weight_g_idx": order.int()}
        values[module] = signed.float() * scales.float()[:, order]
    config = dict(quant_method="compressed-tensors", format="pack-quantized", quantization_status="compressed", ignore=["lm_head"],
                  config_groups={"group_0": group(INT4 | dict(actorder="group"))})
    write("ct-actorder", tensors, values, config)


# GPTQ and AWQ ----------------------------------------------------------------------------------------------------------------

def shuffled(columns, seed):
    return (torch.randperm(columns, generator=torch.Generator().manual_seed(seed)) // GROUP)


def integers(weight, bits, order, symmetric):
    """Unsigned codes `[outputs, inputs]`, scales and zero points `[outputs, groups]` under groups of columns `order`."""
    groups, top = int(order.max()) + 1, 2 ** bits - 1
    scales, zeros = torch.empty(weight.shape[0], groups), torch.empty(weight.shape[0], groups)
    for index in range(groups):
        part = weight[:, order == index]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            scales[:, index], zeros[:, index] = part.abs().amax(1) * 2 / top, 2 ** (bits - 1)
        else:
            scales[:, index] = (high - low) / top
            zeros[:, index] = torch.round(-low / scales[:, index])
    scales = scales.half()
    codes = torch.round(weight / scales.float()[:, order] + zeros[:, order]).clamp(0, top)
    return codes.to(torch.uint8), scales, zeros


def gptqmodel(root):
    """`PackableQuantLinear`'s methods, cut out of their module, and AWQ's packing helpers."""
    path = root / "gptqmodel/nn_modules/qlinear/__init__.py"
    tree = ast.parse(path.read_text())
    wanted = {"_torch_right_shift", "_torch_left_shift", "_torch_shift_factor"}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    linear = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "PackableQuantLinear")
    methods = {"pack_original", "dequantize_weight", "_dequantize_from_codes", "_init_wf_unsqueeze_buffers", "_wf_device"}
    functions += [node for node in linear.body if isinstance(node, ast.FunctionDef) and node.name in methods]
    packing = next(node for node in tree.body if isinstance(node, ast.ClassDef) and any(
        isinstance(item, ast.FunctionDef) and item.name == "pack_original" for item in node.body))
    functions += [node for node in packing.body if isinstance(node, ast.FunctionDef) and node.name in methods - {
        it.name for it in functions}]
    limits = types.SimpleNamespace(threadpool_limits=lambda _: contextlib.nullcontext())
    conv = types.SimpleNamespace(pytorch_utils=types.SimpleNamespace(Conv1D=type("Conv1D", (), {})))
    scope = dict(t=torch, torch=torch, np=np, nn=torch.nn, math=math, THREADPOOLCTL=limits, transformers=conv,
                 _ConvNd=torch.nn.modules.conv._ConvNd)
    exec(compile(ast.Module(functions, []), str(path), "exec", flags=__future__.annotations.compiler_flag), scope)
    spec = importlib.util.spec_from_file_location("packing_utils", root / "gptqmodel/quantization/awq/utils/packing_utils.py")
    awq = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(awq)
    return scope, awq


class Packer(torch.nn.Module):
    """What those methods ask of their object."""

    def __init__(self, scope, bits, order):
        super().__init__()
        self.bits, self.planar, self.maxq, self.pack_factor, self.pack_dtype_bits = bits, False, 2 ** bits - 1, 32 // bits, 32
        self.pack_np_math_dtype, self.pack_np_dtype, self.pack_dtype = np.uint32, np.int32, torch.int32
        self.enable_wf_unsqueeze, self.dequant_dtype, self.in_features = True, torch.int16, len(order)
        for name in ("pack_original", "dequantize_weight", "_dequantize_from_codes", "_init_wf_unsqueeze_buffers", "_wf_device"):
            setattr(self, name, types.MethodType(scope[name], self))


def gptq(scope, name, bits, version, symmetric, reorder, **more):
    tensors, values = {}, {}
    for module, weight in matrices().items():
        columns = weight.shape[1]
        order = shuffled(columns, len(tensors)) if reorder else torch.arange(columns) // GROUP
        codes, scales, zeros = integers(weight, bits, order, symmetric)
        value = (codes.float() - zeros[:, order]) * scales.float()[:, order]
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight.data = value
        packer = Packer(scope, bits, order)
        packer.pack_original(linear, scales.float(), zeros, order.int())
        assert torch.equal(packer.dequantize_weight().T.half(), value.half()), (name, module)
        if version == "gptq":
            # What `convert_gptq_v2_to_v1_format_module` subtracts.
            packer.qzeros -= {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
        tensors |= {f"{module}.{part}": getattr(packer, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
        values[module] = value
    write(name, tensors, values, dict(quant_method="gptq", bits=bits, group_size=GROUP, desc_act=reorder, sym=symmetric,
                                      checkpoint_format=version, pack_dtype="int32", lm_head=False, **more))


def awq(packing):
    tensors, values = {}, {}
    for module, weight in matrices().items():
        order = torch.arange(weight.shape[1]) // GROUP
        codes, scales, zeros = integers(weight, 4, order, False)
        qweight, qzeros = packing.pack_awq(codes.T.int(), zeros.T.int(), 4)
        value = (codes.float() - zeros[:, order]) * scales.float()[:, order]
        native = packing.dequantize_gemm(qweight, qzeros, scales.T, 4, GROUP)
        assert torch.equal(native.T, value.half()), module
        tensors |= {f"{module}.qweight": qweight, f"{module}.qzeros": qzeros, f"{module}.scales": scales.T}
        values[module] = value
    write("awq", tensors, values, dict(quant_method="awq", bits=4, group_size=GROUP, zero_point=True, version="gemm",
                                       modules_to_not_convert=None))


# ModelOpt --------------------------------------------------------------------------------------------------------------------

def modelopt_nvfp4():
    tensors, values = {}, {}
    for module, weight in matrices().items():
        packed, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
        value = packed.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
        tensors |= {f"{module}.weight": packed._quantized_data, f"{module}.weight_scale": scale,
                    f"{module}.weight_scale_2": scale_2.float().reshape(()), f"{module}.input_scale": torch.tensor(0.02)}
        if module.endswith(("k_proj", "v_proj")):
            tensors[f"{module}.{module[-6]}_scale"] = torch.tensor(1.0)
        values[module] = value
    beside = dict(producer=dict(name="modelopt", version="0.47.0"), quantization=dict(
        quant_algo="NVFP4", kv_cache_quant_algo="FP8", group_size=16, exclude_modules=["lm_head"]))
    write("modelopt-nvfp4", tensors, values, None, beside)


def modelopt_fp8():
    tensors, values = {}, {}
    for module, weight in matrices().items():
        scale = weight.abs().max() / 448.0
        packed, scale = FP8QTensor.quantize(weight, scales=scale)
        values[module] = packed.dequantize(torch.float32, scale=scale)
        tensors |= {f"{module}.weight": packed._quantized_data, f"{module}.weight_scale": scale.float().reshape(()),
                    f"{module}.input_scale": torch.tensor(0.02)}
    write("modelopt-fp8", tensors, values, dict(quant_method="modelopt", quant_algo="FP8", ignore=["lm_head"], kv_cache_scheme=None,
                                                producer=dict(name="modelopt", version="0.47.0")))


# bitsandbytes ----------------------------------------------------------------------------------------------------------------

def bitsandbytes(name, kind, nested, dtype):
    tensors, values = {}, {}
    for module, weight in matrices().items():
        packed, state = bnb.quantize_4bit(weight.to(dtype), quant_type=kind, compress_statistics=nested)
        tensors |= {f"{module}.weight": packed} | {f"{module}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        values[module] = bnb.dequantize_4bit(packed, state)
    write(name, tensors, values, dict(quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False, bnb_4bit_quant_type=kind,
                                      bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype="bfloat16"))


def main(root):
    compressed_all()
    compressed_in_order()
    scope, packing = gptqmodel(pathlib.Path(root))
    gptq(scope, "gptq-4bit", 4, "gptq", True, False)
    gptq(scope, "gptq-4bit-asym", 4, "gptq", False, False)
    gptq(scope, "gptq-desc-act", 4, "gptq_v2", False, True)
    gptq(scope, "gptq-2bit", 2, "gptq", False, False)
    gptq(scope, "gptq-3bit", 3, "gptq_v2", False, False)
    gptq(scope, "gptq-8bit", 8, "gptq", False, False)
    awq(packing)
    modelopt_nvfp4()
    modelopt_fp8()
    bitsandbytes("bnb-nf4", "nf4", True, torch.bfloat16)
    bitsandbytes("bnb-fp4", "fp4", False, torch.float16)
    (OUT / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
