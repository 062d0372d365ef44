"""Does compressed-tensors read what `lathe quantize` writes as Lathe does?

usage: packed_files.py LATHE MODEL        (needs torch, safetensors, compressed-tensors)

Quantizes MODEL (a Hugging Face directory of plain floats) in several integer formats, parses each config with
compressed-tensors' own classes (which forbid unknown keys) and decompresses every matrix with its compressor. `lathe convert`
writes Lathe's own dequantization of the same files. With scales widened to float32 both must be equal bit for bit, and in bf16,
the type in which that library multiplies, equal after Lathe's exact products are rounded once.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

FORMATS = ["int4-g32-bf16", "int4-g64-bf16-asym", "int4-channel-bf16", "int8-g32-bf16", "int8-channel-bf16-asym", "int4-g32-f32"]


def run(*words):
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def tensors(folder):
    found = {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        found.update(load_file(path))
    return found


def main(lathe, model):
    for name in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            small, plain = pathlib.Path(folder, "small"), pathlib.Path(folder, "plain")
            run(lathe, "quantize", model, small, "--format", name)
            run(lathe, "convert", small, plain, "--to", "safetensors", "--format", "f32")
            config = json.loads((small / "config.json").read_text())["quantization_config"]
            config = QuantizationConfig.model_validate({key: value for key, value in config.items()})
            scheme = config.config_groups["group_0"]
            packed, ours = tensors(small), tensors(plain)
            matrices = 0
            for key in [key for key in packed if key.endswith("weight_packed")]:
                module = key.removesuffix("weight_packed")
                state = {part.removeprefix(module): value for part, value in packed.items() if part.startswith(module)}
                wide = dict(state, weight_scale=state["weight_scale"].float())
                theirs = PackedQuantizationCompressor.decompress(wide, scheme)["weight"]
                mine = ours[module + "weight"]
                assert theirs.dtype == torch.float32 and torch.equal(theirs, mine), (name, key)
                native = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
                if native.dtype == torch.bfloat16:
                    assert torch.equal(native, mine.bfloat16()), (name, key)
                matrices += 1
            assert matrices > 0, name
            print(f"{name}: {matrices} matrices equal bit for bit")


if __name__ == "__main__":
    main(*sys.argv[1:])
