"""A GGUF in bf16 with random weights of a public Llama shape, for speed comparisons on equal bytes.

usage: make_random_gguf.py CONFIG_DIR OUT.gguf
Every peer of the GGUF world reads it; `llama-quantize OUT.gguf OUT2.gguf Q4_0` makes the other formats.
The vocabulary is invented (`t0`, `t1`, ...): the file is for timing, its text means nothing.
Needs: gguf, numpy.
"""

import json
import pathlib
import sys

import gguf
import numpy as np


def bf16(rng, rows, columns, scale):
    """Random normal numbers as bf16 bit patterns, `[rows, columns]` u16."""
    base = (rng.standard_normal((min(rows, 1024), columns), dtype=np.float32) * scale).view(np.uint32)
    block = (base >> 16).astype(np.uint16)
    repeats = -(-rows // block.shape[0])
    # Each repeat is rolled by another amount so that no two rows of the matrix are equal.
    return np.concatenate([np.roll(block, 17 * i + 1, axis=1) for i in range(repeats)])[:rows]


def main():
    config = json.loads((pathlib.Path(sys.argv[1]) / "config.json").read_text())
    out = sys.argv[2]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    layers, vocabulary = config["num_hidden_layers"], config["vocab_size"]
    rng = np.random.default_rng(0)

    w = gguf.GGUFWriter(out, "llama")
    w.add_name("random")
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(hidden)
    w.add_block_count(layers)
    w.add_feed_forward_length(inner)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_rope_dimension_count(head_dim)
    w.add_rope_freq_base(config["rope_theta"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_vocab_size(vocabulary)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    w.add_token_list([f"t{i}" for i in range(vocabulary)])
    w.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    w.add_token_merges(["t 0"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)

    def matrix(name, rows, columns):
        data = bf16(rng, rows, columns, columns**-0.5)
        w.add_tensor(name, data.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    def ones(name):
        w.add_tensor(name, np.ones(hidden, dtype=np.float32))

    matrix("token_embd.weight", vocabulary, hidden)
    if not config.get("tie_word_embeddings"):
        matrix("output.weight", vocabulary, hidden)
    ones("output_norm.weight")
    for i in range(layers):
        ones(f"blk.{i}.attn_norm.weight")
        ones(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", heads * head_dim, hidden)
        matrix(f"blk.{i}.attn_k.weight", kv_heads * head_dim, hidden)
        matrix(f"blk.{i}.attn_v.weight", kv_heads * head_dim, hidden)
        matrix(f"blk.{i}.attn_output.weight", hidden, heads * head_dim)
        matrix(f"blk.{i}.ffn_gate.weight", inner, hidden)
        matrix(f"blk.{i}.ffn_up.weight", inner, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, inner)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file(progress=False)
    w.close()


if __name__ == "__main__":
    main()
