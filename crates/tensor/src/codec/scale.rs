//! Scales of blocks: how they are stored, and which scale a block gets if each number is rounded to
//! nearest.

use half::{bf16, f16};

use super::element;
use super::search::round_float_within;
use crate::format::{Element, ScaleType, ScaledFormat, ZeroPoint};

/// How the power of two of an MX block is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum E8m0Rounding {
    /// `floor(log2(largest)) - floor(log2(element's largest))`, as in the OCP MX specification.
    /// Numbers between the element's largest and the next power of two saturate.
    #[default]
    Floor,
    /// The least power of two for which nothing saturates (NVIDIA's RCEIL).
    Ceil,
    /// As `Floor`, after rounding the largest number to the element's mantissa. So saturation costs
    /// no more than rounding does.
    Even,
    /// The exponent with the least squared error, of `Floor`'s exponent and its two neighbours.
    Mse,
}

/// The scale and zero point of one block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockScale {
    /// A value that the scale's type can store, without the global scale.
    pub scale: f32,
    /// The code that stands for zero. 0 in symmetric formats.
    pub zero: i8,
}

/// The bytes of a stored scale, low byte first. Unused bytes are zero.
pub(super) fn store(kind: ScaleType, scale: f32) -> [u8; 4] {
    match kind {
        ScaleType::F32 => scale.to_le_bytes(),
        ScaleType::F16 => widen(f16::from_f32(scale).to_le_bytes()),
        ScaleType::BF16 => widen(bf16::from_f32(scale).to_le_bytes()),
        ScaleType::E8M0 => [e8m0_above(scale), 0, 0, 0],
        ScaleType::E4M3Global => [element::from_f32(Element::F8E4M3, scale), 0, 0, 0],
    }
}

fn widen(bytes: [u8; 2]) -> [u8; 4] {
    [bytes[0], bytes[1], 0, 0]
}

/// The stored scale at `bytes`.
pub(super) fn load(kind: ScaleType, bytes: &[u8]) -> f32 {
    match kind {
        ScaleType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        ScaleType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        ScaleType::BF16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        ScaleType::E8M0 => element::e8m0_to_f32(bytes[0]),
        ScaleType::E4M3Global => element::to_f32(Element::F8E4M3, bytes[0]),
    }
}

/// The nearest scale that the type can store. For E8M0 it is the least power of two that is not
/// smaller, so that nothing saturates that did not before.
pub fn round(kind: ScaleType, scale: f32) -> f32 {
    load(kind, &store(kind, scale))
}

/// The code of the least power of two that is not smaller than `scale`.
fn e8m0_above(scale: f32) -> u8 {
    if !scale.is_finite() {
        return 255;
    }
    let exponent = element::exponent_of(scale.abs());
    let exact = scale.abs() == 2f32.powi(exponent);
    element::e8m0_from_exponent(if exact { exponent } else { exponent.saturating_add(1) })
}

/// The scale and zero point of a block for rounding each number to nearest. `global` is what
/// the format multiplies stored scales by (1 without a global scale).
///
/// Integers follow compressed-tensors: symmetric `largest / ((2^bits - 1) / 2)`, asymmetric `(max -
/// min) / (2^bits - 1)` over a range that includes zero. For floats the largest magnitude becomes
/// the element's largest value.
pub fn fit(
    format: &ScaledFormat,
    values: &[f32],
    global: f32,
    rounding: E8m0Rounding,
) -> BlockScale {
    fit_shrunken(format, values, Span::of(values), 1.0, global, rounding)
}

/// The least and the largest of some numbers and zero. NaN if one of them is not finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    low: f32,
    high: f32,
}

impl Span {
    /// The span of `values`.
    pub fn of(values: &[f32]) -> Self {
        const LANES: usize = 16;
        let (mut low, mut high, mut nothing) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
        let mut take = |i: usize, v: f32| {
            low[i] = low[i].min(v);
            high[i] = high[i].max(v);
            // This adds zero, or NaN if `v` is not finite.
            nothing[i] += v * 0.0;
        };
        let (whole, rest) = values.as_chunks::<LANES>();
        whole.iter().for_each(|values| (0..LANES).for_each(|i| take(i, values[i])));
        rest.iter().enumerate().for_each(|(i, v)| take(i, *v));
        let nothing: f32 = nothing.iter().sum();
        let low = low.into_iter().fold(0.0, f32::min);
        Span { low: low + nothing, high: high.into_iter().fold(0.0, f32::max) + nothing }
    }
}

/// As [`fit`] for `values` times a `ratio` that is not negative. `span` is the span of `values`.
/// Rounding keeps order, so a search over ratios needs to read the numbers only once.
pub fn fit_shrunken(
    format: &ScaledFormat,
    values: &[f32],
    span: Span,
    ratio: f32,
    global: f32,
    rounding: E8m0Rounding,
) -> BlockScale {
    let (low, high) = (span.low * ratio, span.high * ratio);
    if !(low.is_finite() && high.is_finite()) {
        // A NaN must not become a number. It makes its whole block NaN.
        return BlockScale { scale: load(format.scale, &store(format.scale, f32::NAN)), zero: 0 };
    }
    let largest = high.max(-low);
    let range = match format.element {
        Element::Int(bits) => ((1u32 << bits) - 1) as f32 / 2.0,
        other => element::max(other),
    };
    if format.scale == ScaleType::E8M0 {
        let scale = fit_power(format.element, values, ratio, largest, range, rounding);
        return BlockScale { scale, zero: 0 };
    }
    match (format.zero, format.element) {
        (ZeroPoint::Int, Element::Int(bits)) => {
            let bottom = -(1i32 << (bits - 1)) as f32;
            let scale = round(format.scale, (high - low) / (2.0 * range) / global);
            let step = scale * global;
            let zero = if step > 0.0 { bottom - (low / step).round_ties_even() } else { 0.0 };
            BlockScale { scale, zero: zero.clamp(bottom, -bottom - 1.0) as i8 }
        }
        _ => {
            let wanted = largest / range / global;
            let least = match format.scale {
                // A block of small numbers gets the least scale that is not zero.
                ScaleType::E4M3Global if largest > 0.0 => 2f32.powi(-9),
                _ => 0.0,
            };
            BlockScale { scale: round(format.scale, wanted).max(least), zero: 0 }
        }
    }
}

fn fit_power(
    kind: Element,
    values: &[f32],
    ratio: f32,
    largest: f32,
    range: f32,
    rounding: E8m0Rounding,
) -> f32 {
    let top = element::exponent_of(range);
    let power = |exponent: i32| element::e8m0_to_f32(element::e8m0_from_exponent(exponent));
    let floor = element::exponent_of(largest).saturating_sub(top);
    match rounding {
        E8m0Rounding::Floor => power(floor),
        E8m0Rounding::Ceil => {
            // This is exact, because the product of a power of two and a small float is not rounded
            // in f64.
            let fits = f64::from(largest) <= f64::from(range) * 2f64.powi(floor.max(-200));
            power(if fits { floor } else { floor + 1 })
        }
        E8m0Rounding::Even => {
            let half_step = 1u32 << (23 - element::mantissa_bits(kind) - 1);
            let rounded = f32::from_bits(largest.to_bits().saturating_add(half_step));
            power(element::exponent_of(rounded).saturating_sub(top))
        }
        E8m0Rounding::Mse => {
            [floor, floor.saturating_add(1), floor.saturating_sub(1)]
                .map(|exponent| {
                    (power(exponent), squared_error(kind, values, ratio, power(exponent)))
                })
                .into_iter()
                .fold((power(floor), f64::INFINITY), |best, c| if c.1 < best.1 { c } else { best })
                .0
        }
    }
}

fn squared_error(kind: Element, values: &[f32], ratio: f32, scale: f32) -> f64 {
    let difference = |v: f32| {
        let v = v * ratio;
        let code = element::from_f32(kind, v / scale);
        f64::from(element::to_f32(kind, code)) * f64::from(scale) - f64::from(v)
    };
    values.iter().map(|&v| difference(v).powi(2)).sum()
}

/// The code of `value` in a block: `round(value / scale) + zero` within the element's range.
pub fn encode(kind: Element, value: f32, scale: f32, zero: i8) -> u8 {
    let ratio = if scale == 0.0 { 0.0 } else { value / scale };
    match kind {
        Element::Int(_) => {
            // These bounds only keep the addition exact. The element's own bounds follow.
            element::from_f32(kind, round_float_within(ratio, -1e6, 1e6) + f32::from(zero))
        }
        _ => element::from_f32(kind, ratio),
    }
}
