"""Compares the log-probabilities of `lathe score --adapter` with those of transformers and peft in f32, for random
adapters that peft itself makes and writes: all projections, patterns of ranks and alphas with rank stabilisation, and
a few modules in bf16 and f16.

usage: python adapters.py LATHE BASE_HF_DIR TEXT [--tokens N] [--keep DIR]
TEXT is a text file for BASE's tokenizer. Prints, for each adapter, the largest and the mean difference in nats, and by how
much the adapter itself moves log-probabilities. --keep DIR leaves the adapters there, in folders of their names."""

import argparse
import json
import pathlib
import subprocess
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

parser = argparse.ArgumentParser()
parser.add_argument("lathe")
parser.add_argument("base")
parser.add_argument("text")
parser.add_argument("--tokens", type=int, default=512)
parser.add_argument("--keep")
arguments = parser.parse_args()

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "all": (dict(r=16, lora_alpha=32, target_modules=PROJECTIONS), torch.float32),
    "patterns": (dict(r=8, lora_alpha=6, target_modules=PROJECTIONS, use_rslora=True,
                      rank_pattern={"q_proj": 4, r"layers\.[02]\..*down_proj": 24}, alpha_pattern={"o_proj": 11}), torch.float32),
    "few-bf16": (dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1, 5]), torch.bfloat16),
    "few-f16": (dict(r=3, lora_alpha=2, target_modules="all-linear", exclude_modules=["k_proj"]), torch.float16),
}


def load_base():
    return AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32).eval()


def make(folder, config, dtype):
    """An adapter whose B is not zero, as peft writes it, in `dtype`."""
    torch.manual_seed(1)
    model = get_peft_model(load_base(), LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    path = pathlib.Path(folder) / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def log_probabilities(model, tokens):
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].double()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def lathe(path, *more):
    command = [arguments.lathe, "score", arguments.base, "--tokens", str(path), "--json", *more]
    return torch.tensor(json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["logprobs"]).double()


tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{arguments.base}/tokenizer.json")
tokens = tokenizer(pathlib.Path(arguments.text).read_text())["input_ids"][: arguments.tokens]
with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(arguments.keep or scratch)
    folder.mkdir(exist_ok=True)
    ids = pathlib.Path(scratch) / "ids.json"
    ids.write_text(json.dumps(tokens))
    plain = log_probabilities(load_base(), tokens)
    worst = 0.0
    for name, (config, dtype) in CASES.items():
        adapter = folder / name
        make(adapter, config, dtype)
        expected = log_probabilities(PeftModel.from_pretrained(load_base(), adapter).eval(), tokens)
        line = f"{name}: {len(tokens)} tokens, the adapter moves {(expected - plain).abs().mean():.4f} nats on average"
        for mode in (["--exact"], []):
            off = (lathe(ids, "--adapter", str(adapter), *mode) - expected).abs()
            line += f"; lathe{' --exact' if mode else ''} is off by {off.max():.2e} at most, {off.mean():.2e} on average"
            worst = max(worst, off.max().item()) if mode else worst
        print(line, flush=True)
    assert worst < 1e-3, worst
