//! [`lathe_program::Op::Transform`]: rotates and rounds rows. The scales are those of the scalar
//! codec. Numbers are rounded in loops without branches, to the codec's values bit for bit.

use std::ops::Range;

use lathe_program::{InputTransform, StaticScale};
use lathe_tensor::codec::element;
use lathe_tensor::codec::scaled::{fit, global_divisor};
use lathe_tensor::codec::search::round_float_within;
use lathe_tensor::hadamard::Hadamard;
use lathe_tensor::{ActivationFormat, Block, Element};

use crate::lanes::{Kernel, Lanes, Width, dispatch};
use crate::rows::Rows;

/// A transform with its matrix.
#[derive(Debug, Clone)]
pub(crate) struct Transform {
    hadamard: Option<Hadamard>,
    format: Option<ActivationFormat>,
    /// The scale of the rounding, if it is not the row's own.
    scale: Option<f32>,
}

impl Transform {
    /// `None` if the transform changes nothing. A validated program names only matrices that exist.
    pub(crate) fn new(transform: &InputTransform) -> Option<Self> {
        let hadamard = transform.matrix().expect("a valid program");
        let (format, scale) = (transform.format, transform.scale.map(StaticScale::value));
        (hadamard.is_some() || format.is_some()).then_some(Self { hadamard, format, scale })
    }

    /// Transforms one row in place.
    pub(crate) fn row(&self, width: Width, row: &mut [f32]) {
        dispatch(width, TransformRow { transform: self, row });
    }
}

/// The transform of a step's rows.
#[derive(Debug)]
pub(crate) struct TransformStage {
    /// `[rows, n]`.
    pub input: Rows,
    /// The transform. `None` copies the rows.
    pub transform: Option<Transform>,
    /// `[rows, n]`. May be `input`.
    pub out: Rows,
}

impl TransformStage {
    /// Transforms `rows`.
    ///
    /// # Safety
    /// The rows are valid in both buffers, which are the same or do not overlap, and are nobody
    /// else's.
    pub(crate) unsafe fn run(&self, width: Width, rows: Range<usize>) {
        for row in rows {
            if self.input.row(row) != self.out.row(row) {
                // SAFETY: the caller vouches for both.
                unsafe {
                    let (from, to) = (self.input.row(row), self.out.row(row));
                    std::ptr::copy_nonoverlapping(from, to, self.out.width());
                }
            }
            if let Some(transform) = &self.transform {
                // SAFETY: as above.
                let row =
                    unsafe { std::slice::from_raw_parts_mut(self.out.row(row), self.out.width()) };
                transform.row(width, row);
            }
        }
    }
}

struct TransformRow<'a> {
    transform: &'a Transform,
    row: &'a mut [f32],
}

impl Kernel for TransformRow<'_> {
    type Output = ();
    /// The compiler vectorizes these loops with the instructions of `L`.
    #[inline(always)]
    fn run<L: Lanes>(self) {
        if let Some(matrix) = &self.transform.hadamard {
            for block in self.row.chunks_exact_mut(matrix.size()) {
                matrix.apply_row(block);
            }
        }
        if let Some(format) = self.transform.format {
            round(format, self.transform.scale, self.row);
        }
    }
}

#[inline(always)]
fn round(format: ActivationFormat, stored: Option<f32>, row: &mut [f32]) {
    let scaled = format.scaled();
    let divisor = match (format, stored) {
        (ActivationFormat::Nvfp4, Some(stored)) => stored,
        (ActivationFormat::Nvfp4, None) => {
            global_divisor(&scaled, row.iter().fold(0.0f32, |most, x| most.max(x.abs())))
        }
        _ => 1.0,
    };
    let columns = match scaled.block {
        Block::Group(size) => size as usize,
        _ => row.len().max(1),
    };
    for block in row.chunks_mut(columns) {
        let scale = match stored.filter(|_| format != ActivationFormat::Nvfp4) {
            Some(stored) => stored,
            None => {
                let unit = 1.0 / divisor;
                fit(&scaled, block, unit, ActivationFormat::POWER_OF_TWO).scale / divisor
            }
        };
        match scaled.element {
            _ if scale == 0.0 => block.fill(0.0),
            Element::Int(bits) => {
                let top = ((1i32 << (bits - 1)) - 1) as f32;
                for x in block {
                    *x = round_float_within(*x / scale, -top - 1.0, top) * scale;
                }
            }
            Element::F4E2M1 => round_floats::<1, 0>(block, scale, 6.0),
            // Activations have no other elements but e4m3.
            other => round_floats::<3, -6>(block, scale, element::max(other)),
        }
    }
}

/// Rounds to the nearest number of a small float, ties to even. It adds a power of two whose own
/// last place is that of the small float. `LEAST` is the exponent of the least normal number.
#[inline(always)]
fn round_floats<const MANTISSA: i32, const LEAST: i32>(block: &mut [f32], scale: f32, max: f32) {
    let least = (127 + LEAST) << 23;
    for x in block {
        let ratio = *x / scale;
        let magnitude = ratio.abs().min(max);
        let exponent = (magnitude.to_bits() as i32 & 0x7f80_0000).max(least);
        let magic = f32::from_bits((exponent + ((23 - MANTISSA) << 23)) as u32);
        let rounded = ((magnitude + magic) - magic).copysign(ratio) * scale;
        // e4m3 has a NaN, e2m1 has none.
        *x = if MANTISSA == 3 && ratio.is_nan() { ratio } else { rounded };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(747_796_405) | 1;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from_bits(0x3f80_0000 | state >> 9) - 1.5
        };
        (0..count).map(|i| next() * if i % 37 == 5 { 40.0 } else { 1.0 }).collect()
    }

    /// Rows that reach every path of a codec: random numbers, zeros, ties, denormals, huge numbers,
    /// infinities and NaN.
    fn rows(width: usize) -> Vec<Vec<f32>> {
        let mut all: Vec<Vec<f32>> = (0..40).map(|seed| numbers(width, seed)).collect();
        let filled = |x: f32| vec![x; width];
        let ties = (0..width).map(|i| (i % 61) as f32 * 0.25 - 7.0).collect();
        let steps = (0..width).map(|i| (i as f32 - 40.0) * 2f32.powi(i as i32 % 23 - 11)).collect();
        let tiny: Vec<f32> = (0..width).map(|i| f32::from_bits(i as u32 * 977)).collect();
        let huge: Vec<f32> = numbers(width, 99).iter().map(|x| x * 8e36).collect();
        all.extend([
            filled(0.0),
            filled(-0.0),
            filled(3.5),
            filled(1e-45),
            ties,
            steps,
            tiny,
            huge,
        ]);
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut row = numbers(width, 7);
            row[width / 2] = odd;
            all.push(row);
        }
        all
    }

    #[test]
    fn rounding_is_the_codecs_to_the_bit() {
        let stored = [None, Some(0.037), Some(1.0), Some(117.3), Some(3e-39)]
            .map(|scale| scale.map(|scale| StaticScale::new(scale).expect("a positive number")));
        let takes = |format: ActivationFormat, scale: Option<StaticScale>| {
            scale.is_none() || format.takes_scale()
        };
        for width in [32, 96, 160] {
            for row in rows(width) {
                let all = ActivationFormat::ALL.into_iter();
                let all = all.flat_map(|format| stored.map(|scale| (format, scale)));
                for (format, scale) in all.filter(|(format, scale)| takes(*format, *scale)) {
                    let expected = match scale {
                        Some(scale) => format.round_under(&row, width, scale.value()).unwrap(),
                        None => format.round(&row, width).unwrap(),
                    };
                    let transform = InputTransform { hadamard: None, format: Some(format), scale };
                    let transform = Transform::new(&transform).unwrap();
                    for lanes in Width::available() {
                        let mut found = row.clone();
                        transform.row(lanes, &mut found);
                        for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
                            let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
                            assert!(same, "{format} {lanes:?}: {} became {a}, not {b}", row[i]);
                        }
                    }
                }
            }
        }
    }
}
