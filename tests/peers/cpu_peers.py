"""Lathe against llama.cpp and OpenVINO GenAI on the same GGUF files, alternated, on this machine.

usage: cpu_peers.py [--lathe BIN] [--llama-dir DIR] [--openvino-python PYTHON] [--only TOOL,..] [--threads 2] [--rounds 3]
                    [--isa NAME] [--wrap "chrt -f 10"] [--short] [--results FILE.jsonl] [--until SECONDS] MODEL.gguf [MODEL.gguf ...]
       cpu_peers.py --combine FILE.jsonl [FILE.jsonl ...]

The tools are `lathe`, `llama.cpp` and `openvino`; those whose place is given are measured, or those of them that `--only` names.
Each round runs Lathe and then each peer, so that a drift of the machine's speed meets all of them. What a tool gave is appended
to `--results` at once, and what is in that file already is not measured again, so a run that was cut off goes on and tools can
be measured by separate calls. `--combine` prints the table of such files: medians over the rounds, and the ratio of Lathe to
the best peer. The first failure ends the run. Nothing here is a pass mark: the table goes into docs/performance.md with machine and date.

What is measured, with the same numbers of tokens for all:
  prefill   tokens a second of a prompt of 512 (128 with --short)
  decode    tokens a second of one sequence after that prompt, 64 tokens (32 with --short)
  batch8    tokens a second of 8 sequences after prompts of 128, 32 tokens each (64 and 16 with --short)
  steps     a step of 2, 4, 8, 16 tokens after the same prompt over a step of one. Lathe computes the logits of each token, as
            verifying a draft needs; llama-bench only those of the last
  start     seconds from the start of the process to its end with one token after a prompt of a few, files in the page cache. OpenVINO's
            clock starts after Python and its modules are loaded
OpenVINO computes in the precision of its own choice (bf16 where there is AMX, else f32) with its continuous batching, without its
prefix cache; the GGUF's weights become its own formats. It does not read bf16 from GGUF: for MODEL-bf16.gguf it gets MODEL-f16.gguf.

How to get the peers, from public packages only:
  llama.cpp   pip download --no-binary :all: --no-deps llama-cpp-python; the sources are in its vendor/llama.cpp, the commit in its CHANGELOG.md.
              Build it with clang >= 16 (built by gcc 12 its AMX prefill crashes, llama.cpp's issue 20824):
              cmake -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_COMPILER=clang-19 -DCMAKE_CXX_COMPILER=clang++-19 -DGGML_NATIVE=OFF
                    -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_COMMIT=...
              ninja llama-bench llama-batched-bench llama-completion (and the targets ggml-cpu-VARIANT); DIR is the build's bin/
  OpenVINO    python -m venv V; V/bin/pip install openvino-genai openvino-tokenizers; PYTHON is V/bin/python
Models: SmolLM2's GGUF, and make_random_gguf.py's.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

STEPS = [1, 2, 4, 8, 16]


class Sizes:
    """Tokens of the prompts and of what is generated."""

    def __init__(self, short):
        self.prompt, self.generate = (128, 32) if short else (512, 64)
        self.prompt8, self.generate8 = (64, 16) if short else (128, 32)
        self.name = f"{self.prompt}+{self.generate}, 8 x {self.prompt8}+{self.generate8}"


def run(args, command, env=None):
    """What a command prints, and the seconds that it took."""
    command = [*shlex.split(args.wrap), *map(str, command)]
    start = time.perf_counter()
    try:
        # What a random model says need not be UTF-8.
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", env={**os.environ, **(env or {})}, timeout=args.timeout)
    except OSError as error:
        sys.exit(f"{shlex.join(command)}: {error}")
    except subprocess.TimeoutExpired:
        sys.exit(f"{shlex.join(command)}: not finished after {args.timeout} s")
    if result.returncode != 0:
        sys.exit(f"{shlex.join(command)}: exit {result.returncode}\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}")
    return result.stdout, time.perf_counter() - start


def lathe(args, sizes, model):
    env = {"LATHE_ISA": args.isa} if args.isa else {}
    common = [model, "--json", "--threads", args.threads]
    version, _ = run(args, [args.lathe, "--version"])
    binary = hashlib.sha256(pathlib.Path(args.lathe).read_bytes()).hexdigest()
    bench = [args.lathe, "bench", *common, "--repeat", 2]
    steps = ",".join(map(str, STEPS))
    one = json.loads(run(args, [*bench, "--prompt", sizes.prompt, "--generate", sizes.generate, "--step-tokens", steps], env)[0])
    eight = json.loads(run(args, [*bench, "--prompt", sizes.prompt8, "--generate", sizes.generate8, "--batch", 8], env)[0])
    _, seconds = run(args, [args.lathe, "run", *common, "--prompt-ids", "5,6,7", "--max-tokens", 1, "--temperature", 0], env)
    return {
        # The version alone does not tell one build from the next.
        "version": f"{version.strip()} (binary {binary[:12]}{f', {args.isa}' if args.isa else ''})",
        "prefill": one["prefill_tokens_per_s"],
        "decode": one["decode_tokens_per_s"],
        "batch8": eight["decode_tokens_per_s"],
        "steps_ms": {s["tokens"]: s["step_ms"] for s in one["steps"]},
        "start": seconds,
        "load_ms": one["load_ms"],
        "read_gb_s": one["measured_read_gb_s"],
        "fraction": one["fraction_of_bandwidth"],
    }


def llama_cpp(args, sizes, model):
    tool = lambda name: pathlib.Path(args.llama_dir) / name
    common = ["-m", model, "-t", args.threads]
    bench = [tool("llama-bench"), *common, "-o", "json"]
    steps = ",".join(map(str, STEPS))
    rows = json.loads(run(args, [*bench, "-r", 2, "-p", sizes.prompt, "-n", 0])[0])
    rows_at_depth = json.loads(run(args, [*bench, "-r", 5, "-p", steps, "-n", sizes.generate, "-d", sizes.prompt])[0])
    batched, _ = run(args, [tool("llama-batched-bench"), *common, "-c", 8 * (sizes.prompt8 + sizes.generate8), "-npp", sizes.prompt8,
                            "-ntg", sizes.generate8, "-npl", 8, "--output-format", "jsonl"])
    eight = json.loads([line for line in batched.splitlines() if line.startswith("{")][-1])
    _, seconds = run(args, [tool("llama-completion"), *common, "-p", "one two", "-n", 1, "-no-cnv", "--no-warmup", "-c", 512])
    median_ms = lambda row: statistics.median(row["samples_ns"]) / 1e6
    [prefill] = rows
    [decode] = [r for r in rows_at_depth if r["n_gen"] > 0]
    return {
        "version": f"llama.cpp {prefill['build_commit']}",
        "prefill": prefill["n_prompt"] / median_ms(prefill) * 1e3,
        "decode": decode["n_gen"] / median_ms(decode) * 1e3,
        "batch8": eight["speed_tg"],
        "steps_ms": {r["n_prompt"]: median_ms(r) for r in rows_at_depth if r["n_gen"] == 0},
        "start": seconds,
    }


# Runs in the Python that has OpenVINO's packages: argument 1 is JSON.
OPENVINO = r"""
import json, sys, time
import numpy as np, openvino as ov, openvino_genai as genai
sizes = json.loads(sys.argv[1])
start = time.perf_counter()
scheduler = genai.SchedulerConfig()
# As LLMPipeline sets it for one user, but for the prefix cache.
scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.enable_prefix_caching = 1, 1 << 16, False
properties = {"INFERENCE_NUM_THREADS": sizes["threads"], "scheduler_config": scheduler}
if sizes["precision"]:
    properties["INFERENCE_PRECISION_HINT"] = sizes["precision"]
pipeline = genai.LLMPipeline(sizes["model"], "CPU", **properties)
rng = np.random.default_rng(1)

def go(batch, prompt, tokens):
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample, config.apply_chat_template = tokens, True, False, False
    ids = rng.integers(1000, 40000, (batch, prompt))
    clock = time.perf_counter()
    result = pipeline.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config)
    seconds = time.perf_counter() - clock
    lengths = [len(row) for row in result.tokens]
    assert lengths == [tokens] * batch, lengths
    first = result.perf_metrics.get_ttft().mean / 1e3
    return first, batch * (tokens - 1) / (seconds - first) if tokens > 1 else None

go(1, 3, 1)
started = time.perf_counter() - start
go(8, 16, 4)
runs = [go(1, sizes["prompt"], 1 + sizes["generate"]) for _ in range(2)]
eight = [go(8, sizes["prompt8"], 1 + sizes["generate8"]) for _ in range(2)]
print(json.dumps({
    "version": f"OpenVINO GenAI {genai.__version__}" + (f" ({sizes['precision']})" if sizes["precision"] else ""),
    "prefill": sizes["prompt"] / np.median([first for first, _ in runs]),
    "decode": float(np.median([rate for _, rate in runs])),
    "batch8": float(np.median([rate for _, rate in eight])),
    "start": started,
}))
"""


def openvino(args, sizes, model):
    if model.stem.endswith("-bf16"):
        model = model.with_stem(model.stem.removesuffix("bf16") + "f16")
        if not model.exists():
            sys.exit(f"OpenVINO does not read bf16 from GGUF; it needs {model} with the same weights in f16")
    about = {**vars(sizes), "model": str(model), "threads": args.threads, "precision": args.openvino_precision}
    output, _ = run(args, [args.openvino_python, "-c", OPENVINO, json.dumps(about)])
    return json.loads(output.splitlines()[-1])


TOOLS = {"lathe": lathe, "llama.cpp": llama_cpp, "openvino": openvino}


def machine():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    about = {key.strip(): value for key, _, value in (line.partition(":") for line in lines)}
    extensions = [f for f in ["avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"] if f in about["flags"].split()]
    return f"{about['model name'].strip()} ({' '.join(extensions)})"


def measure(args, tools):
    """Measures what the results do not have yet; all of them."""
    sizes = Sizes(args.short)
    results = pathlib.Path(args.results) if args.results else None
    records = read([results]) if results and results.exists() else []
    started = time.perf_counter()
    for model in map(pathlib.Path, args.models):
        for round in range(args.rounds):
            for tool in tools:
                key = {"model": model.stem, "round": round, "tool": tool, "sizes": sizes.name, "threads": args.threads, "machine": machine()}
                if any(key.items() <= record.items() for record in records):
                    continue
                if time.perf_counter() - started > args.until:
                    print(f"stopped after {args.until} s: call again to go on", file=sys.stderr)
                    return records
                print(f"{time.strftime('%H:%M:%S')} {model.stem}, round {round}: {tool} ...", end="", file=sys.stderr, flush=True)
                clock = time.perf_counter()
                record = {**key, "date": time.strftime("%Y-%m-%d"), "wrap": args.wrap, **TOOLS[tool](args, sizes, model)}
                # Keys as JSON has them, so that a record read back is the same.
                record = json.loads(json.dumps(record))
                print(f" {time.perf_counter() - clock:.0f} s", file=sys.stderr, flush=True)
                records.append(record)
                if results:
                    with results.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    return records


def read(paths):
    return [json.loads(line) for path in paths for line in pathlib.Path(path).read_text().splitlines()]


def row(model, what, unit, better, values):
    """A line of the table: `values` has each tool's list, one a round."""
    cells = {tool: statistics.median(list) if list else None for tool, list in values.items()}
    peers = [value for tool, value in cells.items() if tool != "lathe" and value is not None]
    own, ratio = cells.get("lathe"), ""
    if own is not None and peers:
        ratio = f"{own / max(peers) if better == 'more' else min(peers) / own:.2f}"
    figures = [f"{value:.3g}" if value is not None and value < 100 else f"{value:.0f}" if value is not None else "" for value in cells.values()]
    print(f"| {model} | {what}{unit} | " + " | ".join(figures) + f" | {ratio} |")


def table(records):
    groups = {}
    for record in records:
        groups.setdefault((record["machine"], record["threads"], record["sizes"]), []).append(record)
    for (machine, threads, sizes), group in groups.items():
        tools = [tool for tool in TOOLS if any(record["tool"] == tool for record in group)]
        versions = sorted({record["version"] for record in group})
        dates = sorted({record["date"] for record in group})
        rounds = len({record["round"] for record in group})
        print(f"\n{machine}, {threads} threads, {', '.join(dates)}; {', '.join(versions)}; tokens {sizes}; medians of up to {rounds} rounds\n")
        print("| model | what | " + " | ".join(tools) + " | Lathe to the best peer |")
        print("|---|---|" + "---|" * (len(tools) + 1))
        for model in dict.fromkeys(record["model"] for record in group):
            of = lambda tool: [r for r in group if (r["tool"], r["model"]) == (tool, model)]
            take = lambda get: {tool: [v for v in map(get, of(tool)) if v is not None] for tool in tools}
            for what in ["decode", "prefill", "batch8"]:
                row(model, what, " tokens/s", "more", take(lambda r: r.get(what)))
            for tokens in STEPS[1:]:
                ratio = lambda r: r["steps_ms"][str(tokens)] / r["steps_ms"]["1"] if "steps_ms" in r else None
                row(model, f"step of {tokens}", " to a step of 1", "less", take(ratio))
            row(model, "start to first token", " s", "less", take(lambda r: r.get("start")))
            row(model, "decode", " of the read limit that `lathe bench` measured", "more", take(lambda r: r.get("fraction")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lathe")
    parser.add_argument("--llama-dir")
    parser.add_argument("--openvino-python")
    parser.add_argument("--openvino-precision", help="bf16 or f32 in place of OpenVINO's own choice")
    parser.add_argument("--only", help="tools to measure, with commas between them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--isa", help="LATHE_ISA of Lathe's runs")
    parser.add_argument("--wrap", default="", help="command in front of each tool, such as `taskset -c 0,1`")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--results")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which nothing new is begun")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one command may take")
    parser.add_argument("--combine", nargs="+", metavar="FILE.jsonl")
    parser.add_argument("models", nargs="*")
    args = parser.parse_args()

    if args.combine:
        return table(read(args.combine))
    places = {"lathe": args.lathe, "llama.cpp": args.llama_dir, "openvino": args.openvino_python}
    tools = args.only.split(",") if args.only else [tool for tool, place in places.items() if place]
    for tool in tools:
        if not places.get(tool):
            parser.error(f"--only {tool}: the tools are {', '.join(places)}, and the place of each must be given")
    if not tools or not args.models:
        parser.error("nothing to measure: give the place of a tool, and models")
    table(measure(args, tools))


if __name__ == "__main__":
    main()
