"""Checks that other readers understand what `lathe convert` writes: the gguf package and Hugging Face
transformers must read the same weights and tokens, and transformers must give the same logits.

usage: python exported_files.py ORIGINAL_HF_DIR CONVERTED.gguf CONVERTED_HF_DIR
where the GGUF file was converted from the original with `--format bf16` (or f32) and the directory from that file."""

import pathlib
import sys

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

original, gguf_path, converted = sys.argv[1:4]
text = "Why is the sky blue?\n\n  def f(x): return x**2 + 10000 café 😀"

reader = gguf.GGUFReader(gguf_path)
fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF")}
print("GGUF:", fields["general.architecture"], len(reader.tensors), "tensors")
heads = dict(attn_q=fields["llama.attention.head_count"], attn_k=fields["llama.attention.head_count_kv"])
names = dict(attn_norm="input_layernorm", ffn_norm="post_attention_layernorm", attn_q="self_attn.q_proj",
             attn_k="self_attn.k_proj", attn_v="self_attn.v_proj", attn_output="self_attn.o_proj",
             ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj")
outer = dict(token_embd="model.embed_tokens", output_norm="model.norm", output="lm_head")


def plain(tensor):
    """A tensor's numbers under their Hugging Face name, rows in Hugging Face order."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    parts = tensor.name.split(".")
    if parts[0] != "blk":
        return f"{outer[parts[0]]}.{parts[1]}", values
    if parts[2] in heads:
        count = heads[parts[2]]
        values = values.reshape(count, values.shape[0] // count // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return f"model.layers.{parts[1]}.{names[parts[2]]}.{parts[3]}", values


weights = {}
for path in pathlib.Path(original).glob("*.safetensors"):
    weights.update(load_file(path))
for name, values in (plain(tensor) for tensor in reader.tensors if tensor.name != "rope_freqs.weight"):
    assert np.array_equal(weights[name].float().numpy(), values), name
print("GGUF: every weight equal")

model = {path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (original, converted)}
tokens = torch.tensor([[3, 17, 42, 5, 60, 33, 21, 9]])
with torch.no_grad():
    logits = {path: model[path](tokens).logits for path in model}
difference = (logits[original] - logits[converted]).abs().max().item()
assert difference < 1e-4, difference
print("transformers: largest difference of logits", difference)

if (pathlib.Path(original) / "tokenizer.json").exists():
    first = PreTrainedTokenizerFast(tokenizer_file=f"{original}/tokenizer.json")
    second = AutoTokenizer.from_pretrained(converted)
    assert first(text)["input_ids"] == second(text)["input_ids"]
    assert fields["tokenizer.ggml.tokens"] == second.convert_ids_to_tokens(range(len(fields["tokenizer.ggml.tokens"])))
    print("tokenizers: equal ids")
