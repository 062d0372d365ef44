"""Lathe's quantization against llm-compressor's, on one model, one calibration text, one format, in one run on this machine.

usage: quantize_peers.py MODEL_DIR TEXT --calibration TOKENS.json --lathe BIN --peer-python PYTHON --work DIR
                         [--only rtn,gptq,awq] [--tools lathe,llm-compressor] [--tokens 24576] [--group 64] [--threads 2] [--results FILE.jsonl]

Both quantize MODEL_DIR (a folder in bf16) to symmetric int4 with a scale for each `--group` weights, every linear layer but the head,
with the first `--tokens` ids of TOKENS.json in windows of 512 (a JSON array of ids). What each wrote is
scored by `lathe eval --base MODEL_DIR` on TEXT in windows of 512: mean KL to the base in nats a token, perplexity. Wall time is of the whole
process, peak memory the largest resident set of it. Each tool runs alone, with the same number of threads. Nothing here is a pass
mark: the table goes into docs/quantization.md with machine and date. The first failure ends the run.

The peer, from public packages only: python -m venv V; V/bin/pip install llmcompressor; PYTHON is V/bin/python.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

PEER = '''
import json, sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot

model_dir, out, method, tokens, count, group, threads = sys.argv[1:8]
torch.set_num_threads(int(threads))
torch.manual_seed(0)
ids = json.load(open(tokens))[: int(count)]
windows = [ids[at : at + 512] for at in range(0, len(ids), 512)]
data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(it) for it in windows]})
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group)}
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
if method == "rtn":
    from llmcompressor.modifiers.quantization import QuantizationModifier as Modifier
elif method == "gptq":
    from llmcompressor.modifiers.quantization import GPTQModifier as Modifier
else:
    from llmcompressor.modifiers.awq import AWQModifier as Modifier
recipe = Modifier(config_groups=groups, ignore=["lm_head"])
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
calibration = {} if method == "rtn" else dict(dataset=data, num_calibration_samples=len(windows), max_seq_length=512)
oneshot(model=model, recipe=recipe, tokenizer=None, processor=None, **calibration)
model.save_pretrained(out, save_compressed=True)
'''


def timed(command, env=None):
    """Seconds and the largest resident set, in bytes, of a command."""
    began = time.perf_counter()
    child = subprocess.Popen([str(it) for it in command], env={**os.environ, **(env or {})})
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit {child.returncode}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--calibration", type=pathlib.Path, required=True)
    parser.add_argument("--lathe", required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="rtn,gptq,awq")
    parser.add_argument("--tools", default="lathe,llm-compressor")
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=pathlib.Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    script = args.work / "peer.py"
    script.write_text(PEER)
    rows = []
    for method in args.only.split(","):
        for tool in args.tools.split(","):
            out = args.work / f"{tool}-{method}"
            shutil.rmtree(out, ignore_errors=True)
            if tool == "lathe":
                command = [args.lathe, "quantize", args.model, out, "--format", "w4a16", "--group", args.group, "--method", method]
                command += ["--threads", args.threads]
                if method != "rtn":
                    command += ["--calibration", args.calibration, "--calibration-tokens", args.tokens]
                seconds, peak = timed(command)
            else:
                command = [args.peer_python, script, args.model, out, method, args.calibration, args.tokens, args.group, args.threads]
                seconds, peak = timed(command, {"OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""})
                shutil.copy(args.model / "tokenizer.json", out)
            score = [args.lathe, "eval", out, "--base", args.model, "--text", args.text, "--context", 512, "--json", "--threads", args.threads]
            result = subprocess.run(list(map(str, score)), capture_output=True, text=True)
            if result.returncode != 0:
                sys.exit(f"{' '.join(map(str, score))}: {result.stderr[-2000:]}")
            score = json.loads(result.stdout)
            row = {"method": method, "tool": tool, "seconds": seconds, "peak_bytes": peak}
            row |= {key: score[key] for key in ("kl_mean", "perplexity", "base_perplexity", "tokens")}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print("| method | tool | mean KL | perplexity | wall s | peak MB |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['method']} | {row['tool']} | {row['kl_mean']:.4f} | {row['perplexity']:.2f} | {row['seconds']:.0f} | {row['peak_bytes'] / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
