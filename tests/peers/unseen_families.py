"""Decoders that nobody told Lathe about: each must run right or be refused by naming what it needs.

usage: unseen_families.py --lathe BIN [name ...]

For every class of the installed Hugging Face transformers that continues text, a tiny random model is made where the class
can be made so small; then for known classes with unusual fields, and for checkpoints whose config.json was edited by hand.
`lathe inspect` and `lathe score --device reference` must agree with transformers in f32 on every log-probability (1e-3), or
exit with code 2 and a message that names the architecture, or the field or feature. Anything else is printed as WRONG, and
the script exits with code 1. A name picks types and edits that contain it.
"""

import argparse
import json
import logging
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

transformers.utils.logging.set_verbosity(logging.CRITICAL)
transformers.utils.logging.disable_progress_bar()

PROMPT = 40
PARAMETERS_MAX = 5_000_000
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
MLA = dict(num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
ROUTED = dict(moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1, first_k_dense_replace=1)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)

# What some types need beside SIZES to be tiny and whole.
OWN_SIZES = {
    "deepseek_v2": dict(MLA, **ROUTED),
    "deepseek_v3": dict(MLA, **ROUTED, n_group=2, topk_group=1),
    "minicpm3": MLA,
    "dots1": ROUTED,
    "glm4_moe": ROUTED,
    "qwen2_moe": dict(moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, shared_expert_intermediate_size=40),
    "qwen3_moe": dict(moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3),
    "ernie4_5_moe": dict(moe_num_experts=8, moe_k=3, moe_intermediate_size=24),
    "hunyuan_v1_dense": dict(head_dim=12),
    "ministral": dict(head_dim=12),
    # Of 64 experts the last chosen and the first refused are equal to the last bit of f32 for one of the tokens.
    "olmoe": dict(num_experts=8, num_experts_per_tok=3),
}

# Known types with unusual fields, that their classes honour.
VARIANTS = {
    "llama-head-dim": dict(model_type="llama", head_dim=20),
    "llama-mha": dict(model_type="llama", num_key_value_heads=4),
    "llama-mqa": dict(model_type="llama", num_key_value_heads=1),
    "llama-attention-bias": dict(model_type="llama", attention_bias=True),
    "llama-mlp-bias": dict(model_type="llama", mlp_bias=True),
    "llama-gelu": dict(model_type="llama", hidden_act="gelu"),
    "llama-relu": dict(model_type="llama", hidden_act="relu"),
    "llama-yarn": dict(model_type="llama", rope_parameters=YARN),
    "llama-dynamic": dict(model_type="llama", rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)),
    "llama-partial": dict(model_type="llama", rope_parameters=dict(rope_type="default", rope_theta=10000.0,
                                                                   partial_rotary_factor=0.5)),
    "mistral-full": dict(model_type="mistral", sliding_window=None),
    "qwen2-layer-types": dict(model_type="qwen2", use_sliding_window=True, sliding_window=12, max_window_layers=0,
                              layer_types=["full_attention", "sliding_attention"] * 2),
    "qwen2-window-off": dict(model_type="qwen2", use_sliding_window=False, sliding_window=12, max_window_layers=0),
    "qwen3-window": dict(model_type="qwen3", use_sliding_window=True, sliding_window=12, max_window_layers=1),
    "qwen3-moe-unnormalised": dict(model_type="qwen3_moe", moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3,
                                   norm_topk_prob=False),
    "gemma2-no-caps": dict(model_type="gemma2", head_dim=12, sliding_window=12, attn_logit_softcapping=None,
                           final_logit_softcapping=None),
    "gemma3-final-cap": dict(model_type="gemma3_text", head_dim=12, sliding_window=12, final_logit_softcapping=3.0),
    "gemma3-bidirectional": dict(model_type="gemma3_text", head_dim=12, sliding_window=12, use_bidirectional_attention=True),
    "smollm3-no-rope-layers": dict(model_type="smollm3", no_rope_layers=[1, 0, 0, 1]),
    "olmo-clip": dict(model_type="olmo", clip_qkv=0.5),
    "olmo2-partial": dict(model_type="olmo2", rope_parameters=dict(rope_type="default", rope_theta=10000.0,
                                                                  partial_rotary_factor=0.5)),
    "deepseek-v2-norm": dict(MLA, **ROUTED, model_type="deepseek_v2", norm_topk_prob=True),
    "deepseek-v3-half-split": dict(MLA, **ROUTED, model_type="deepseek_v3", n_group=2, topk_group=1, rope_interleave=False),
    "deepseek-v3-unnormalised": dict(MLA, **ROUTED, model_type="deepseek_v3", n_group=2, topk_group=1, norm_topk_prob=False),
    "glm4-moe-no-qk-norm": dict(ROUTED, model_type="glm4_moe", head_dim=16, use_qk_norm=False),
    "gpt-oss-other-limit": dict(model_type="gpt_oss", head_dim=16, num_local_experts=8, num_experts_per_tok=3,
                                sliding_window=12, swiglu_limit=3.0),
    "phi3-no-scaling": dict(model_type="phi3", sliding_window=None),
    "stablelm-parallel": dict(model_type="stablelm", use_parallel_residual=True),
    "stablelm-qk-norm": dict(model_type="stablelm", qk_layernorm=True),
    "cohere-qk-norm": dict(model_type="cohere", use_qk_norm=True),
    "starcoder2-plain": dict(model_type="starcoder2", use_bias=False, sliding_window=None),
    "ernie4_5_moe-bias": dict(model_type="ernie4_5_moe", moe_num_experts=8, moe_k=3, moe_intermediate_size=24,
                              moe_num_shared_experts=1, use_bias=True),
    "exaone4-full": dict(model_type="exaone4", sliding_window=None, layer_types=["full_attention"] * 4),
    "granitemoe-bias": dict(model_type="granitemoe", num_local_experts=8, num_experts_per_tok=3, attention_bias=True),
    "hunyuan-plain": dict(model_type="hunyuan_v1_dense", head_dim=12),
    "gemma-gelu": dict(model_type="gemma", head_dim=12, hidden_act="gelu"),
}

# Fields written into a saved config.json: (base, changes). transformers reads the same file.
EDITS = {
    "attention-softcap": ("llama", dict(attn_logit_softcapping=3.0)),
    "final-softcap": ("llama", dict(final_logit_softcapping=3.0)),
    "linear-layers": ("qwen2", dict(layer_types=["linear_attention", "full_attention"] * 2)),
    "chunked-layers": ("qwen2", dict(layer_types=["chunked_attention", "full_attention"] * 2)),
    "linear-layers-llama": ("llama", dict(layer_types=["linear_attention", "full_attention"] * 2)),
    "sliding-llama": ("llama", dict(sliding_window=8, layer_types=["sliding_attention"] * 4)),
    "unknown-rope": ("llama", dict(rope_parameters=dict(rope_type="spiral", rope_theta=10000.0))),
    "mrope": ("qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1]))),
    "old-mrope": ("qwen2", dict(rope_scaling=dict(type="mrope", mrope_section=[2, 1, 1]))),
    "old-rope": ("llama", dict(rope_parameters=None, rope_theta=5000.0, rope_scaling=dict(type="linear", factor=2.0))),
    "unknown-quantization": ("llama", dict(quantization_config=dict(quant_method="quip", bits=2))),
    "bitnet-quantization": ("llama", dict(quantization_config=dict(quant_method="bitnet"))),
    "alibi": ("llama", dict(position_embedding_type="alibi", alibi=True)),
    "qk-norm-llama": ("llama", dict(use_qk_norm=True)),
    "clip": ("llama", dict(clip_qkv=0.1)),
    "experts-llama": ("llama", dict(num_local_experts=8, num_experts_per_tok=2)),
    "multipliers": ("llama", dict(embedding_multiplier=12.0, residual_multiplier=0.2, logits_scaling=8.0)),
    "not-causal": ("llama", dict(is_causal=False)),
    "window-not-used": ("qwen2", dict(use_sliding_window=False, sliding_window=4)),
    "untied-without-head": ("qwen2-tied", dict(tie_word_embeddings=False)),
    "other-class": ("llama", dict(architectures=["LlamaForSequenceClassification"])),
    "other-type": ("llama", dict(model_type="mamba")),
    "wrong-head-dim": ("llama", dict(head_dim=16)),
    "harmless": ("llama", dict(attention_dropout=0.1, initializer_range=0.1, use_cache=False, unsloth_fixed=True)),
    "index-topk": ("deepseek_v3", dict(index_topk=8, index_n_heads=2, index_head_dim=8)),
}
BASES = {
    "llama": dict(model_type="llama"),
    "qwen2": dict(model_type="qwen2"),
    "qwen2-tied": dict(model_type="qwen2", tie_word_embeddings=True),
    "deepseek_v3": dict(MLA, **ROUTED, model_type="deepseek_v3", n_group=2, topk_group=1),
}


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name or "ln_" in name:
            weight.data = (0.0 if "Gemma" in type(model).__name__ else 1.0) + 0.2 * noise
        elif name.endswith("bias") or weight.dim() == 1:
            weight.data = 0.3 * noise
        else:
            weight.data = 1.5 * noise / math.sqrt(max(weight.shape[-1], 1))
    model.tie_weights()


def lathe(binary, *words):
    result = subprocess.run([binary, *map(str, words)], capture_output=True, text=True)
    reasons = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return result.returncode, result.stdout, reasons[-1][7:] if reasons else result.stderr[-300:]


def verdict(binary, folder):
    """What Lathe makes of a folder with weights, next to transformers."""
    config = json.loads((folder / "config.json").read_text())
    tokens = torch.randint(3, SIZES["vocab_size"], (PROMPT,), generator=torch.Generator().manual_seed(2)).tolist()
    (folder / "tokens.json").write_text(json.dumps(tokens))
    code, out, reason = lathe(binary, "score", folder, "--tokens", folder / "tokens.json", "--json", "--device", "reference")
    if code == 2:
        named = "not supported" in reason or "not in the checkpoint" in reason or "has shape" in reason
        return "refused" if named else "WRONG", reason.replace(str(folder), "")
    if code != 0:
        return "WRONG", f"exit {code}: {reason}"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].double()
    except Exception as error:
        return "WRONG", f"ran, but transformers does not: {error}"[:200]
    expected = torch.log_softmax(logits, -1)[range(PROMPT - 1), tokens[1:]]
    off = (torch.tensor(json.loads(out)["logprobs"]).double() - expected).abs().max().item()
    return ("right", f"{off:.1e}") if off < 1e-3 else ("WRONG", f"log-probabilities off by {off:.2e} ({config['model_type']})")


def tiny_config(changes):
    changes = dict(changes)
    kind = changes.pop("model_type")
    config = AutoConfig.for_model(kind, **{**SIZES, **OWN_SIZES.get(kind, {}), **changes})
    config._attn_implementation = "eager"
    return config


def make(changes, folder):
    config = tiny_config(changes)
    with torch.device("meta"):
        count = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if count > PARAMETERS_MAX:
        raise ValueError(f"{count} parameters")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model)
    model.save_pretrained(folder)


def check_type(binary, kind, folder):
    """A type by its configuration alone first: most are refused by that."""
    try:
        config = tiny_config(dict(model_type=kind))
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
        config.save_pretrained(folder)
    except Exception as error:
        # The class cannot be so small: what a file would say is known all the same.
        about = dict(model_type=kind, architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]], **SIZES)
        (folder / "config.json").write_text(json.dumps(about))
        config = None
    code, _, reason = lathe(binary, "inspect", folder, "--no-measure", "--context", 32)
    if code == 2:
        return "refused" if "is not supported" in reason else "WRONG", reason.replace(str(folder), "")
    if code != 0 or config is None:
        return ("WRONG", f"exit {code}: {reason}") if code else ("skipped", "transformers makes no tiny one")
    try:
        make(dict(model_type=kind), folder)
    except Exception as error:
        return "skipped", f"transformers makes no tiny one: {error}"[:120]
    return verdict(binary, folder)


def check_edit(binary, base, changes, folder):
    make(BASES[base], folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return verdict(binary, folder)


def check_variant(binary, changes, folder):
    try:
        make(changes, folder)
    except Exception as error:
        return "skipped", f"transformers makes none: {error}"[:120]
    return verdict(binary, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lathe", required=True)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    jobs = [(kind, lambda folder, kind=kind: check_type(args.lathe, kind, folder)) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    jobs += [(name, lambda folder, c=changes: check_variant(args.lathe, c, folder)) for name, changes in VARIANTS.items()]
    jobs += [(name, lambda folder, e=edit: check_edit(args.lathe, *e, folder)) for name, edit in EDITS.items()]
    counts = {}
    for name, job in jobs:
        if args.names and not any(wanted in name for wanted in args.names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            what, why = job(pathlib.Path(folder))
        counts[what] = counts.get(what, 0) + 1
        print(f"{name:28} {what:8} {why}", flush=True)
    print(", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    sys.exit(1 if counts.get("WRONG") else 0)


if __name__ == "__main__":
    main()
