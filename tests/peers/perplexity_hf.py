"""Perplexity of SmolLM2 on a text: `lathe eval` next to Hugging Face transformers on the dequantized weights.

usage: python perplexity_hf.py LATHE MODEL.gguf TEXT [--context 1024] [--flags=--exact] [--flags="--device cpu"] [--windows N]

Both tokenize the text once, without special tokens, and score windows of `context` tokens that do
not overlap; the first token of a window is not scored. transformers computes in float32 from the
weights that `gguf` dequantizes. The exit code is 1 if the perplexities differ by more than 0.5 %.
Needs torch, transformers, gguf, numpy and tokenizers."""
import argparse, json, math, pathlib, shlex, subprocess, sys, tempfile

import gguf, numpy, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

TENSORS = dict(
    attn_norm="input_layernorm", ffn_norm="post_attention_layernorm", attn_q="self_attn.q_proj", attn_k="self_attn.k_proj",
    attn_v="self_attn.v_proj", attn_output="self_attn.o_proj", ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj")
WHOLE = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight", "output": "lm_head.weight"}


def read(path):
    """The model in float32, and the tokenizer."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")}
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    tokens = fields["tokenizer.ggml.tokens"]
    config = LlamaConfig(
        hidden_size=fields["llama.embedding_length"], intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"], num_attention_heads=heads, num_key_value_heads=kv_heads,
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"], max_position_embeddings=fields["llama.context_length"],
        rope_theta=fields["llama.rope.freq_base"], rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        vocab_size=len(tokens), tie_word_embeddings=True)
    state = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
        block, *rest = tensor.name.split(".")
        if block != "blk":
            state[WHOLE[block]] = torch.from_numpy(weight)
            continue
        # llama.cpp stores the rows of a head's query and key in rotation pairs; transformers in halves.
        count = {"attn_q": heads, "attn_k": kv_heads}.get(rest[1])
        if count:
            weight = weight.reshape(count, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        state[f"model.layers.{rest[0]}.{TENSORS[rest[1]]}.weight"] = torch.from_numpy(weight.copy())
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True)
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    return model.float().eval(), tokenizer


def score(model, ids, context, windows, device="cpu"):
    """Negative log-probability of all scored tokens, and how many they are."""
    total, count = 0.0, 0
    starts = list(range(0, len(ids), context))[:windows]
    with torch.no_grad():
        for number, start in enumerate(starts):
            window = torch.tensor(ids[start:start + context], device=device)
            if len(window) < 2:
                continue
            logits = model(window[None]).logits[0, :-1].double()
            chosen = torch.log_softmax(logits, -1).gather(1, window[1:, None])
            total, count = total - chosen.sum().item(), count + len(window) - 1
            print(f"\rtransformers: window {number + 1} of {len(starts)}, perplexity {math.exp(total / count):.4f}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return total, count


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lathe"), parser.add_argument("model"), parser.add_argument("text")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--flags", action="append", help="flags of `lathe eval`; may be repeated, one evaluation each")
    parser.add_argument("--windows", type=int, help="only so many windows, from the start of the text")
    parser.add_argument("--torch-device", default="cpu", help="where transformers computes")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model, tokenizer = read(arguments.model)
    text = pathlib.Path(arguments.text).read_text()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if arguments.windows:
        # Cut the text where both sides get the same tokens.
        ids = ids[:arguments.windows * arguments.context]
        encoding = tokenizer.encode(text, add_special_tokens=False)
        text = text[:encoding.offsets[len(ids) - 1][1]]
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    ours = {}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(text), file.flush()
        for flags in arguments.flags or ["--device cpu"]:
            command = [arguments.lathe, "eval", arguments.model, "--text", file.name, "--context", str(arguments.context), "--json", *shlex.split(flags)]
            ours[flags] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    nll, count = score(model.to(arguments.torch_device), ids, arguments.context, None, arguments.torch_device)
    theirs = math.exp(nll / count)
    failed = False
    for flags, found in ours.items():
        difference = found["perplexity"] / theirs - 1
        failed |= abs(difference) > 0.005 or count != found["tokens"]
        print(json.dumps(dict(
            flags=flags, context=arguments.context, tokens=count, lathe_tokens=found["tokens"], transformers=round(theirs, 5),
            lathe=round(found["perplexity"], 5), difference_percent=round(100 * difference, 4))))
    sys.exit(failed)


main()
