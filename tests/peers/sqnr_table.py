"""Signal over quantization noise of GGUF's types on Gaussian and Laplace numbers: tests/fixtures/tensor/sqnr_ggml.json.

usage: sqnr_table.py        (needs numpy, ml_dtypes, torch, gguf; run from anywhere)

Written from the block structs' definitions in numpy and float64; it shares nothing with the Rust code but the random numbers of
scaled_formats.py, whose table has all other formats. crates/tensor/tests/scaled_formats.rs compares both.

The searched types have no definition of their encoder, and gguf-py 0.19 has none for them. What runs here:
- q4_k, q5_k: for each 32 numbers, among 161 starting steps (levels + k / 40, |k| <= 80, over the range), the least-squares step and
  minimum of the codes that one gives, by least error weighed by rms + |x| of the 256; step and minimum in 6 bits under f16 factors
  (largest / 63), all neighbours within 2 tried; four rounds of least squares for the two factors, kept while the error falls.
- q6_k: for each 16 numbers the least-squares step among 25 starts (-32 - k / 10, |k| <= 12, over the largest), same weights; 8 bits
  under an f16 factor (largest / -128), neighbours within 2. With |k| <= 30 it is 35.51 dB in place of 35.26 on Gaussian numbers.
- iq4_nl, iq4_xs: the step of least error weighed by x^2, among 241 starts from each end of the table; iq4_xs in 6 bits under an f16
  factor (largest / -32), neighbours within 2.
For the other types the script fails if gguf-py's own quantizer differs by 0.01 dB.
"""

import json

import gguf
import numpy as np
from scaled_formats import FIXTURES, samples

ROWS = 128


def f16(x):
    return np.asarray(x, np.float64).astype(np.float16).astype(np.float64)


def q_symmetric(x, half):
    """q4_0, q5_0: the number of largest magnitude is the code -half."""
    v = x.reshape(-1, 32)
    largest = np.take_along_axis(v, np.abs(v).argmax(1)[:, None], 1)
    d = largest / -half
    q = np.clip(np.floor(v / d + half + 0.5), 0, 2 * half - 1)
    return ((q - half) * f16(d)).reshape(x.shape)


def q_affine(x, levels):
    """q4_1, q5_1."""
    v = x.reshape(-1, 32)
    low = v.min(1)[:, None]
    d = (v.max(1)[:, None] - low) / levels
    q = np.clip(np.floor((v - low) / d + 0.5), 0, levels)
    return (q * f16(d) + f16(low)).reshape(x.shape)


def q8_0(x):
    v = x.reshape(-1, 32)
    d = np.abs(v).max(1)[:, None] / 127
    return (np.rint(v / d) * f16(d)).reshape(x.shape)


def k_affine(x, levels):
    v = x.reshape(-1, 8, 32)
    w = np.sqrt((v**2).mean((1, 2), keepdims=True)) + np.abs(v)
    low = np.minimum(v.min(2, keepdims=True), 0)
    span = v.max(2, keepdims=True) - low
    best = None
    for k in range(-80, 81):
        q = np.clip(np.rint((v - low) * (levels + k / 40) / span), 0, levels)
        sw, sq, sqq = w.sum(2), (w * q).sum(2), (w * q * q).sum(2)
        sx, sqx = (w * v).sum(2), (w * q * v).sum(2)
        det = sw * sqq - sq * sq
        step, least = (sw * sqx - sx * sq) / det, (sq * sqx - sqq * sx) / det
        least = np.where(least < 0, 0, least)
        step = np.where(least == 0, sqx / sqq, step)
        error = (w * (step[..., None] * q - least[..., None] - v) ** 2).sum(2)
        if best is None:
            best = [error, step, least]
        better = error < best[0]
        best = [np.where(better, new, old) for new, old in zip((error, step, least), best)]
    step, least = best[1], best[2]
    d, dmin = f16(step.max(1) / 63)[:, None], f16(least.max(1) / 63)[:, None]

    def choose(d, dmin, step, least):
        out = None
        centre = np.rint(step / d), np.rint(np.divide(least, dmin, where=dmin > 0, out=np.zeros_like(least)))
        for i in range(-2, 3):
            for j in range(-2, 3):
                a, b = np.clip(centre[0] + i, 0, 63), np.clip(centre[1] + j, 0, 63)
                s, m = (a * d)[..., None], (b * dmin)[..., None]
                q = np.clip(np.rint(np.divide(v + m, s, where=s > 0, out=np.zeros_like(v))), 0, levels)
                error = (w * (q * s - m - v) ** 2).sum(2)
                if out is None:
                    out = [error, a, b, q]
                better = error < out[0]
                out = [np.where(better, n, o) for n, o in zip((error, a, b), out[:3])] + [
                    np.where(better[..., None], q, out[3])
                ]
        return out

    error, a, b, q = choose(d, dmin, step, least)
    for _ in range(4):
        p, r = a[..., None] * q, -b[..., None] * np.ones_like(q)
        pp, pr, rr = (w * p * p).sum((1, 2)), (w * p * r).sum((1, 2)), (w * r * r).sum((1, 2))
        px, rx = (w * p * v).sum((1, 2)), (w * r * v).sum((1, 2))
        det = pp * rr - pr * pr
        good = det > 0
        nd = np.where(good, np.divide(px * rr - rx * pr, det, where=good, out=np.zeros_like(px)), d[:, 0])
        nm = np.where(good, np.divide(rx * pp - px * pr, det, where=good, out=np.zeros_like(px)), dmin[:, 0])
        nd, nm = f16(np.maximum(nd, 1e-7))[:, None], f16(np.maximum(nm, 0))[:, None]
        e2, a2, b2, q2 = choose(nd, nm, a * d, b * dmin)
        better = e2.sum(1, keepdims=True) < error.sum(1, keepdims=True)
        pick = lambda new, old: np.where(better if new.ndim < 3 else better[..., None], new, old)
        d, dmin = pick(nd, d), pick(nm, dmin)
        error, a, b, q = pick(e2, error), pick(a2, a), pick(b2, b), pick(q2, q)
    return (q * (a * d)[..., None] - (b * dmin)[..., None]).reshape(x.shape)


def fit_scale(v, w, ends, half_steps, snap):
    """The step of least weighed error among those that bring the largest number near an end."""
    largest = np.take_along_axis(v, np.abs(v).argmax(-1)[..., None], -1)
    best = None
    for end in ends:
        for k in half_steps:
            q = snap(v * (end + k) / largest)
            qx, qq = (w * q * v).sum(-1), (w * q * q).sum(-1)
            step = np.divide(qx, qq, where=qq > 0, out=np.zeros_like(qx))
            error = (w * (step[..., None] * q - v) ** 2).sum(-1)
            if best is None:
                best = [error, step]
            better = error < best[0]
            best = [np.where(better, error, best[0]), np.where(better, step, best[1])]
    return best[1]


def scaled_scales(v, w, step, low, high, snap):
    """Steps as whole numbers from low to high under an f16 factor."""
    largest = np.take_along_axis(step, np.abs(step).argmax(1)[:, None], 1)
    d = f16(largest / low)
    best = None
    for k in range(-2, 3):
        a = np.clip(np.rint(step / d) + k, low, high)
        s = (a * d)[..., None]
        q = snap(np.divide(v, s, where=s != 0, out=np.zeros_like(v)))
        error = (w * (q * s - v) ** 2).sum(-1)
        if best is None:
            best = [error, q * s]
        better = error < best[0]
        best = [np.where(better, error, best[0]), np.where(better[..., None], q * s, best[1])]
    return best[1]


def q6_k(x):
    v = x.reshape(-1, 16, 16)
    w = np.sqrt((v**2).mean((1, 2), keepdims=True)) + np.abs(v)
    snap = lambda r: np.clip(np.rint(r), -32, 31)
    step = fit_scale(v, w, [-32.0], np.arange(-12, 13) / 10, snap)
    return scaled_scales(v, w, step, -128, 127, snap).reshape(x.shape)


IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float64)
IQ4_MIDDLES = (IQ4[1:] + IQ4[:-1]) / 2


def iq4(x, extended):
    snap = lambda r: IQ4[np.searchsorted(IQ4_MIDDLES, r)]
    v = x.reshape(-1, 8, 32)
    w = v**2
    step = fit_scale(v, w, [-127.0, 113.0], np.arange(-120, 121) / 8, snap)
    if extended:
        return scaled_scales(v, w, step, -32, 31, snap).reshape(x.shape)
    s = f16(step)[..., None]
    return (snap(v / s) * s).reshape(x.shape)


FORMATS = {
    "q4_0": lambda x: q_symmetric(x, 8),
    "q4_1": lambda x: q_affine(x, 15),
    "q5_0": lambda x: q_symmetric(x, 16),
    "q5_1": lambda x: q_affine(x, 31),
    "q8_0": q8_0,
    "q4_k": lambda x: k_affine(x, 15),
    "q5_k": lambda x: k_affine(x, 31),
    "q6_k": q6_k,
    "iq4_nl": lambda x: iq4(x, False),
    "iq4_xs": lambda x: iq4(x, True),
}


def decibels(x, y):
    return 10 * float(np.log10((x**2).sum() / ((y - x) ** 2).sum()))


def check(name, x, found):
    kind = gguf.GGMLQuantizationType[name.upper()]
    try:
        packed = gguf.quants.quantize(x.astype(np.float32), kind)
    except NotImplementedError:
        return
    theirs = decibels(x, gguf.quants.dequantize(packed, kind).astype(np.float64))
    assert abs(theirs - found) < 0.01, (name, theirs, found)


def main():
    table = {}
    for source, data in samples().items():
        x = data[:ROWS].astype(np.float64)
        for name, quantize in FORMATS.items():
            found = decibels(x, quantize(x))
            check(name, x, found)
            table.setdefault(source, {})[name] = round(found, 3)
    (FIXTURES / "sqnr_ggml.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
