"""How much drafts speed up decoding, by kind of question.

    python3 tests/peers/spec_bench.py LATHE MODEL QUESTIONS.jsonl [--drafts ngram DIR ngram,DIR]
        [--each 4] [--tokens 128] [--threads 2]

QUESTIONS has a JSON object a line with `category` and `turns` (Spec-Bench's format). For each kind
the first questions are answered greedily, plain and with each drafter, by turns, so that all see the
same machine. Times are those from the first token to the last, of all answers of a kind together.
The texts are compared: drafts change no token where the model's margins exceed rounding.
"""

import argparse
import json
import subprocess
from collections import defaultdict


def run(lathe, model, prompt, draft, options):
    command = [lathe, "run", model, "--json", "--temperature", "0", "--draft", draft]
    command += ["--max-tokens", str(options.tokens), "--threads", str(options.threads)]
    done = subprocess.run(command, input=prompt, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("lathe")
    parser.add_argument("model")
    parser.add_argument("questions")
    parser.add_argument("--drafts", nargs="+", default=["ngram"])
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    kinds = defaultdict(list)
    with open(options.questions) as lines:
        for line in lines:
            question = json.loads(line)
            kinds[question["category"]].append(question["turns"][0])
    drafts = ["none", *options.drafts]
    totals = defaultdict(lambda: defaultdict(float))
    ratios = defaultdict(list)
    same = compared = 0
    print("kind | plain tokens/s |" + " | ".join(f" {it}: speed-up, tokens a step" for it in options.drafts))
    for kind, questions in kinds.items():
        totals.clear()
        for question in questions[: options.each]:
            texts = {}
            for draft in drafts:
                answer = run(options.lathe, options.model, question, draft, options)
                tokens = answer["generated_tokens"] - 1
                if tokens < 1:
                    continue
                total = totals[draft]
                total["tokens"] += tokens
                total["seconds"] += tokens / answer["decode_tokens_per_s"]
                total["accepted"] += answer["accepted"]
                texts[draft] = answer["token_ids"]
            for draft in options.drafts:
                compared += 1
                same += texts.get(draft) == texts.get("none")
        rate = {draft: total["tokens"] / total["seconds"] for draft, total in totals.items()}
        cells = []
        for draft in options.drafts:
            total = totals[draft]
            ratio = rate[draft] / rate["none"]
            ratios[draft].append(ratio)
            steps = total["tokens"] - total["accepted"]
            cells.append(f"{ratio:.2f}, {total['tokens'] / steps:.2f}")
        print(f"{kind} | {rate['none']:.0f} | " + " | ".join(cells), flush=True)
    for draft in options.drafts:
        mean = sum(ratios[draft]) / len(ratios[draft])
        print(f"{draft}: mean speed-up {mean:.2f}, least {min(ratios[draft]):.2f}")
    print(f"{same} of {compared} texts are the plain ones")


main()
