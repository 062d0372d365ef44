"""Do compressed-tensors and transformers read what `lathe quantize` writes as Lathe does?

usage: packed_files.py LATHE MODEL [GPT_OSS DEEPSEEK]        (needs torch, safetensors, compressed-tensors, transformers)

Quantizes MODEL (a Hugging Face directory of plain floats) in every format that a folder holds, parses each config with
compressed-tensors' own classes (whose groups forbid unknown keys) and decompresses every matrix with its compressor. `lathe convert`
writes Lathe's own dequantization of the same files. With scales and products in float32 both must be equal bit for bit, and in
bf16, the type in which that library multiplies, equal after Lathe's exact products are rounded once. GPT_OSS, a model of that family
with its experts in bf16, gets MXFP4 experts, which transformers' own conversion must dequantize to the same numbers, and its own loading run to the same log-probabilities. Experts
of DEEPSEEK, a tensor each, are quantized in compressed-tensors' formats with all else.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from wide_dequantization import wide

FORMATS = ["int4-g32-bf16", "int4-g64-bf16-asym", "int4-channel-bf16", "int8-g32-bf16", "int8-channel-bf16-asym", "int4-g32-f32",
           "w8a8", "int8-channel-bf16-asym --activations int8-token", "w8a8-fp8", "fp8_tensor", "fp8_channel", "fp8_block", "f8e4m3-channel-f32", "mxfp8",
           "mxfp6", "mxfp4", "mxfp4-a4", "nvfp4", "nvfp4-a4"]


def run(*words):
    done = subprocess.run([str(word) for word in words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"


def tensors(folder):
    found = {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        found.update(load_file(path))
    return found


def check_fused(packed):
    """Query, key and value, and gate and up, have one global scale, as vLLM asks of them."""
    for key, value in packed.items():
        for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if key.endswith(f"{first}.weight_global_scale"):
                assert all(torch.equal(value, packed[key.replace(first, other)]) for other in others), key


def compressed(lathe, model, words, recipe=None):
    with tempfile.TemporaryDirectory() as folder:
        small, plain = pathlib.Path(folder, "small"), pathlib.Path(folder, "plain")
        if recipe:
            path = pathlib.Path(folder, "recipe.toml")
            path.write_text(f'format = "{words}"\n{recipe}\n[[technique]]\nuse = "rtn"\n')
            run(lathe, "quantize", model, small, "--recipe", path)
        else:
            run(lathe, "quantize", model, small, "--format", *words.split())
        run(lathe, "convert", small, plain, "--to", "safetensors", "--format", "f32")
        config = json.loads((small / "config.json").read_text())["quantization_config"]
        config = QuantizationConfig.model_validate(config)
        scheme = config.config_groups["group_0"]
        compressor = BaseCompressor.get_value_from_registry(config.format)
        packed, ours = tensors(small), tensors(plain)
        matrices = 0
        for key in [key for key in packed if key.endswith("weight_scale")]:
            module = key.removesuffix("weight_scale")
            state = {part.removeprefix(module): value for part, value in packed.items() if part.startswith(module)}
            expected = set(compressor.compression_param_names(scheme))
            assert set(state) - {"bias"} == expected, (words, key, set(state), expected)
            mine = ours[module + "weight"]
            assert torch.equal(wide(state, scheme, config.format), mine), (words, key)
            native = compressor.decompress(state, scheme)["weight"]
            assert torch.equal(native, mine.to(native.dtype)), (words, key)
            matrices += 1
        assert matrices > 0, words
        check_fused(packed)
        print(f"{words} ({config.format}): {matrices} matrices equal bit for bit", flush=True)


def gpt_oss(lathe, model):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    with tempfile.TemporaryDirectory() as folder:
        small, recipe = pathlib.Path(folder, "small"), pathlib.Path(folder, "recipe.toml")
        recipe.write_text('format = "mxfp4"\ntensors = ["*.experts.*"]\n[[technique]]\nuse = "rtn"\n')
        run(lathe, "quantize", model, small, "--recipe", recipe)
        packed, plain = tensors(small), tensors(model)
        assert json.loads((small / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
        stacks = [name.removesuffix("_blocks") for name in packed if name.endswith("_blocks")]
        assert {name for name in plain if name not in stacks} == {
            name for name in packed if not name.endswith(("_blocks", "_scales"))}
        for name in stacks:
            blocks, scales = packed[f"{name}_blocks"], packed[f"{name}_scales"]
            theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            assert theirs.shape == plain[name].shape, name
            # Rows lie where they lay, within half a step of the largest number of a group.
            groups = plain[name].float().transpose(1, 2).reshape(*scales.shape, 32)
            step = torch.exp2(scales.float() - 127)[..., None]
            off = (theirs.transpose(1, 2).reshape(groups.shape) - groups).abs()
            assert (off <= step * 1.01 + groups.abs() * 0.26).all(), name
            codes = torch.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32).long()
            table = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])
            assert torch.equal((table[codes] * step).reshape(*scales.shape[:2], -1).transpose(1, 2), theirs), name
        assert stacks
        print(f"mxfp4 experts (gpt-oss): {len(stacks)} stacks equal bit for bit", flush=True)
        logits(lathe, small)


def logits(lathe, folder):
    """transformers dequantizes the folder and gives Lathe's log-probabilities."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    tokens = [1, 450, 4996, 17354, 1701, 29916, 432, 17204]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                 quantization_config=Mxfp4Config(dequantize=True))
    with torch.no_grad():
        theirs = model.float()(torch.tensor([tokens])).logits[0].log_softmax(-1)
    text = pathlib.Path(folder, "tokens.json")
    text.write_text(json.dumps(tokens))
    command = [str(lathe), "score", str(folder), "--tokens", str(text), "--device", "reference", "--json"]
    ours = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)["logprobs"]
    off = max(abs(theirs[i, token].item() - ours[i]) for i, token in enumerate(tokens[1:]))
    assert off < 1e-3, off
    print(f"mxfp4 experts (gpt-oss): log-probabilities of transformers differ by {off:.1e} at most")


def main(lathe, model, one_tensor=None, own_tensors=None):
    for words in FORMATS:
        compressed(lathe, model, words)
    if one_tensor:
        gpt_oss(lathe, one_tensor)
    if own_tensors:
        # Projections to and from the latent hold two weights each.
        for words in ("int4-g32-bf16", "fp8_block", "mxfp4", "nvfp4"):
            compressed(lathe, own_tensors, words, 'tensors = ["*"]\nkeep = ["*.kv_down", "*.rope_key", "*.key_up", "*.value_up"]')


if __name__ == "__main__":
    main(*sys.argv[1:])
