"""Who reads the folders that `lathe quantize` writes, and do they get Lathe's numbers?

usage: folders.py LATHE [PRESET ...]      (needs torch, safetensors, transformers 5.17, compressed-tensors 0.20)

For a dense model, a mixture and a mixture with latent attention, all small and random, each preset of a folder is written and opened
through `AutoModelForCausalLM.from_pretrained` as anybody would. `provenance.json` says under `readers` who runs the folder. Where it
says that transformers does, log-probabilities must be Lathe's:

- within 1e-5, where inputs are not rounded: in float32 against the folder, or, where transformers makes bfloat16 of the matrices while
  it loads (four bits of float, and all experts in fp8), in bfloat16 against `lathe convert --format bf16`, which rounds the same
  numbers once. Both models then compute in float32;
- as near as transformers in float32 is to itself in float64, within a factor of 3, where inputs are rounded: a number that falls to
  the other side of a tie moves all that is behind it. Inputs of experts are not rounded in transformers, so of mixtures it is only
  asked that they are nearer to Lathe's folder than to the model.

Where it says that transformers does not, loading must fail, or give other numbers. So neither a wrong promise nor a needless refusal
passes. `hadamard` is a recipe that rotates the inputs of all matrices. Last, GGUF files of a small Llama in every type are opened with
`gguf_file` (needs gguf).
"""

import contextlib
import functools
import io
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import warnings

import torch
import transformers
from compressed_tensors.compressors.nvfp4 import base as fp4
from compressed_tensors.quantization.utils import helpers, mxfp_utils
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)
MODELS = {
    "dense": dict(SIZES, model_type="qwen3", head_dim=64, tie_word_embeddings=True),
    "mixture": dict(SIZES, model_type="qwen3_moe", head_dim=64, moe_intermediate_size=256, num_experts=4, num_experts_per_tok=2,
                    norm_topk_prob=True),
    "latent": dict(SIZES, model_type="deepseek_v3", num_key_value_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=32,
                   qk_rope_head_dim=32, v_head_dim=64, moe_intermediate_size=256, n_routed_experts=4, num_experts_per_tok=2,
                   n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1),
}
PRESETS = ["w4a16", "w8a16", "w4a4", "w4a8", "w8a8", "w8a8-fp8", "int8", "fp8", "fp8_tensor", "fp8_channel", "fp8_block", "mxfp8",
           "mxfp6", "mxfp4", "mxfp4-a4", "mxfp4-a8", "nvfp4", "nvfp4-a4", "int4-g128-bf16-asym", "int8-channel-bf16-asym", "hadamard"]
GGUF = ["q4_0", "q5_0", "q8_0", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"]
TOKENS = [(i * i * 7 + 3 * i + 5) % 500 + 3 for i in range(48)]
EXACT = 1e-5
HADAMARD = 'format = "int8-channel-bf16"\n[[technique]]\nuse = "hadamard"\nblock = 32\n[[technique]]\nuse = "rtn"\n'


def run(*words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return json.loads(done.stdout)


def calibration(scratch, preset):
    """NVFP4's inputs have a scale that calibration finds."""
    if not preset.startswith("nvfp4-a4"):
        return []
    text = scratch / "calibration.json"
    text.write_text(json.dumps([(i * 37 + i * i) % 509 for i in range(600)]))
    return ["--calibration", text]


def make(name, folder):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name])).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.dim() > 1:
                value.copy_(torch.randn(value.shape) * 0.08)
            else:
                value.copy_(1 + 0.1 * torch.randn(value.shape))
    model.to(torch.bfloat16).save_pretrained(folder)


def ours(lathe, folder, scratch):
    text = scratch / "tokens.json"
    text.write_text(json.dumps(TOKENS))
    return torch.tensor(run(lathe, "score", folder, "--tokens", text, "--device", "reference", "--exact", "--json")["logprobs"])


def theirs(folder, load, compute, **words):
    """Log-probabilities of transformers, loaded in one type and computed in another, or why there are none."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    quiet = (contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings())
    try:
        with quiet[0], quiet[1], quiet[2]:
            warnings.simplefilter("ignore")
            model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=load, attn_implementation="eager",
                                                               experts_implementation="eager", output_loading_info=True, **words)
            found = {key: sorted(map(str, value))[:3] for key, value in info.items() if value}
            if found:
                return None, f"{found}"
            with torch.no_grad():
                model.eval()
                if load != compute:
                    # The first step makes floats of codes.
                    model(torch.tensor([TOKENS[:2]]))
                    torch.nn.Module.to(model, compute)
                logits = model(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a reader raises is its refusal
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    return torch.stack([logits[i, token] for i, token in enumerate(TOKENS[1:])]), None


def powers_of_two(x, num_bits=4):
    """compressed-tensors' `generate_mx_scales`, but that the largest number `x` is rounded to its own format's mantissa: that library
    takes MXFP4's one bit for MXFP8 as well, torchao and Lathe take three."""
    mantissa = {4: 1, 6: 3, 8: 3}[num_bits]
    return 127 + torch.floor(torch.log2(mxfp_utils.round_to_power_2(x, mantissa))) - mxfp_utils._MX_ELEM_OFFSET[num_bits]


helpers.generate_mx_scales = powers_of_two


@contextlib.contextmanager
def in_float32():
    """Four bits of float become float32 and not bfloat16: where inputs are rounded, the last bits of matrices decide ties."""
    before = fp4.unpack_fp4_from_uint8
    fp4.unpack_fp4_from_uint8 = functools.partial(before, dtype=torch.float32)
    try:
        yield
    finally:
        fp4.unpack_fp4_from_uint8 = before


def off(ours, theirs):
    return (ours - theirs).abs().max().item()


def compare(lathe, folder, preset, mine, base, scratch):
    """Whether transformers gives Lathe's numbers, in words."""
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    single, why = theirs(folder, torch.float32, torch.float32)
    if groups["group_0"]["input_activations"] is not None:
        with in_float32():
            single, why = theirs(folder, torch.float32, torch.float32)
            double, _ = theirs(folder, torch.float32, torch.float64)
        if single is None:
            single, why = theirs(folder, torch.bfloat16, torch.float32)
            double, _ = theirs(folder, torch.bfloat16, torch.float64)
        if single is None:
            return False, why
        noise, found = (single - double).abs().mean().item(), (single - mine).abs().mean().item()
        experts = any("experts" in name for name in json.loads((folder / "config.json").read_text()))
        near = found < 3 * noise + 2e-3 or experts and found < (single - base).abs().mean().item()
        return near, f"off by {found:.1e} in the mean, by {noise:.1e} from itself in float64"
    if single is not None and off(single, mine) < EXACT:
        return True, f"off by {off(single, mine):.1e}"
    half, why_half = theirs(folder, torch.bfloat16, torch.float32)
    if half is None:
        return False, why or why_half
    if preset == "hadamard":
        return off(half, mine) < EXACT, f"off by {off(half, mine):.1e}"
    plain = scratch / "plain"
    run(lathe, "convert", folder, plain, "--to", "safetensors", "--format", "bf16", "--json")
    found = off(half, ours(lathe, plain, scratch))
    shutil.rmtree(plain)
    return found < EXACT, f"off by {found:.1e} in bfloat16"


def main(lathe, *presets):
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for name in MODELS:
            plain = scratch / name
            make(name, plain)
            base = ours(lathe, plain, scratch)
            found, why = theirs(plain, torch.float32, torch.float32)
            assert found is not None and off(found, base) < EXACT, (name, why)
            for preset in presets or PRESETS:
                small = scratch / f"{name}-{preset}"
                words = ["--format", preset]
                if preset == "hadamard":
                    words = ["--recipe", scratch / "recipe.toml"]
                    words[1].write_text(HADAMARD)
                report = run(lathe, "quantize", plain, small, *words, *calibration(scratch, preset), "--json")
                refusal = report["readers"]["transformers"]
                mine = ours(lathe, small, scratch)
                runs, how = compare(lathe, small, preset, mine, base, scratch)
                good = runs == (refusal is None)
                wrong += not good
                moved = (mine - base).abs().mean().item()
                print(f"{'ok ' if good else 'BAD'} {name} {preset}: {report['quantized_share']:.3f} of the bytes, moves by {moved:.4f}; "
                      f"transformers {how}; Lathe says {refusal or 'runs'}", flush=True)
        wrong += gguf(lathe, scratch)
    assert wrong == 0, f"{wrong} files are not what `readers` says"


def gguf(lathe, scratch):
    """How many GGUF files transformers does not read as Lathe does."""
    MODELS["llama"] = dict(SIZES, model_type="llama", head_dim=64)
    make("llama", scratch / "llama")
    wrong = 0
    for preset in GGUF:
        file = scratch / f"{preset}.gguf"
        report = run(lathe, "quantize", scratch / "llama", file, "--format", preset, "--json")
        found, why = theirs(scratch, torch.float32, torch.float32, gguf_file=file.name)
        good = report["readers"]["transformers"] is None and found is not None and off(found, ours(lathe, file, scratch)) < EXACT
        wrong += not good
        print(f"{'ok ' if good else 'BAD'} {file.name}: transformers {why or 'within 1e-5'}", flush=True)
    return wrong


if __name__ == "__main__":
    main(*sys.argv[1:])
