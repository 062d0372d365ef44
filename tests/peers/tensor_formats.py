"""Lathe's codecs and files against the Python packages `gguf` and `safetensors`.

usage: tensor_formats.py [--fixtures]        (needs numpy, gguf, safetensors, torch; run from anywhere)

Random and edge-case numbers go through both sides: files that Lathe writes are read by Python, every dequantization agrees
bit for bit, and so does quantization for the types that `gguf` can write. For the K-quants and IQ4, where it cannot, the table
shows Lathe's signal-to-noise ratio. `--fixtures` writes tests/fixtures/tensor/ instead: a few blocks of each type with the
Python packages' results, for tests without Python.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures/tensor"
# Where the half-precision fields of a block lie.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
          "IQ4_NL": [0], "IQ4_XS": [0]}
WRITABLE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
SEARCHED = ["Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


def edge_rows():
    """Rows of 256 that are hard for some type."""
    ramp = np.linspace(-1, 1, 256, dtype=np.float32)
    rows = [
        np.zeros(256), -np.zeros(256), np.full(256, 3.25), np.full(256, -3.25), ramp, ramp * 1e-41, ramp * 1e-38, ramp * 6e-8,
        ramp * 1e5, ramp * 1e7, np.where(np.arange(256) == 77, 50, ramp), np.where(np.arange(256) % 32 == 5, -9, ramp),
        np.arange(256) % 17 - 8.5, (np.arange(256) % 31 - 15) / 2, np.abs(ramp), -np.abs(ramp), ramp * 65504, np.sign(ramp),
    ]
    return np.stack([np.asarray(row, dtype=np.float32) for row in rows])


def values(rng):
    return {
        "edge": edge_rows(),
        "normal": rng.standard_normal((1100, 512)).astype(np.float32) * np.float32(0.02),
        "laplace": rng.laplace(size=(64, 1024)).astype(np.float32),
        "scales": (rng.standard_normal((512, 256)) * 10.0 ** rng.uniform(-9, 5, (512, 1))).astype(np.float32),
    }


def random_blocks(rng, name, count):
    """Random bytes with finite half-precision fields: zero, denormal, normal and the largest."""
    _, size = gguf.GGML_QUANT_SIZES[Type[name]]
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in HALVES[name]:
        half = rng.standard_normal(count).astype(np.float16)
        half[::7] = np.float16(6e-8) * rng.integers(0, 1024, len(half[::7])).astype(np.float16)
        half[3::11] = 0
        half[5::13] = 65504
        blocks[:, at:at + 2] = half.view(np.uint8).reshape(-1, 2)
    return blocks


def write_blocks(path, rng, count):
    writer = gguf.GGUFWriter(path, "test")
    blocks = {name: random_blocks(rng, name, count) for name in HALVES}
    for name, data in blocks.items():
        writer.add_tensor(name, data, raw_dtype=Type[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return blocks


def same(found, expected):
    """Bit for bit, except that any NaN is as good as another."""
    found, expected = np.ascontiguousarray(found), np.ascontiguousarray(expected)
    nan = np.isnan(found) & np.isnan(expected)
    return np.array_equal(np.where(nan, 0, found).view(np.uint32), np.where(nan, 0, expected).view(np.uint32))


def signal_to_noise_db(reference, found):
    reference, found = reference.astype(np.float64), found.astype(np.float64)
    return 10 * np.log10(np.sum(reference**2) / np.sum((found - reference) ** 2))


def fixtures():
    rng = np.random.default_rng(7)
    FIXTURES.mkdir(parents=True, exist_ok=True)
    blocks = write_blocks(FIXTURES / "blocks.gguf", rng, 2)
    expected = {f"{name}.f32": gguf.dequantize(data, Type[name]) for name, data in blocks.items()}
    save_file(expected, FIXTURES / "blocks.safetensors")
    rows = np.concatenate([edge_rows()[:, :64].reshape(-1, 64), rng.standard_normal((2, 64)).astype(np.float32)])
    quantized = {"values": rows}
    for name in WRITABLE[1:]:
        quantized[name] = gguf.quantize(rows, Type[name]).view(np.uint8)
    save_file(quantized, FIXTURES / "quantized.safetensors")


def check(failures, ok, what):
    print(("ok      " if ok else "DIFFERS ") + what)
    if not ok:
        failures.append(what)


def compare(directory):
    rng = np.random.default_rng(1)
    inputs = values(rng)
    save_file(inputs, directory / "values.safetensors")
    blocks = write_blocks(directory / "blocks.gguf", rng, 3000)
    subprocess.run(["cargo", "run", "--quiet", "-p", "lathe-tensor", "--example", "formats", "--", str(directory)],
                   cwd=ROOT, check=True)
    failures = []
    reader = gguf.GGUFReader(directory / "quantized.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    check(failures, fields["test.words"] == ["", "ä", "word"], "metadata strings")
    check(failures, fields["test.numbers"] == [-2, -1, 0, 1, 2], "metadata integers")
    check(failures, np.float32(fields["test.float"]) == np.float32(0.1), "metadata float")
    dequantized = load_file(directory / "dequantized.safetensors")
    for tensor in reader.tensors:
        group, name = tensor.name.split(".")
        kind = tensor.tensor_type
        data = np.ascontiguousarray(tensor.data)
        with np.errstate(all="ignore"):
            check(failures, same(dequantized[tensor.name], gguf.dequantize(data, kind).reshape(inputs[group].shape)),
                  f"dequantize {tensor.name}")
            if kind.name in WRITABLE:
                expected = gguf.quantize(inputs[group], kind)
                check(failures, np.array_equal(data.view(np.uint8).ravel(), expected.view(np.uint8).ravel()),
                      f"quantize {tensor.name}")
            elif group in ("normal", "laplace"):
                print(f"        {kind.name} {group}: {signal_to_noise_db(inputs[group], dequantized[tensor.name]):.2f} dB")
    for name, data in blocks.items():
        with np.errstate(all="ignore"):
            check(failures, same(dequantized[name].ravel(), gguf.dequantize(data, Type[name]).ravel()), f"random blocks {name}")
    index = json.loads((directory / "sharded/model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        check(failures, np.array_equal(load_file(directory / "sharded" / file)[name], inputs[name]), f"shard {file} {name}")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", action="store_true", help="write tests/fixtures/tensor/ and stop")
    if parser.parse_args().fixtures:
        return fixtures()
    with tempfile.TemporaryDirectory() as directory:
        failures = compare(pathlib.Path(directory))
    sys.exit(f"{len(failures)} differ" if failures else 0)


if __name__ == "__main__":
    main()
