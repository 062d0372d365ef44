"""A folder's low-rank adapter, as PEFT reads it, against the optimum that this script computes by itself.

usage: low_rank.py BASE OUT [--calibration IDS.json] [--tokens 4096] [--text TEXT] [--context 512] [--layers N] [--threads 2]

BASE is the folder in floats that `lathe quantize BASE OUT --method ...+low-rank` read, OUT what it wrote: int4 or int8 (`pack-quantized`), no
rotation and no scales folded (`rtn`, `clip`, `gptq`), so that a matrix of BASE is what one of OUT stands for. It needs torch, transformers,
compressed-tensors and peft, and shares no code with Lathe.

 1. transformers decompresses OUT, and peft 0.21 loads OUT/adapter on it: it must find all its keys, and put an adapter beside exactly those
    modules that the file has.
 2. The error of the weights, ||W - Q - B A||^2, with and without the adapter; where provenance.json says `weighting = "none"`, against the
    tail of the spectrum of W - Q (full SVD in f64): the sum over all matrices, and the worst one.
 3. With --calibration (the same ids as Lathe's; windows of 512) layer after layer, as Lathe does it: H = E[x x^T] of the layer's inputs behind
    quantized and corrected layers, damped; the residual tr(D (H + d I) D^T) of D = W - Q - B A against the tail of the spectrum of
    (W - Q) L. The H is torch's own, in f32: Lathe's kernels round otherwise, so that the ratio is near 1 and not 1.
 4. With --text: mean KL to BASE in nats a token of Q and of Q + B A, and perplexities, in windows of --context.
"""

import argparse
import json
import math
import pathlib
import re
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

parser = argparse.ArgumentParser(usage=__doc__)
parser.add_argument("base", type=pathlib.Path)
parser.add_argument("out", type=pathlib.Path)
parser.add_argument("--calibration", type=pathlib.Path)
parser.add_argument("--tokens", type=int, default=4096)
parser.add_argument("--text", type=pathlib.Path)
parser.add_argument("--context", type=int, default=512)
parser.add_argument("--layers", type=int)
parser.add_argument("--threads", type=int, default=2)
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
torch.set_grad_enabled(False)


def load(path, **more):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", **more).eval()


def fail(message):
    sys.exit(f"FAILED: {message}")


base = load(arguments.base)
quantized = load(arguments.out, quantization_config=CompressedTensorsConfig(run_compressed=False))
adapter = arguments.out / "adapter"
recipe = json.loads((arguments.out / "provenance.json").read_text())["recipe"]
damping = float(re.search(r'use = "low-rank".*?damping = ([0-9.e-]+)', recipe, re.S)[1])
weighting = re.search(r'weighting = "(\w+)"', recipe)[1]


def weights(model):
    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return {name: module.weight.detach().clone() for name, module in modules}


exact, codes = weights(base), weights(quantized)
codes = {name: weight for name, weight in codes.items() if name != "lm_head"}

# 1. What PEFT makes of the folder.
model = PeftModel.from_pretrained(quantized, adapter, autocast_adapter_dtype=False)
config = model.peft_config["default"]
found = {name.removeprefix("base_model.model."): module for name, module in model.named_modules() if hasattr(module, "lora_A")}
prefix, kinds = "base_model.model.", ("lora_A", "lora_B")
file = load_file(adapter / "adapter_model.safetensors")
modules = {name.removeprefix(prefix).rsplit(".", 2)[0] for name in file}
if set(found) != modules:
    fail(f"peft targets {sorted(set(found) ^ modules)[:4]} and others, which the file has not")
for name, module in found.items():
    for kind in kinds:
        loaded, stored = getattr(module, kind)["default"].weight, file[f"{prefix}{name}.{kind}.weight"]
        if not torch.equal(loaded.float(), stored.float()):
            fail(f"{name} {kind} is not the file's")
    if module.scaling["default"] != 1.0:
        fail(f"{name} is scaled by {module.scaling['default']}")
deltas = {name: (file[f"{prefix}{name}.lora_B.weight"].float() @ file[f"{prefix}{name}.lora_A.weight"].float()) for name in found}
ranks = {name: file[f"{prefix}{name}.lora_A.weight"].shape[0] for name in found}
print(f"peft: {len(found)} modules, rank {sorted(set(ranks.values()))}, targets {sorted(config.target_modules)}; all keys are the file's")


# 2. The error of weights.
def tail(matrix, rank):
    values = torch.linalg.svdvals(matrix)
    return (values[rank:] ** 2).sum().item()


before = after = least = signal = worst = 0.0
for name, delta in deltas.items():
    lost = exact[name].double() - codes[name].double()
    left = (lost - delta.double()).square().sum().item()
    before, after, signal = before + lost.square().sum().item(), after + left, signal + exact[name].double().square().sum().item()
    if weighting == "none":
        best = tail(lost, ranks[name])
        least, worst = least + best, max(worst, left / best)
print(f"weights: squared error {before / signal:.4e} of the signal, {after / signal:.4e} corrected")
if weighting == "none":
    print(f"  over the least that rank can: {after / least:.6f} in sum, {worst:.6f} at worst")
    if not 0.9999 <= after / least < 1.01:
        fail("the residual is not near the least one")


# 3. The error of outputs, layer after layer.
def through(layer, stream, rotary, positions):
    out = []
    for window in stream:
        out.append(layer(window[None], position_embeddings=rotary(window[None], positions[:, : len(window)]), attention_mask=mask(len(window)))[0])
    return [it[0] if it.dim() == 3 else it for it in out]


def mask(length):
    return torch.full((length, length), float("-inf")).triu(1)[None, None]


def calibrated():
    ids = torch.tensor(json.loads(arguments.calibration.read_text())[: arguments.tokens])
    body = base.model
    positions = torch.arange(512)[None]
    stream = [body.embed_tokens(window) for window in ids.split(512)]
    sums = {"before": 0.0, "after": 0.0, "least": 0.0, "whole": 0.0}
    worst = 0.0
    for index, layer in enumerate(body.layers[: arguments.layers]):
        inside = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        products, hooks, shared = {}, [], {}
        for name, module in inside.items():
            # Those that read one input share its products.
            key = name if name.endswith(("o_proj", "down_proj")) else name.split(".")[0]
            shared[name] = key
            if key in products:
                continue
            products[key] = torch.zeros(module.in_features, module.in_features, dtype=torch.float64)

            def add(_, inputs, key=key):
                x = inputs[0].reshape(-1, inputs[0].shape[-1])
                products[key] += (x.T @ x).double()

            hooks.append(module.register_forward_pre_hook(add))
        through(layer, stream, body.rotary_emb, positions)
        for hook in hooks:
            hook.remove()
        factors = {}
        for name, module in inside.items():
            path = f"model.layers.{index}.{name}"
            if path not in deltas:
                continue
            h = products[shared[name]] / len(ids)
            if shared[name] not in factors:
                damped = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
                factors[shared[name]] = torch.linalg.cholesky(damped)
            factor = factors[shared[name]]
            lost = exact[path].double() - codes[path].double()
            left = ((lost - deltas[path].double()) @ factor).square().sum().item()
            weighted = lost @ factor
            best = tail(weighted, ranks[path])
            worst = max(worst, left / best)
            whole = (exact[path].double() @ factor).square().sum().item()
            for key, value in (("before", weighted.square().sum().item()), ("after", left), ("least", best)):
                sums[key] += value / whole
            sums["whole"] += 1
            module.weight.data = codes[path] + deltas[path]
        for name, module in inside.items():
            path = f"model.layers.{index}.{name}"
            if path in codes and path not in deltas:
                module.weight.data = codes[path]
        stream = through(layer, stream, body.rotary_emb, positions)
    for index, layer in enumerate(body.layers):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = exact[f"model.layers.{index}.{name}"]
    mean = {key: value / sums["whole"] for key, value in sums.items()}
    print(f"outputs (mean over {int(sums['whole'])} matrices): error {mean['before']:.4e} of the signal, {mean['after']:.4e} corrected, {mean['least']:.4e} at best")
    print(f"  over the least that rank can: {mean['after'] / mean['least']:.5f} in the mean, {worst:.5f} at worst")
    if weighting == "inputs" and not 0.9999 <= mean["after"] / mean["least"] < 1.02:
        fail("the residual is not near the least one")


# 4. KL of whole models.
def log_probabilities(model, ids):
    for window in ids.split(arguments.context):
        if len(window) > 1:
            yield torch.log_softmax(model(window[None]).logits[0, :-1].double(), -1), window[1:]


def compared():
    ids = AutoTokenizer.from_pretrained(arguments.base)(arguments.text.read_text(), return_tensors="pt").input_ids[0]
    expected = [it[0].float() for it in log_probabilities(base, ids)]
    for label, enabled in (("codes", False), ("codes and adapter", True)):
        switch = model.enable_adapter_layers if enabled else model.disable_adapter_layers
        switch()
        kl, loss = [], []
        for reference, (found, targets) in zip(expected, log_probabilities(model, ids)):
            reference = reference.double()
            kl.append((reference.exp() * (reference - found)).sum(-1))
            loss.append(-found.gather(1, targets[:, None])[:, 0])
        kl, loss = torch.cat(kl), torch.cat(loss)
        print(f"{label}: KL {kl.mean():.4f} (standard error {kl.std() / math.sqrt(len(kl)):.4f}), perplexity {loss.mean().exp():.2f}, {len(kl)} tokens")


if arguments.calibration:
    calibrated()
if arguments.text:
    compared()
