//! Work on single rows: norms, nonlinearities, sums, gates, rotations.
//!
//! Each kernel works on a range of rows, so workers divide a chunk of prompt by rows. Input and
//! output may be the same buffer, because every element is read before it is written.

use std::ops::Range;

use lathe_program::{Activation, NormKind, RopeStyle, RopeTable};

use crate::lanes::{Kernel, LANES, Lanes, math};
use crate::rows::Rows;

/// [`lathe_program::Op::Norm`].
pub(crate) struct Norm<'a> {
    /// `[rows, groups * n]`.
    pub input: Rows,
    /// `[n]` or `[groups * n]`.
    pub weight: Option<&'a [f32]>,
    /// As `weight`.
    pub bias: Option<&'a [f32]>,
    /// The kind of norm.
    pub kind: NormKind,
    /// Is added under the root.
    pub epsilon: f32,
    /// Parts of a row that are normalised separately.
    pub groups: usize,
    /// As `input`.
    pub out: Rows,
    /// The rows. They are valid in both buffers, and nobody else touches them.
    pub rows: Range<usize>,
}

impl Kernel for Norm<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.input.width() / self.groups;
        for row in self.rows.clone() {
            for group in 0..self.groups {
                let place = |v: Option<&[f32]>| {
                    v.map(|v| v[if v.len() == n { 0 } else { group * n }..].as_ptr())
                };
                // SAFETY: the rows are valid and this call's own; weights have `n` elements from
                // `place` on.
                unsafe {
                    self.part::<L>(
                        self.input.row(row).add(group * n),
                        self.out.row(row).add(group * n),
                        n,
                        place(self.weight),
                        place(self.bias),
                    );
                }
            }
        }
    }
}

impl Norm<'_> {
    #[inline(always)]
    unsafe fn part<L: Lanes>(
        &self,
        from: *const f32,
        to: *mut f32,
        n: usize,
        weight: Option<*const f32>,
        bias: Option<*const f32>,
    ) {
        // SAFETY: the caller vouches for `n` floats at each place.
        unsafe {
            let (mean, offset) = match self.kind {
                NormKind::Rms { offset } => (0.0, offset),
                NormKind::Layer => (total::<L, false>(from, n, 0.0) / n as f32, 0.0),
            };
            // Lanes past the end are zeros. Their deviations from the mean must not count.
            let padding = (n.next_multiple_of(LANES) - n) as f32 * mean * mean;
            let squares = total::<L, true>(from, n, mean) - padding;
            let scale = L::splat(1.0 / (squares / n as f32 + self.epsilon).sqrt());
            let (mean, offset) = (L::splat(mean), L::splat(offset));
            for (i, count) in vectors(n) {
                let mut y = L::load_first(from.add(i), count).sub(mean).mul(scale);
                if let Some(weight) = weight {
                    y = y.mul(L::load_first(weight.add(i), count).add(offset));
                }
                if let Some(bias) = bias {
                    y = y.add(L::load_first(bias.add(i), count));
                }
                y.store_first(to.add(i), count);
            }
        }
    }
}

/// The sum of `x`, or of `(x - mean)^2`, over `n` floats in a fixed order. Lanes past the end count
/// as zeros.
#[inline(always)]
unsafe fn total<L: Lanes, const SQUARES: bool>(from: *const f32, n: usize, mean: f32) -> f32 {
    let mean = L::splat(mean);
    let mut sums = [L::splat(0.0); 4];
    let mut i = 0;
    // SAFETY: the caller vouches for `n` floats.
    unsafe {
        while i + 4 * LANES <= n {
            for v in 0..4 {
                let x = L::load(from.add(i + v * LANES)).sub(mean);
                sums[v] = if SQUARES { x.fma(x, sums[v]) } else { sums[v].add(x) };
            }
            i += 4 * LANES;
        }
        while i < n {
            let x = L::load_first(from.add(i), n - i).sub(mean);
            sums[0] = if SQUARES { x.fma(x, sums[0]) } else { sums[0].add(x) };
            i += LANES;
        }
    }
    sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum()
}

/// The start of each vector of `n` floats, and the number of floats from there on. Callers loop
/// over this. A function that takes the body of the loop would be slow: a closure is compiled
/// without the wide vectors unless it is inlined.
#[inline(always)]
fn vectors(n: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n).step_by(LANES).map(move |i| (i, n - i))
}

/// [`lathe_program::Op::Add`].
pub(crate) struct Add {
    /// `[rows, n]`.
    pub left: Rows,
    /// `[rows, n]`.
    pub right: Rows,
    /// The factor of `right`.
    pub scale: f32,
    /// `[rows, n]`.
    pub out: Rows,
    /// The rows. They are valid in all buffers, and nobody else touches them.
    pub rows: Range<usize>,
}

impl Kernel for Add {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.out.width();
        for row in self.rows {
            let (left, right, out) = (self.left.row(row), self.right.row(row), self.out.row(row));
            for (i, count) in vectors(n) {
                // SAFETY: the rows are valid and this call's own.
                unsafe {
                    let left = L::load_first(left.add(i), count);
                    let right = L::load_first(right.add(i), count);
                    right.fma(L::splat(self.scale), left).store_first(out.add(i), count);
                }
            }
        }
    }
}

/// [`lathe_program::Op::Activate`].
pub(crate) struct Activate {
    /// `[rows, n]`.
    pub gate: Rows,
    /// `[rows, n]`, for the gated kinds.
    pub up: Option<Rows>,
    /// The kind of nonlinearity.
    pub kind: Activation,
    /// `[rows, n]`.
    pub out: Rows,
    /// The rows. They are valid in all buffers, and nobody else touches them.
    pub rows: Range<usize>,
    /// The columns.
    pub columns: Range<usize>,
}

impl Kernel for Activate {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        match self.kind {
            Activation::SwiGlu => self.each::<L>(|gate, up| math::silu(gate).mul(up)),
            Activation::GeGluTanh => self.each::<L>(|gate, up| math::gelu_tanh(gate).mul(up)),
            Activation::GeGluErf => self.each::<L>(|gate, up| math::gelu_erf(gate).mul(up)),
            Activation::SwiGluClamped { alpha, limit } => self.each::<L>(|gate, up| {
                let gate = gate.min(L::splat(limit));
                let up = up.min(L::splat(limit)).max(L::splat(-limit)).add(L::splat(1.0));
                gate.mul(math::sigmoid(gate.mul(L::splat(alpha)))).mul(up)
            }),
            Activation::Silu => self.each::<L>(|gate, _| math::silu(gate)),
            Activation::GeluTanh => self.each::<L>(|gate, _| math::gelu_tanh(gate)),
            Activation::ReluSquared => self.each::<L>(|gate, _| {
                let positive = gate.max(L::splat(0.0));
                positive.mul(positive)
            }),
        }
    }
}

impl Activate {
    #[inline(always)]
    fn each<L: Lanes>(&self, f: impl Fn(L, L) -> L) {
        for row in self.rows.clone() {
            let (gate, out) = (self.gate.row(row), self.out.row(row));
            let up = self.up.map(|up| up.row(row));
            for (i, count) in vectors(self.columns.len()) {
                let i = self.columns.start + i;
                // SAFETY: the rows are valid and this call's own.
                unsafe {
                    let gate = L::load_first(gate.add(i), count);
                    let up = up.map_or(L::splat(0.0), |up| L::load_first(up.add(i), count));
                    f(gate, up).store_first(out.add(i), count);
                }
            }
        }
    }
}

/// [`lathe_program::Op::Gate`] with a sigmoid.
pub(crate) struct SigmoidGate {
    /// `[rows, n]`.
    pub input: Rows,
    /// `[rows, m]`, `m` divides `n`.
    pub gate: Rows,
    /// `[rows, n]`.
    pub out: Rows,
    /// The rows. They are valid in all buffers, and nobody else touches them.
    pub rows: Range<usize>,
}

impl Kernel for SigmoidGate {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let run = self.input.width() / self.gate.width();
        for row in self.rows {
            let (input, gate, out) = (self.input.row(row), self.gate.row(row), self.out.row(row));
            // SAFETY: the rows are valid and this call's own.
            unsafe {
                if run == 1 {
                    for (i, count) in vectors(self.input.width()) {
                        let open = math::sigmoid(L::load_first(gate.add(i), count));
                        let x = L::load_first(input.add(i), count);
                        x.mul(open).store_first(out.add(i), count);
                    }
                    continue;
                }
                for part in 0..self.gate.width() {
                    let open = math::sigmoid(L::splat(*gate.add(part)));
                    for (i, count) in vectors(run) {
                        let x = L::load_first(input.add(part * run + i), count);
                        x.mul(open).store_first(out.add(part * run + i), count);
                    }
                }
            }
        }
    }
}

/// [`lathe_program::Op::Rope`].
pub(crate) struct Rotate {
    /// `[rows, heads * head_dim]`.
    pub input: Rows,
    /// Heads in a row.
    pub heads: usize,
    /// The first element of a head that is rotated.
    pub offset: usize,
    /// Which elements form pairs.
    pub style: RopeStyle,
    /// `[rows, 2 * pairs]`: cosines, then sines.
    pub angles: Rows,
    /// As `input`.
    pub out: Rows,
    /// The rows. They are valid in all buffers, and nobody else touches them.
    pub rows: Range<usize>,
}

impl Kernel for Rotate {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let head_dim = self.input.width() / self.heads;
        let in_place = self.input.row(0) == self.out.row(0);
        for row in self.rows.clone() {
            // SAFETY: the rows are valid and this call's own; buffers are the same or disjoint.
            unsafe {
                if !in_place {
                    let (from, to) = (self.input.row(row), self.out.row(row));
                    std::ptr::copy_nonoverlapping(from, to, self.input.width());
                }
                for head in 0..self.heads {
                    let part = self.out.row(row).add(head * head_dim + self.offset);
                    match self.style {
                        RopeStyle::HalfSplit => self.half_split::<L>(row, part),
                        RopeStyle::Interleaved => self.interleaved(row, part),
                    }
                }
            }
        }
    }
}

impl Rotate {
    #[inline(always)]
    unsafe fn half_split<L: Lanes>(&self, row: usize, part: *mut f32) {
        let pairs = self.angles.width() / 2;
        let cosines = self.angles.row(row);
        for (i, count) in vectors(pairs) {
            // SAFETY: the head has `2 * pairs` elements from `part` on.
            unsafe {
                let cosine = L::load_first(cosines.add(i), count);
                let sine = L::load_first(cosines.add(pairs + i), count);
                let a = L::load_first(part.add(i), count);
                let b = L::load_first(part.add(pairs + i), count);
                a.mul(cosine).sub(b.mul(sine)).store_first(part.add(i), count);
                b.mul(cosine).add(a.mul(sine)).store_first(part.add(pairs + i), count);
            }
        }
    }

    #[inline(always)]
    unsafe fn interleaved(&self, row: usize, part: *mut f32) {
        let pairs = self.angles.width() / 2;
        let cosines = self.angles.row(row);
        for i in 0..pairs {
            // SAFETY: as in `half_split`.
            unsafe {
                let (cosine, sine) = (*cosines.add(i), *cosines.add(pairs + i));
                let (a, b) = (*part.add(2 * i), *part.add(2 * i + 1));
                *part.add(2 * i) = a * cosine - b * sine;
                *part.add(2 * i + 1) = b * cosine + a * sine;
            }
        }
    }
}

/// Fills `[rows, 2 * pairs]` with the cosines and sines of each row's position.
///
/// # Safety
/// `rows` of `out` are valid and this call's own.
pub(crate) unsafe fn fill_angles(
    table: &RopeTable,
    long_rope: &[bool],
    positions: &[u32],
    out: Rows,
    rows: Range<usize>,
) {
    let (pairs, magnitude) = (table.inverse_frequencies.len(), table.magnitude);
    for row in rows {
        let frequencies = table.frequencies(long_rope[row]);
        // SAFETY: the caller vouches for the row.
        let line = unsafe { std::slice::from_raw_parts_mut(out.row(row), 2 * pairs) };
        let (cosines, sines) = line.split_at_mut(pairs);
        for ((frequency, cosine), sine) in frequencies.iter().zip(cosines).zip(sines) {
            let (s, c) = (positions[row] as f32 * frequency).sin_cos();
            (*cosine, *sine) = (c * magnitude, s * magnitude);
        }
    }
}
