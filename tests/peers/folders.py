"""Who reads the folders that `lathe quantize` writes, and do they get Lathe's numbers?

usage: folders.py LATHE [PRESET ...]      (needs torch, safetensors, transformers, compressed-tensors)

For a dense model, a mixture and a model with latent attention, all small and random, each preset of a folder is written and opened
through `AutoModelForCausalLM.from_pretrained` as anybody would. `provenance.json` says under `readers` who runs the folder. Where it
says that transformers does, log-probabilities must be Lathe's: within 1e-5 where inputs are not rounded, and within TOLERANCE where a
number of an input may fall to the other side of a tie. Where it says that transformers does not, loading must fail, or give other
numbers. So neither a wrong promise nor a needless refusal passes.
"""

import contextlib
import io
import json
import pathlib
import subprocess
import sys
import tempfile
import warnings

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)
MODELS = {
    "dense": dict(SIZES, model_type="qwen3", head_dim=64, tie_word_embeddings=True),
    "mixture": dict(SIZES, model_type="qwen3_moe", head_dim=64, moe_intermediate_size=256, num_experts=4, num_experts_per_tok=2,
                    norm_topk_prob=True),
    "zlatent": dict(SIZES, model_type="deepseek_v3", num_key_value_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=32,
                   qk_rope_head_dim=32, v_head_dim=64, moe_intermediate_size=256, n_routed_experts=4, num_experts_per_tok=2,
                   n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1),
}
PRESETS = ["w4a16", "w8a16", "w4a4", "w4a8", "w8a8", "w8a8-fp8", "int8", "fp8", "fp8_tensor", "fp8_channel", "fp8_block", "mxfp8",
           "mxfp6", "mxfp4", "mxfp4-a4", "mxfp4-a8", "nvfp4", "nvfp4-a4", "int4-g128-bf16-asym", "int8-channel-bf16-asym"]
TOKENS = [(i * i * 7 + 3 * i + 5) % 500 + 3 for i in range(48)]
EXACT, TOLERANCE = 1e-5, 0.05


def run(*words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return json.loads(done.stdout)


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


def theirs(folder):
    """Log-probabilities of transformers in float32, or why there are none."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                               output_loading_info=True)
            found = {key: sorted(value)[:3] for key, value in info.items() if value}
            if found:
                return None, f"loading info {found}"
            with torch.no_grad():
                logits = model.eval()(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a reader raises is its refusal
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    return torch.stack([logits[i, token] for i, token in enumerate(TOKENS[1:])]), None


def main(lathe, *presets):
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for name in MODELS:
            plain = scratch / name
            make(name, plain)
            base = ours(lathe, plain, scratch)
            found, why = theirs(plain)
            assert found is not None, (name, why)
            assert (found - base).abs().max() < EXACT, (name, (found - base).abs().max())
            for preset in presets or PRESETS:
                small = scratch / f"{name}-{preset}"
                report = run(lathe, "quantize", plain, small, "--format", preset, "--json")
                expected = report.get("readers", {}).get("transformers", "?")
                mine = ours(lathe, small, scratch)
                found, why = theirs(small)
                off = None if found is None else (found - mine).abs().max().item()
                rounded = json.loads((small / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
                bound = EXACT if rounded["input_activations"] is None else TOLERANCE
                runs = off is not None and off < bound
                good = runs == (expected is None)
                wrong += not good
                moved = (mine - base).abs().mean().item()
                print(f"{'ok ' if good else 'BAD'} {name} {preset}: quantizing moves by {moved:.4f}; transformers "
                      f"{f'off by {off:.1e}' if off is not None else why}; Lathe says {expected or 'runs'}", flush=True)
    assert wrong == 0, f"{wrong} folders are not what `readers` says"


if __name__ == "__main__":
    main(*sys.argv[1:])
