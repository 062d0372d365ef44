"""A GGUF with random weights of a public Llama shape, for speed comparisons on equal bytes.

usage: make_random_gguf.py CONFIG_DIR OUT.gguf [--format BF16|Q4_0|Q8_0|Q4_K] [--merges N]
Every peer of the GGUF world reads it. The blocks of the quantized formats are random codes under scales that
give the numbers the spread of the bf16 file's; as `llama-quantize` does, Q4_0 and Q4_K have the embedding in Q6_K.
The vocabulary is invented: the file is for timing, its text means nothing. It is `t0`, `t1`, ..., or with
`--merges N` byte-level BPE of N merges, which takes a reader as long to build as a real one (Llama 3 has 280147).
Needs: gguf, numpy.
"""

import argparse
import json
import pathlib

import gguf
import numpy as np


def bf16(rng, rows, columns, scale):
    """Random normal numbers as bf16 bit patterns, `[rows, columns]` u16."""
    base = (rng.standard_normal((min(rows, 1024), columns), dtype=np.float32) * scale).view(np.uint32)
    block = (base >> 16).astype(np.uint16)
    repeats = -(-rows // block.shape[0])
    # Each repeat is rolled by another amount so that no two rows of the matrix are equal.
    return np.concatenate([np.roll(block, 17 * i + 1, axis=1) for i in range(repeats)])[:rows]


def blocks(rng, kind, rows, columns, scale):
    """Random blocks of a quantized type, `[rows, bytes of a row]` u8, of numbers with the deviation `scale`."""
    length, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows, columns // length, size), dtype=np.uint8)

    def half(at, value):
        data[:, :, at : at + 2] = np.array([value], np.float16).view(np.uint8)

    # Deviations of uniform codes: 16 levels 4.6, 64 levels 18.5, 256 levels 74; sub-scales of six bits have the mean 31.5.
    types = gguf.GGMLQuantizationType
    if kind == types.Q4_0:
        half(0, scale / 4.6)
    elif kind == types.Q8_0:
        half(0, scale / 74)
    elif kind == types.Q4_K:
        half(0, scale / 250)
        half(2, scale / 250 * 7.5)
    elif kind == types.Q6_K:
        half(208, scale / 74 / 18.5)
    return data.reshape(rows, -1)


def byte_level(merges, tokens):
    """`tokens` tokens and `merges` merges of byte-level BPE: every token after the bytes is a pair of earlier ones."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(c) for c in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    rng = np.random.default_rng(1)
    names, pairs = list(alphabet), []
    seen, merged = set(names), set()
    while len(names) < tokens:
        a, b = (names[int(i)] for i in rng.integers(0, min(len(names), 4000), 2))
        if a + b not in seen and len(a + b) <= 16:
            seen.add(a + b)
            names.append(a + b)
            merged.add((a, b))
            pairs.append(f"{a} {b}")
    # The other ways to come by a token, as Llama 3 lists them.
    for name in names:
        for at in range(1, len(name)):
            pair = (name[:at], name[at:])
            if len(pairs) < merges and pair not in merged and pair[0] in seen and pair[1] in seen:
                merged.add(pair)
                pairs.append(" ".join(pair))
    return names, pairs[:merges]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("out")
    parser.add_argument("--format", default="BF16", choices=["BF16", "Q4_0", "Q8_0", "Q4_K"])
    parser.add_argument("--merges", type=int, default=0)
    arguments = parser.parse_args()
    config = json.loads((pathlib.Path(arguments.config) / "config.json").read_text())
    kind = gguf.GGMLQuantizationType[arguments.format]
    out = arguments.out
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
    files = {"BF16": "MOSTLY_BF16", "Q4_0": "MOSTLY_Q4_0", "Q8_0": "MOSTLY_Q8_0", "Q4_K": "MOSTLY_Q4_K_M"}
    w.add_file_type(gguf.LlamaFileType[files[arguments.format]])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    names, merges = [f"t{i}" for i in range(vocabulary)], ["t 0"]
    if arguments.merges:
        names, merges = byte_level(arguments.merges, vocabulary)
    w.add_token_list(names)
    w.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    w.add_token_merges(merges)
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)

    def matrix(name, rows, columns, kind=kind):
        if kind == gguf.GGMLQuantizationType.BF16:
            data = bf16(rng, rows, columns, columns**-0.5).view(np.uint8)
        else:
            data = blocks(rng, kind, rows, columns, columns**-0.5)
        w.add_tensor(name, data, raw_dtype=kind)

    def ones(name):
        w.add_tensor(name, np.ones(hidden, dtype=np.float32))

    embedding = gguf.GGMLQuantizationType.Q6_K if kind.name in ("Q4_0", "Q4_K") else kind
    matrix("token_embd.weight", vocabulary, hidden, embedding)
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
