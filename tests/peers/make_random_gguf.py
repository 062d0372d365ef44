"""A GGUF with random weights of a public Llama shape, for speed comparisons on equal bytes.

usage: make_random_gguf.py CONFIG_DIR OUT.gguf [bf16|f16|q8_0|q4_0|q4_1|q4_k_m]

The numbers are drawn in the format itself, block by block, so nothing is quantized: a 1B in Q4_0 takes seconds. Which tensor has
which format is what `llama-quantize` chooses (for Q4_0, Q4_1 and Q4_K_M a tied embedding or the head is Q6_K, or Q8_0
where rows are not a multiple of 256, and Q4_K_M has Q6_K for half of the values and down projections). The same arguments give the same bytes, whatever the number of cores.
The vocabulary is invented: the 256 bytes, all pairs of them, and triples; its text means nothing.
Needs: gguf, numpy.
"""

import concurrent.futures
import json
import os
import pathlib
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

FILE_TYPES = {
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}
# Recipes that give all matrices one format.
WHOLE = {"bf16": Type.BF16, "f16": Type.F16, "q8_0": Type.Q8_0}
# Standard deviation of the codes that `blocks` draws, by which its scales are divided.
CODE_DEVIATIONS = {Type.Q8_0: 73.9, Type.Q4_0: 4.61, Type.Q4_1: 4.61, Type.Q4_K: 48 * 4.61, Type.Q6_K: 96 * 18.5}


def floats(rng, kind, rows, columns, deviation):
    """Random normal numbers in bf16 (or those in f16), `[rows, 2 * columns]` bytes."""
    base = (rng.standard_normal((min(rows, 1024), columns), dtype=np.float32) * np.float32(deviation)).view(np.uint32) & 0xFFFF0000
    block = (base >> 16).astype(np.uint16) if kind == Type.BF16 else base.view(np.float32).astype(np.float16).view(np.uint16)
    repeats = -(-rows // block.shape[0])
    # Each repeat is rolled by another amount so that no two rows of the matrix are equal.
    return np.concatenate([np.roll(block, 17 * i + 1, axis=1) for i in range(repeats)])[:rows].view(np.uint8)


def blocks(rng, kind, rows, columns, deviation):
    """Random blocks of a quantized format: codes uniform, scales such that the weights deviate as asked, `[rows, bytes]`."""
    block_columns, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if columns % block_columns:
        sys.exit(f"rows of {columns} are not whole blocks of {kind.name}, which have {block_columns}")
    count = rows * columns // block_columns
    words = rng.integers(0, 1 << 64, -(-count * block_bytes // 8), dtype=np.uint64)
    out = words.view(np.uint8)[: count * block_bytes].reshape(count, block_bytes)
    scale = np.frombuffer(np.float16(deviation / CODE_DEVIATIONS[kind]).tobytes(), np.uint8)
    if kind == Type.Q8_0:  # scale, 32 codes
        out[:, 0:2] = scale
    elif kind == Type.Q4_0:  # scale, 32 codes less 8
        out[:, 0:2] = scale
    elif kind == Type.Q4_1:  # scale, minimum, 32 codes
        out[:, 0:2] = scale
        out[:, 2:4] = np.frombuffer(np.float16(-7.5 * deviation / CODE_DEVIATIONS[kind]).tobytes(), np.uint8)
    elif kind == Type.Q6_K:  # 128 + 64 bytes of codes less 32, 16 scales, a scale of those
        out[:, 192:208] = (out[:, 192:208] & 63) + 64
        out[:, 208:210] = scale
    elif kind == Type.Q4_K:  # scales of the scales and of the minima, 8 of each in 6 bits (32 to 63), 256 codes
        out[:, 0:2] = scale
        out[:, 2:4] = np.frombuffer(np.float16(7.5 * deviation / CODE_DEVIATIONS[kind]).tobytes(), np.uint8)
        # Bytes 0 to 3 and 4 to 7 are the first four scales and minima with the high bits of the last four above them,
        # and bytes 8 to 11 the low halves of those. A minimum of the same code as its scale puts zero amid the codes.
        first = (out[:, 4:8] & 31) | 32
        high = out[:, 8:12] & 0x40 | 0x80
        low = out[:, 12:16] & 15
        out[:, 4:8] = out[:, 8:12] = first | high
        out[:, 12:16] = low | low << 4
    return out.reshape(rows, -1)


def more_bits(layer, layers):
    """Whether llama.cpp's Q4_K_M gives the layer's values and down projection Q6_K (`use_more_bits`)."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def types(recipe, tied):
    """The format of a matrix by its name, layer and columns."""
    def choose(name, layer, layers, columns):
        if recipe in WHOLE:
            return WHOLE[recipe]
        if name == ("token_embd" if tied else "output"):
            return Type.Q6_K if columns % 256 == 0 else Type.Q8_0
        if recipe in ("q4_0", "q4_1"):
            return Type[recipe.upper()]
        return Type.Q6_K if name in ("attn_v", "ffn_down") and more_bits(layer, layers) else Type.Q4_K

    return choose


def vocabulary(size, specials):
    """Tokens, their types and merges: byte-level BPE in which each token but the bytes is one merge; `specials` at the end."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b if b in keep else 256 + sum(c not in keep for c in range(b))) for b in range(256)]
    pairs = [(a, b) for a in letters for b in letters]
    merges = (pairs + [(a + b, c) for a, b in pairs for c in letters[:8]])[: size - specials - 256]
    tokens = letters + [a + b for a, b in merges]
    kinds = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * specials
    tokens += [f"<|special_{i}|>" for i in range(specials)]
    assert len(tokens) == size, (len(tokens), size)
    return tokens, kinds, [f"{a} {b}" for a, b in merges]


def matrices(config, recipe):
    """Name, format, rows and columns of each matrix, in the order of the file."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = (config[k] * head_dim for k in ("num_attention_heads", "num_key_value_heads"))
    tied = config.get("tie_word_embeddings", False)
    choose = types(recipe, tied)
    yield "token_embd.weight", choose("token_embd", 0, layers, hidden), config["vocab_size"], hidden
    if not tied:
        yield "output.weight", choose("output", 0, layers, hidden), config["vocab_size"], hidden
    for i in range(layers):
        for name, rows, columns in [
            ("attn_q", queries, hidden), ("attn_k", keys, hidden), ("attn_v", keys, hidden), ("attn_output", hidden, queries),
            ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden), ("ffn_down", hidden, inner),
        ]:
            yield f"blk.{i}.{name}.weight", choose(name, i, layers, columns), rows, columns


def draw(seed, kind, rows, columns):
    rng = np.random.default_rng(seed)
    make = floats if kind in (Type.BF16, Type.F16) else blocks
    return make(rng, kind, rows, columns, columns**-0.5)


def describe(writer, config, recipe):
    """What the file says of the model and its tokenizer."""
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    writer.add_name("random")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[recipe])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    specials = 256
    tokens, kinds, merges = vocabulary(config["vocab_size"], specials)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["vocab_size"] - specials)
    writer.add_eos_token_id(config["vocab_size"] - specials + 1)


def main():
    if len(sys.argv) not in (3, 4) or (sys.argv[3:] or ["bf16"])[0] not in FILE_TYPES:
        sys.exit(__doc__)
    config = json.loads((pathlib.Path(sys.argv[1]) / "config.json").read_text())
    out, recipe = pathlib.Path(sys.argv[2]), (sys.argv[3:] or ["bf16"])[0]
    partial = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(partial, "llama")
    describe(writer, config, recipe)
    ones = np.ones(config["hidden_size"], dtype=np.float32)
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        drawn = [(name, kind, pool.submit(draw, seed, kind, rows, columns))
                 for seed, (name, kind, rows, columns) in enumerate(matrices(config, recipe))]
        for name, kind, data in drawn:
            writer.add_tensor(name, data.result(), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", ones)
    for i in range(config["num_hidden_layers"]):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()
    os.replace(partial, out)


if __name__ == "__main__":
    main()
