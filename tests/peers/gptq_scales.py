"""GPTQ written a second time, in PyTorch: what the choice of scales and of damping does to the KL of a Llama.

usage: gptq_scales.py MODEL CORPUS.u16.xz TEXT [calibration tokens]        (needs torch, transformers, safetensors)

MODEL is a Hugging Face directory of plain floats, CORPUS token ids (u16, little-endian; the first 65,536 are not used), TEXT what KL
is measured on, 1,024 tokens. To be quick, nine layers of SmolLM2's thirty are quantized, each from the inputs of the model as it was:
the figures rank choices, they are not those of a whole model. Nothing here is shared with Lathe; formats and updates are written
from the paper (arXiv 2210.17323) and compressed-tensors' convention of scales (range / 7.5, bf16).
"""

import lzma
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LAYERS = [1, 5, 9, 11, 14, 18, 22, 26, 28]
GROUP, WINDOW = 64, 512
INPUTS = {
    "self_attn.q_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
}


def fit(w, ratio=1.0):
    return (w.abs().amax(-1) * ratio / 7.5).clamp_min(1e-10).bfloat16().float()


def rounded(w, scales):
    return (w / scales[..., None]).round().clamp(-8, 7) * scales[..., None]


def search(weight, hessian):
    """The scale of each group whose rounding errs least in d^T H d with the group's own part of H."""
    w = weight.view(weight.shape[0], -1, GROUP)
    parts = torch.stack([hessian[i : i + GROUP, i : i + GROUP] for i in range(0, weight.shape[1], GROUP)])
    best_error, best = None, None
    for step in range(21):
        scales = fit(w, 1 - 0.5 * step / 20)
        d = rounded(w, scales) - w
        error = (torch.einsum("obg,bgh->obh", d, parts) * d).sum(-1)
        better = error < best_error if best is not None else torch.ones_like(error, dtype=torch.bool)
        best = torch.where(better, scales, best) if best is not None else scales
        best_error = torch.where(better, error, best_error) if best_error is not None else error
    return best


def gptq(weight, hessian, scales, damping, block=64):
    order = torch.argsort(hessian.diagonal(), descending=True)
    h = hessian[order][:, order].double()
    h.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    left, scale = weight[:, order].clone(), scales[:, order // GROUP]
    found = torch.zeros_like(left)
    for start in range(0, left.shape[1], block):
        end = min(left.shape[1], start + block)
        part, u = left[:, start:end].clone(), upper[start:end, start:end]
        errors = torch.zeros_like(part)
        for i in range(end - start):
            value = (part[:, i] / scale[:, start + i]).round().clamp(-8, 7) * scale[:, start + i]
            found[:, start + i] = value
            errors[:, i] = (part[:, i] - value) / u[i, i]
            part[:, i + 1 :] -= errors[:, i : i + 1] * u[i, i + 1 :]
        left[:, end:] -= errors @ upper[start:end, end:]
    out = torch.empty_like(found)
    out[:, order] = found
    return out


def main(folder, corpus, text, tokens="8192"):
    tokens = int(tokens) // WINDOW * WINDOW
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    raw = lzma.open(corpus).read((65536 + tokens) * 2)
    ids = torch.from_numpy(np.frombuffer(raw, dtype="<u2")[65536:].astype(np.int64)).view(-1, WINDOW)
    text = AutoTokenizer.from_pretrained(folder)(open(text).read()[:9000], add_special_tokens=False)["input_ids"]
    test = torch.tensor(text[: 2 * WINDOW]).view(2, WINDOW)

    hessians = {}

    def watch(name):
        def hook(_, arguments):
            x = arguments[0].reshape(-1, arguments[0].shape[-1])
            hessians[name] = hessians.get(name, 0) + x.T @ x / tokens

        return hook

    names = {f"model.layers.{layer}.{first}": first for layer in LAYERS for first in INPUTS}
    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    with torch.no_grad():
        for i in range(0, len(ids), 2):
            model.model(ids[i : i + 2], use_cache=False)
        [hook.remove() for hook in hooks]
        base = torch.log_softmax(model(test).logits, -1)
        groups = [[name.replace(first, other) for other in INPUTS[first]] for name, first in names.items()]
        weights = {name: model.get_submodule(name).weight.data.clone() for group in groups for name in group}

        def measure(what, quantize):
            for name, group in zip(names, groups):
                for other in group:
                    model.get_submodule(other).weight.data = quantize(weights[other], hessians[name])
            found = torch.log_softmax(model(test).logits, -1)
            print(f"{what}: mean KL {(base.exp() * (base - found)).sum(-1).mean():.4f}", flush=True)

        def blocks(w):
            return w.view(w.shape[0], -1, GROUP)

        measure("round to nearest", lambda w, h: rounded(blocks(w), fit(blocks(w))).view_as(w))
        measure("searched scales alone", lambda w, h: rounded(blocks(w), search(w, h)).view_as(w))
        measure("gptq, scales of the range, damping 0.01", lambda w, h: gptq(w, h, fit(blocks(w)), 0.01))
        for damping in [0.01, 0.05, 0.1]:
            measure(f"gptq, searched scales, damping {damping}", lambda w, h: gptq(w, h, search(w, h), damping))


if __name__ == "__main__":
    main(*sys.argv[1:])
