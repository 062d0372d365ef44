//! Random weights of the right scale in any format, for speed runs without a checkpoint.
//!
//! A block of rows is drawn once for each shape of row and repeated, so that gigabytes cost
//! little more than their memory. The numbers are of no use but to keep activations finite.

use lathe_program::{BackendError, Program, Weight, WeightDecl, WeightRole, WeightSource};
use lathe_tensor::random::SplitMix64;
use lathe_tensor::{
    Bytes, Element, Format, GlobalScale, ScaleType, ScaledFormat, Tensor, TensorError, ZeroPoint,
    codec,
};

/// Rows that are drawn; further ones repeat them.
const ROWS_DRAWN: usize = 64;

/// Seeded random weights for any program.
#[derive(Debug, Clone)]
pub struct DummyWeights<'a> {
    program: &'a Program,
    format: Format,
    seed: u64,
}

impl<'a> DummyWeights<'a> {
    /// Weights of `program`: matrices in `format` (those whose rows are no whole number of its
    /// blocks in bf16), routers in bf16, vectors in `f32`.
    pub fn new(program: &'a Program, format: Format, seed: u64) -> Self {
        DummyWeights { program, format, seed }
    }

    fn make(&self, weight: Weight) -> Result<Tensor, TensorError> {
        let decl = self.program.weight(weight);
        let mut random =
            SplitMix64::new(self.seed ^ (u64::from(weight.0) << 32) ^ 0x9e37_79b9_7f4a_7c15);
        if decl.role == WeightRole::Vector {
            return Ok(vector(decl, &mut random));
        }
        let columns = decl.shape.last().copied().unwrap_or(1);
        let fits = columns.is_multiple_of(self.format.block_len().max(1));
        let format = match decl.role {
            WeightRole::Router => Format::BF16,
            _ if !fits => Format::BF16,
            _ => self.format,
        };
        // Keeps the variance of a product's output near that of its input.
        let deviation = (columns as f32).powf(-0.5);
        match format {
            Format::Scaled(scaled) => scaled_matrix(&decl.shape, scaled, deviation, &mut random),
            format => {
                let rows: usize = decl.shape[..decl.shape.len() - 1].iter().product();
                let drawn = rows.min(ROWS_DRAWN);
                let values = (0..drawn * columns).map(|_| nearly_normal(&mut random) * deviation);
                let tile = codec::quantize(format, &values.collect::<Vec<_>>());
                let bytes = repeat(&tile, format.bytes_for(&decl.shape)?);
                Tensor::new(decl.shape.clone(), format, bytes)
            }
        }
    }
}

impl WeightSource for DummyWeights<'_> {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        self.make(weight).map_err(|error| BackendError::Weight {
            name: self.program.weight(weight).name.clone(),
            reason: error.to_string(),
        })
    }
}

/// Norm weights near 1, anything else near 0.
fn vector(decl: &WeightDecl, random: &mut SplitMix64) -> Tensor {
    let centre = if decl.name.ends_with("norm") { 1.0 } else { 0.0 };
    let count = decl.shape.iter().product();
    let values = (0..count).map(|_| centre + 0.02 * nearly_normal(random)).collect();
    Tensor::from_f32_vec(decl.shape.clone(), values)
}

/// Random codes under equal scales.
fn scaled_matrix(
    shape: &[usize],
    scaled: ScaledFormat,
    deviation: f32,
    random: &mut SplitMix64,
) -> Result<Tensor, TensorError> {
    let format = Format::Scaled(scaled);
    let grid = scaled.grid(shape).ok_or(TensorError::Overflow { shape: shape.to_vec() })?;
    let row = format.row_bytes(shape.last().copied().unwrap_or(1))?;
    let tile: Vec<u8> = (0..row * ROWS_DRAWN).map(|_| code_byte(scaled.element, random)).collect();
    let codes = repeat(&tile, format.bytes_for(shape)?);
    let scale = deviation / element_deviation(scaled.element);
    let (one, global) = scale_bytes(scaled.scale, scale, grid.matrices);
    let scales = repeat(&one, grid.len() * one.len());
    let zeros = if scaled.zero == ZeroPoint::Int { grid.len() } else { 0 };
    Tensor::new_scaled(shape.to_vec(), format, codes, scales, Bytes::new(vec![0; zeros]), global)
}

/// A byte of codes that are all numbers of ordinary size.
fn code_byte(element: Element, random: &mut SplitMix64) -> u8 {
    let byte = (random.next_u64() >> 56) as u8;
    match element {
        // Exponents of 2^-1 to 2^2 (e4m3) and 2^-1 to 2^2 (e5m2); the others would swamp them.
        Element::F8E4M3 => (byte & 0x9f) | 0x30,
        Element::F8E5M2 => (byte & 0x8f) | 0x38,
        _ => byte,
    }
}

/// The standard deviation of random codes, roughly.
fn element_deviation(element: Element) -> f32 {
    match element {
        Element::Int(bits) => (1u32 << bits) as f32 / 12f32.sqrt(),
        Element::F8E4M3 | Element::F8E5M2 => 3.0,
        Element::F6E2M3 | Element::F6E3M2 => 4.0,
        Element::F4E2M1 => 2.8,
    }
}

/// A scale as stored, and the multipliers of `matrices` whole matrices.
fn scale_bytes(kind: ScaleType, scale: f32, matrices: usize) -> (Vec<u8>, GlobalScale) {
    let one = GlobalScale::One;
    match kind {
        ScaleType::F32 => (scale.to_le_bytes().to_vec(), one),
        ScaleType::F16 => (codec::quantize(Format::F16, &[scale]), one),
        ScaleType::BF16 => (codec::quantize(Format::BF16, &[scale]), one),
        ScaleType::E8M0 => (vec![(127.0 + scale.log2().round()).clamp(0.0, 254.0) as u8], one),
        // 0x38 is 1.0 in e4m3.
        ScaleType::E4M3Global => (vec![0x38], GlobalScale::Multiply(vec![scale; matrices])),
    }
}

/// `tile` over and over, `bytes` in all.
fn repeat(tile: &[u8], bytes: usize) -> Bytes {
    let mut out = Vec::with_capacity(bytes);
    while out.len() < bytes {
        let take = tile.len().min(bytes - out.len());
        out.extend_from_slice(&tile[..take]);
    }
    Bytes::new(out)
}

/// Nearly normal: a sum of four uniform numbers, scaled to variance 1.
fn nearly_normal(random: &mut SplitMix64) -> f32 {
    let bits = random.next_u64();
    let sum: u64 = (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum();
    (sum as f32 / 65536.0 - 2.0) * 3f32.sqrt()
}
