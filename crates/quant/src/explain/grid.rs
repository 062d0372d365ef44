//! A format with exact scales: its codes and the way a block's range gives the scale, without the
//! storage format of the scales.

use lathe_tensor::codec::{self, element};
use lathe_tensor::{
    Block, Element, Format, GgmlType, ScaleGrid, ScaleType, ScaledFormat, ZeroPoint,
};
use rayon::prelude::*;

/// The numbers that the codes represent.
#[derive(Debug, Clone, Copy)]
enum Codes {
    /// Whole numbers: neighbours differ by one.
    Whole,
    /// Floats: the distance of neighbours depends on the exponent.
    Float(Element),
    /// IQ4's sixteen values.
    Table([f32; 16]),
}

/// How a block's numbers determine its step and zero point.
#[derive(Debug, Clone, Copy)]
enum Range {
    /// The largest magnitude maps to this code.
    Largest(f32),
    /// The number with the largest magnitude maps, with its sign, to this code.
    Signed(f32),
    /// There are `levels` steps from the least number to the largest. `bottom` is the least code,
    /// if zero has a whole code of its own.
    Between { levels: f32, bottom: Option<f32>, with_zero: bool },
}

/// A format apart from the storage of its scales.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    codes: Codes,
    range: Range,
    /// The numbers that share a step.
    pub blocks: ScaleGrid,
    columns: usize,
}

/// Step and zero point of each block: `value = (code - zero) * step`.
#[derive(Debug, Clone)]
pub(super) struct Steps {
    pub step: Vec<f32>,
    pub zero: Vec<f32>,
}

impl Grid {
    /// The grid of `format` for `shape`. `None` for plain floats.
    pub(super) fn new(format: Format, shape: &[usize]) -> Option<Self> {
        let columns = shape.last().copied().unwrap_or(1).max(1);
        let (codes, range, layout) = match format {
            Format::Float(_) => return None,
            Format::Ggml(kind) => {
                let (codes, range, size) = of_ggml(kind);
                let element = Element::Int(8);
                let (block, scale) = (Block::Group(size), ScaleType::F32);
                (codes, range, ScaledFormat { element, block, scale, zero: ZeroPoint::None })
            }
            Format::Scaled(scaled) => {
                let (codes, range) = of_scaled(&scaled);
                (codes, range, scaled)
            }
        };
        Some(Grid { codes, range, blocks: layout.grid(shape)?, columns })
    }

    /// The steps, in `f32`, under which nothing is clipped. They are taken over all columns that
    /// are not `left_out`.
    pub(super) fn fitted(&self, values: &[f32], left_out: &[bool]) -> Steps {
        let mut low = vec![0f32; self.blocks.len()];
        let mut high = low.clone();
        // Formats with a free minimum need not represent zero.
        if matches!(self.range, Range::Between { with_zero: false, .. }) {
            low.fill(f32::INFINITY);
            high.fill(f32::NEG_INFINITY);
        }
        for (row, values) in values.chunks(self.columns).enumerate() {
            let first = self.blocks.row_start(row);
            let parts = values.chunks(self.blocks.block_columns);
            let left_out = left_out.chunks(self.blocks.block_columns);
            for (at, (part, left_out)) in parts.zip(left_out).enumerate() {
                let (low, high) = (&mut low[first + at], &mut high[first + at]);
                for (value, _) in part.iter().zip(left_out).filter(|(_, out)| !**out) {
                    (*low, *high) = (low.min(*value), high.max(*value));
                }
            }
        }
        let of_block = |(low, high): (f32, f32)| {
            let largest = high.max(-low);
            match self.range {
                _ if low > high || !largest.is_finite() => (0.0, 0.0),
                Range::Largest(code) => (largest / code, 0.0),
                Range::Signed(code) => ((if high >= -low { high } else { low }) / code, 0.0),
                Range::Between { levels, bottom: Some(bottom), .. } => {
                    let step = (high - low) / levels;
                    let zero = bottom - (low / step).round_ties_even();
                    (step, if step > 0.0 { zero } else { 0.0 })
                }
                // If all numbers are equal, the minimum alone represents them.
                Range::Between { levels, bottom: None, .. } => {
                    let step = if high > low { (high - low) / levels } else { low };
                    (step, if step == 0.0 { 0.0 } else { -low / step })
                }
            }
        };
        let (step, zero) = low.into_iter().zip(high).map(of_block).unzip();
        Steps { step, zero }
    }

    /// The errors `rounded - value` of nearest codes, with codes that never end (no clipping).
    pub(super) fn errors(&self, values: &[f32], steps: &Steps) -> Vec<f32> {
        self.each(values, steps, |value, step, zero| {
            if step == 0.0 {
                return -value;
            }
            (self.nearest(value / step + zero) - zero) * step - value
        })
    }

    /// The variance of uniform noise between the two neighbours of each number: `gap^2 / 12`.
    pub(super) fn noise(&self, values: &[f32], steps: &Steps) -> Vec<f32> {
        self.each(values, steps, |value, step, zero| {
            let gap = if step == 0.0 { 0.0 } else { step * self.gap(value / step + zero) };
            gap * gap / 12.0
        })
    }

    /// Calls `one` with each number, its step and its zero point, and collects the results.
    pub(super) fn each(
        &self,
        values: &[f32],
        steps: &Steps,
        one: impl Fn(f32, f32, f32) -> f32 + Sync,
    ) -> Vec<f32> {
        let mut out = vec![0f32; values.len()];
        let rows = out.par_chunks_mut(self.columns).zip(values.par_chunks(self.columns));
        rows.enumerate().for_each(|(row, (out, values))| {
            let first = self.blocks.row_start(row);
            let size = self.blocks.block_columns;
            for (at, (out, values)) in out.chunks_mut(size).zip(values.chunks(size)).enumerate() {
                let (step, zero) = (steps.step[first + at], steps.zero[first + at]);
                out.iter_mut().zip(values).for_each(|(out, value)| *out = one(*value, step, zero));
            }
        });
        out
    }

    fn nearest(&self, ratio: f32) -> f32 {
        match self.codes {
            Codes::Whole => ratio.round_ties_even(),
            Codes::Float(element) => {
                let quantum = quantum(element, ratio);
                (ratio / quantum).round_ties_even() * quantum
            }
            Codes::Table(values) => {
                let nearer = |best: f32, value: f32| {
                    if (value - ratio).abs() < (best - ratio).abs() { value } else { best }
                };
                values.into_iter().fold(values[0], nearer)
            }
        }
    }

    fn gap(&self, ratio: f32) -> f32 {
        match self.codes {
            Codes::Whole => 1.0,
            Codes::Float(element) => quantum(element, ratio),
            Codes::Table(values) => {
                let above = values.iter().filter(|value| **value < ratio).count();
                let above = above.clamp(1, values.len() - 1);
                values[above] - values[above - 1]
            }
        }
    }
}

/// The distance of neighbouring codes around `ratio`: a power of two that shrinks with the number,
/// down to that of the denormals.
fn quantum(kind: Element, ratio: f32) -> f32 {
    let least = element::exponent_of(element::to_f32(kind, 1));
    let mantissa = element::mantissa_bits(kind) as i32;
    let own = element::exponent_of(ratio.abs()).saturating_sub(mantissa);
    2f32.powi(own.clamp(least, 127))
}

fn of_scaled(format: &ScaledFormat) -> (Codes, Range) {
    match (format.element, format.zero) {
        (Element::Int(bits), ZeroPoint::Int) => {
            let bottom = Some(-((1i32 << (bits - 1)) as f32));
            let levels = ((1u32 << bits) - 1) as f32;
            (Codes::Whole, Range::Between { levels, bottom, with_zero: true })
        }
        // compressed-tensors maps half of the codes' range to either side.
        (Element::Int(bits), ZeroPoint::None) => {
            (Codes::Whole, Range::Largest(((1u32 << bits) - 1) as f32 / 2.0))
        }
        (float, _) => (Codes::Float(float), Range::Largest(element::max(float))),
    }
}

/// The codes, the range rule and the numbers that share a step.
fn of_ggml(kind: GgmlType) -> (Codes, Range, u32) {
    let free = |levels: f32, with_zero: bool| Range::Between { levels, bottom: None, with_zero };
    match kind {
        GgmlType::Q4_0 => (Codes::Whole, Range::Signed(-8.0), 32),
        GgmlType::Q5_0 => (Codes::Whole, Range::Signed(-16.0), 32),
        GgmlType::Q8_0 => (Codes::Whole, Range::Largest(127.0), 32),
        GgmlType::Q4_1 => (Codes::Whole, free(15.0, false), 32),
        GgmlType::Q5_1 => (Codes::Whole, free(31.0, false), 32),
        GgmlType::Q4_K => (Codes::Whole, free(15.0, true), 32),
        GgmlType::Q5_K => (Codes::Whole, free(31.0, true), 32),
        GgmlType::Q6_K => (Codes::Whole, Range::Signed(-32.0), 16),
        GgmlType::IQ4_NL | GgmlType::IQ4_XS => {
            let values = iq4_values();
            (Codes::Table(values), Range::Signed(values[0]), 32)
        }
    }
}

/// IQ4's values, read from its decoder: a block with scale one and the codes 0 to 15 twice.
fn iq4_values() -> [f32; 16] {
    let mut block = [0u8; 18];
    codec::quantize(Format::F16, &[1.0]).iter().zip(&mut block).for_each(|(from, to)| *to = *from);
    (0..16).for_each(|code| block[2 + code] = code as u8);
    let mut values = [0f32; 32];
    codec::dequantize(Format::Ggml(GgmlType::IQ4_NL), &block, &mut values);
    std::array::from_fn(|code| values[code])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_floats_are_those_of_their_codes() {
        for kind in [Element::F4E2M1, Element::F6E2M3, Element::F6E3M2, Element::F8E4M3] {
            let scaled = ScaledFormat { element: kind, ..ScaledFormat::MXFP4 };
            let grid = Grid::new(Format::Scaled(scaled), &[1, 32]).unwrap();
            let codes = 1u8 << (kind.bits() - 1);
            let all: Vec<f32> = (0..codes).map(|code| element::to_f32(kind, code)).collect();
            for pair in all.windows(2).filter(|pair| pair[1].is_finite()) {
                let (low, high) = (pair[0], pair[1]);
                assert_eq!(grid.gap((low + high) / 2.0), high - low, "{kind:?} {low}");
                for near in [0.4, 0.6] {
                    let value = low + near * (high - low);
                    assert_eq!(grid.nearest(-value), -(if near < 0.5 { low } else { high }));
                }
            }
        }
        assert_eq!(iq4_values()[..2], [-127.0, -104.0]);
    }
}
