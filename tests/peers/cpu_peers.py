"""Lathe against llama.cpp and OpenVINO GenAI on the same GGUF files, paired and alternated, on this machine.

usage: cpu_peers.py --lathe BIN [--llama-dir DIR] [--openvino] [--threads 2] [--rounds 3] [--isa NAME] MODEL.gguf [MODEL.gguf ...]

DIR holds llama.cpp's llama-bench and llama-batched-bench. Each round runs Lathe and then each peer, so that a drift of the
machine's speed meets all of them; the table gives medians over the rounds and the ratio Lathe : best peer. `--openvino` needs the packages
openvino-genai and openvino-tokenizers. Nothing here is a pass mark: the table goes into docs/performance.md with machine and date.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time


def run(command, env=None):
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit {result.returncode}\n{result.stderr[-2000:]}")
    return result.stdout


def lathe(args, model):
    env = {"LATHE_ISA": args.isa} if args.isa else {}
    base = [args.lathe, "bench", model, "--json", "--threads", str(args.threads)]
    one = json.loads(run([*base, "--prompt", "512", "--generate", "64"], env))
    eight = json.loads(run([*base, "--prompt", "128", "--generate", "32", "--batch", "8"], env))
    steps = json.loads(run([*base, "--step-tokens", "1,2,4,8,16"], env))["steps"]
    return {
        "decode": one["decode_tokens_per_s"],
        "prefill": one["prefill_tokens_per_s"],
        "batch8": eight["decode_tokens_per_s"],
        "fraction": one["fraction_of_bandwidth"],
        "read_gb_s": one["measured_read_gb_s"],
        "steps": {s["tokens"]: s["step_ms"] for s in steps},
        "load_ms": one["load_ms"],
    }


def llama_cpp(args, model):
    tool = lambda name: str(pathlib.Path(args.llama_dir) / name)
    common = ["-m", model, "-t", str(args.threads)]
    rows = json.loads(run([tool("llama-bench"), *common, "-p", "512", "-n", "64", "-r", "2", "-o", "json"]))
    by = {("prefill" if r["n_gen"] == 0 else "decode"): r["avg_ts"] for r in rows}
    rows = json.loads(run([tool("llama-bench"), *common, "-p", "2,4,8,16", "-n", "0", "-r", "10", "-o", "json"]))
    steps = {r["n_prompt"]: r["n_prompt"] / r["avg_ts"] * 1e3 for r in rows}
    steps[1] = 1e3 / by["decode"]
    batched = run([tool("llama-batched-bench"), *common, "-c", "2048", "-npp", "128", "-ntg", "32", "-npl", "8", "--output-format", "jsonl"])
    eight = json.loads([line for line in batched.splitlines() if line.startswith("{")][-1])["speed_tg"]
    return {**by, "batch8": eight, "steps": steps}


OPENVINO = r"""
import json, sys, time, numpy as np, openvino as ov, openvino_genai as g
model, threads = sys.argv[1], int(sys.argv[2])
pipe = g.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)
def go(prompt, tokens):
    c = g.GenerationConfig(); c.max_new_tokens = tokens; c.ignore_eos = True; c.do_sample = False
    ids = np.random.default_rng(1).integers(10, 40000, (1, prompt))
    r = pipe.generate(g.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), c)
    return r.perf_metrics
go(16, 4)
m = go(512, 64)
print(json.dumps(dict(prefill=512e3 / m.get_ttft().mean, decode=1e3 / m.get_tpot().mean)))
"""


def openvino(args, model):
    return json.loads(run([sys.executable, "-c", OPENVINO, model, str(args.threads)]).splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lathe", required=True)
    parser.add_argument("--llama-dir")
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--isa")
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()

    tools = {"lathe": lathe}
    if args.llama_dir:
        tools["llama.cpp"] = llama_cpp
    if args.openvino:
        tools["openvino"] = openvino

    median = lambda values: statistics.median(values) if values else float("nan")
    print(f"{args.threads} threads, {args.rounds} rounds, {time.strftime('%Y-%m-%d')}")
    print("| model | what | " + " | ".join(tools) + " | lathe : best peer |")
    print("|---|---|" + "---|" * (len(tools) + 1))
    for model in args.models:
        seen = {name: [] for name in tools}
        for _ in range(args.rounds):
            for name, tool in tools.items():
                seen[name].append(tool(args, model))
        label = pathlib.Path(model).stem
        for what in ["decode", "prefill", "batch8"]:
            cells = {n: median([r[what] for r in rows if what in r]) for n, rows in seen.items()}
            peers = [v for n, v in cells.items() if n != "lathe" and v == v]
            ratio = f"{cells['lathe'] / max(peers):.2f}" if peers else "-"
            print(f"| {label} | {what} tok/s | " + " | ".join(f"{v:.1f}" for v in cells.values()) + f" | {ratio} |")
        for tokens in [2, 4, 8, 16]:
            cells = {n: median([r["steps"][tokens] / r["steps"][1] for r in rows if "steps" in r]) for n, rows in seen.items()}
            print(f"| {label} | step of {tokens} : step of 1 | " + " | ".join(f"{v:.2f}" for v in cells.values()) + " | |")
        last = seen["lathe"]
        print(f"| {label} | decode, of {median([r['read_gb_s'] for r in last]):.1f} GB/s read | {median([r['fraction'] for r in last]):.2f} |" + " |" * (len(tools)))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
