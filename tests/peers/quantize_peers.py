"""Lathe's quantization against llm-compressor's and llama.cpp's, on one model, one calibration text, one format, in one run on this machine.

usage: quantize_peers.py MODEL_DIR TEXT --calibration TEXT --lathe BIN [--peer-python PYTHON] [--llama-dir DIR] --work DIR
                         [--only rtn,q4_k,gptq,awq] [--tools lathe,llm-compressor,llama.cpp] [--tokens 24576] [--group 64]
                         [--threads 2] [--wrap "taskset -c 0,1"] [--results FILE.jsonl] [--until SECONDS]

MODEL_DIR is a folder in bf16. The first `--tokens` (a multiple of 512) ids of the calibration text go to all tools, in windows of 512.
  rtn, gptq, awq   symmetric int4 with a scale for each `--group` weights, every linear layer but the head: Lathe and llm-compressor
  q4_k             GGUF's Q4_K by an importance matrix, embedding and head in Q8_0: Lathe (`imatrix`) and llama.cpp (`llama-imatrix`,
                   then `llama-quantize --pure`, from the same weights as a GGUF in bf16, which `lathe convert` makes beforehand)
Checked in each run: llama.cpp's tokenizer gives the ids that the others get, both files of a pair have the same tensors in the same formats.

What each wrote is scored by `lathe eval --base MODEL_DIR` on TEXT in windows of 512: mean KL to the base in nats a token, perplexity. Wall
time is of whole processes (llama.cpp's two added), peak memory the largest resident set of one. Each tool runs alone with the same
number of threads. Each row is appended to `--results` at once, and what is there already is not measured again. Nothing here is a
pass mark: the table goes into docs/quantization.md with machine and date. The first failure ends the run.

The peers, from public packages only:
  llm-compressor  python -m venv V; V/bin/pip install llmcompressor; PYTHON is V/bin/python
  llama.cpp       as in cpu_peers.py, and `ninja llama-imatrix llama-quantize llama-tokenize`; DIR is the build's bin/
The script's own Python needs tokenizers, and gguf for q4_k.
"""

import argparse
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

PEERS = {"rtn": "llm-compressor", "gptq": "llm-compressor", "awq": "llm-compressor", "q4_k": "llama.cpp"}
WINDOW = 512

LLM_COMPRESSOR = '''
import json, sys
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot

model_dir, out, method, tokens, group, threads = sys.argv[1:7]
torch.set_num_threads(int(threads))
torch.manual_seed(0)
ids = torch.tensor(json.load(open(tokens))).view(-1, 512)
data = DataLoader([{"input_ids": it, "attention_mask": torch.ones_like(it)} for it in ids], batch_size=1)
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group)}
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
recipe = [(GPTQModifier if method == "gptq" else QuantizationModifier)(config_groups=groups, ignore=["lm_head"])]
if method == "awq":
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    recipe.insert(0, AWQModifier())
    # It pins inputs for copies to an accelerator whether there is one or not, which fails where there is none.
    IntermediatesCache.pin_memory = lambda *_: None
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
calibration = {} if method == "rtn" else {"dataset": data, "num_calibration_samples": len(ids)}
oneshot(model=model, recipe=recipe, tokenizer=None, processor=None, **calibration)
model.save_pretrained(out, save_compressed=True)
'''


def plain(command, env=None):
    """What a command prints. Its failure ends the run."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, **(env or {})})
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit {result.returncode}\n{result.stderr[-2000:]}")
    return result.stdout


def timed(args, command):
    """Seconds and the largest resident set, in bytes, of a command with `--threads` threads and no accelerator; what it says goes to WORK/log."""
    command = [*shlex.split(args.wrap), *map(str, command)]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
    log = args.work / "log"
    with log.open("wb") as file:
        began = time.perf_counter()
        child = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit {child.returncode}\n{log.read_text(errors='replace')[-4000:]}")
    return seconds, usage.ru_maxrss * 1024


def calibration_ids(args):
    """A file with the ids that all tools calibrate on, as a JSON array. Tokenized in a process of its own, which keeps this one small."""
    if args.tokens % WINDOW != 0:
        sys.exit(f"--tokens {args.tokens} is no multiple of {WINDOW}")
    code = (
        "import json, sys; from tokenizers import Tokenizer; text = open(sys.argv[2], encoding='utf-8', newline='').read(); "
        "print(json.dumps(Tokenizer.from_file(sys.argv[1]).encode(text, add_special_tokens=False).ids))"
    )
    ids = json.loads(plain([sys.executable, "-c", code, args.model / "tokenizer.json", args.calibration]))
    if len(ids) < args.tokens:
        sys.exit(f"{args.calibration} has {len(ids)} tokens, fewer than {args.tokens}")
    path = args.work / "calibration.json"
    path.write_text(json.dumps(ids[: args.tokens]))
    return path, ids


def base_gguf(args, ids):
    """The base as a GGUF, for llama.cpp, whose tokenizer must give `ids`."""
    path = args.work / "base.gguf"
    if not path.exists():
        plain([args.lathe, "convert", args.model, path, "--to", "gguf"])
    text = plain([args.llama_dir / "llama-tokenize", "-m", path, "-f", args.calibration, "--ids", "--log-disable"])
    theirs = json.loads(text[text.index("[") :])
    if theirs != ids:
        sys.exit(f"llama.cpp's tokenizer gives {len(theirs)} other ids than the {len(ids)} of {args.calibration}")
    return path


def run_lathe(args, method, out, tokens):
    command = [args.lathe, "quantize", args.model, out, "--threads", args.threads]
    if method == "q4_k":
        command += ["--format", "q4_k", "--method", "imatrix"]
    else:
        command += ["--format", "w4a16", "--group", args.group, "--method", method]
    if method != "rtn":
        command += ["--calibration", tokens[0], "--calibration-tokens", args.tokens]
    return timed(args, command)


def run_llm_compressor(args, method, out, tokens):
    script = args.work / "llm_compressor.py"
    script.write_text(LLM_COMPRESSOR)
    figures = timed(args, [args.peer_python, script, args.model, out, method, tokens[0], args.group, args.threads])
    shutil.copy(args.model / "tokenizer.json", out)
    return figures


def run_llama_cpp(args, method, out, tokens):
    base, matrix = base_gguf(args, tokens[1]), args.work / "imatrix.gguf"
    matrix.unlink(missing_ok=True)
    command = [args.llama_dir / "llama-imatrix", "-m", base, "-f", args.calibration, "-o", matrix, "-c", WINDOW]
    first = timed(args, [*command, "--chunks", args.tokens // WINDOW, "--parse-special", "--no-ppl", "-t", args.threads])
    command = [args.llama_dir / "llama-quantize", "--imatrix", matrix, "--pure", "--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
    second = timed(args, [*command, base, out, "Q4_K", args.threads])
    return first[0] + second[0], max(first[1], second[1])


TOOLS = {"lathe": run_lathe, "llm-compressor": run_llm_compressor, "llama.cpp": run_llama_cpp}


def formats(path):
    """The format of each tensor of a GGUF; of a folder the shape of each packed matrix."""
    if path.suffix == ".gguf":
        code = "import json, sys; from gguf import GGUFReader as R; print(json.dumps({t.name: t.tensor_type.name for t in R(sys.argv[1]).tensors}))"
        return json.loads(plain([sys.executable, "-c", code, path]))
    found = {}
    for shard in sorted(path.glob("*.safetensors")):
        with shard.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found |= {name: it["shape"] for name, it in header.items() if name.endswith((".weight_packed", ".weight_scale"))}
    return found


def check_same_formats(outs):
    """Both files of a pair hold the same tensors in the same formats, or the run ends."""
    ours, theirs = map(formats, outs)
    if not ours or ours != theirs:
        names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        told = "; ".join(f"{name}: {ours.get(name)}, {theirs.get(name)}" for name in names[:5])
        sys.exit(f"{outs[0]} and {outs[1]} differ in {len(names)} tensors: {told}")


def score(args, out):
    command = [args.lathe, "eval", out, "--base", args.model, "--text", args.text, "--context", WINDOW, "--json", "--threads", args.threads]
    result = json.loads(plain([*shlex.split(args.wrap), *command]))
    return {key: result[key] for key in ("kl_mean", "kl_p99", "top1_agreement", "perplexity", "base_perplexity", "tokens")}


def table(rows):
    print("| method | tool | mean KL | perplexity | wall s | peak MB | KL, time, memory over the peer's |\n|---|---|---|---|---|---|---|")
    for row in rows:
        peer = next((it for it in rows if it["method"] == row["method"] and it["tool"] == PEERS[row["method"]]), None)
        over = "-"
        if row["tool"] == "lathe" and peer:
            over = ", ".join(f"{row[key] / peer[key]:.2f}" for key in ("kl_mean", "seconds", "peak_bytes"))
        figures = f"{row['kl_mean']:.4f} | {row['perplexity']:.2f} | {row['seconds']:.1f} | {row['peak_bytes'] / 1e6:.0f}"
        print(f"| {row['method']} | {row['tool']} | {figures} | {over} |")


def main():
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--calibration", type=pathlib.Path, required=True)
    parser.add_argument("--lathe", required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--llama-dir", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="rtn,q4_k,gptq,awq")
    parser.add_argument("--tools", default="lathe,llm-compressor,llama.cpp")
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wrap", default="", help="command in front of each tool, such as `taskset -c 0,1`")
    parser.add_argument("--results", type=pathlib.Path)
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which nothing new is begun")
    args = parser.parse_args()
    for method in args.only.split(","):
        if method not in PEERS:
            sys.exit(f"--only {method}: expected some of {', '.join(PEERS)}")
    tools = args.tools.split(",")
    for tool, place in {"llm-compressor": args.peer_python, "llama.cpp": args.llama_dir}.items():
        if tool in tools and not place and any(PEERS[it] == tool for it in args.only.split(",")):
            sys.exit(f"{tool} needs --peer-python" if tool == "llm-compressor" else f"{tool} needs --llama-dir")
    args.work.mkdir(parents=True, exist_ok=True)
    tokens = calibration_ids(args)
    measured = [json.loads(line) for line in args.results.open()] if args.results and args.results.exists() else []
    rows = []
    for method in args.only.split(","):
        outs = []
        for tool in ("lathe", PEERS[method]):
            if tool not in tools:
                continue
            out = args.work / (f"{tool}-{method}" + (".gguf" if method == "q4_k" else ""))
            key = {"method": method, "tool": tool, "calibration_tokens": args.tokens, "group": args.group, "threads": args.threads, "text": args.text.name}
            row = next((it for it in measured if it.items() >= key.items()), None)
            if row is None:
                if time.perf_counter() - began > args.until:
                    table(rows)
                    print(f"stopped after {args.until} s: call again to go on", file=sys.stderr)
                    return
                shutil.rmtree(out, ignore_errors=True)
                out.unlink(missing_ok=True)
                seconds, peak = TOOLS[tool](args, method, out, tokens)
                row = {**key, "seconds": seconds, "peak_bytes": peak, "wrap": args.wrap, "date": time.strftime("%Y-%m-%d"), **score(args, out)}
                print(json.dumps(row), file=sys.stderr)
                if args.results:
                    with args.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            rows.append(row)
            outs.append(out)
        if len(outs) == 2 and all(it.exists() for it in outs):
            check_same_formats(outs)
    table(rows)


if __name__ == "__main__":
    main()
