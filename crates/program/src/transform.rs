//! `InputTransform`: a change of a matrix's input before the product.

use std::fmt;

use lathe_tensor::ActivationFormat;
use lathe_tensor::hadamard::Hadamard;

/// A scale of inputs that calibration found. It replaces the scale that each row would compute
/// ([`ActivationFormat::takes_scale`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StaticScale(u32);

impl StaticScale {
    /// `None` unless `value` is a positive finite number.
    pub fn new(value: f32) -> Option<Self> {
        // The bits of positive numbers have the order of the numbers.
        (value.is_finite() && value > 0.0).then(|| Self(value.to_bits()))
    }

    /// The number.
    pub fn value(self) -> f32 {
        f32::from_bits(self.0)
    }
}

/// A rotation and a rounding of each row. The rotation comes first; its inverse is folded into the
/// matrices that read the row (QuaRot's R4, arXiv 2404.00456; MR-GPTQ's blocks, arXiv 2509.23202).
/// Then the row is rounded to a format of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct InputTransform {
    /// Elements of a block that `lathe_tensor::hadamard`'s orthonormal matrix `H` multiplies: a
    /// block `x` becomes `x Hᵀ`. `None` means no rotation.
    pub hadamard: Option<usize>,
    /// The format that the (rotated) row is rounded to.
    pub format: Option<ActivationFormat>,
    /// The scale of that rounding. `None` means that each row computes its own.
    pub scale: Option<StaticScale>,
}

impl InputTransform {
    /// Whether the transform does nothing.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    /// The matrix of a block, if there is a rotation.
    ///
    /// # Errors
    /// If there is no Hadamard matrix of the size; the reason names it.
    pub fn matrix(&self) -> Result<Option<Hadamard>, String> {
        let matrix = |size| {
            Hadamard::new(size).ok_or_else(|| format!("no Hadamard matrix of {size} elements"))
        };
        self.hadamard.map(matrix).transpose()
    }

    /// Checks that rows of `width` elements can be transformed.
    ///
    /// # Errors
    /// What was found and what was expected.
    pub fn check(&self, width: usize) -> Result<(), String> {
        self.matrix()?;
        if self.scale.is_some() && !self.format.is_some_and(ActivationFormat::takes_scale) {
            return Err(format!("{self} under a stored scale, expected a format that takes one"));
        }
        let units = [self.hadamard, self.format.map(ActivationFormat::width_unit)];
        match units.into_iter().flatten().find(|unit| !width.is_multiple_of(*unit)) {
            None => Ok(()),
            Some(unit) => Err(format!("{self} of {width} elements, expected a multiple of {unit}")),
        }
    }

    /// A row may be cut at multiples of this, because such blocks are independent. `None` if an
    /// element depends on the whole row.
    pub fn unit(&self) -> Option<usize> {
        let format = match (self.format, self.scale) {
            (Some(format), Some(_)) => format.width_unit(),
            (format, _) => format.map_or(Some(1), ActivationFormat::group)?,
        };
        let block = self.hadamard.unwrap_or(1);
        // A multiple of both, though not always the least.
        Some(if block.is_multiple_of(format) { block } else { block * format })
    }

    /// The scalar definition, on rows of `width` elements.
    ///
    /// # Panics
    /// If [`Self::check`] refuses the width, or `rows` is no whole number of rows.
    pub fn apply(&self, rows: &mut [f32], width: usize) {
        if let Some(matrix) = self.matrix().expect("a checked transform") {
            rows.chunks_exact_mut(matrix.size()).for_each(|block| matrix.apply_row(block));
        }
        if let Some(format) = self.format {
            let rounded = match self.scale {
                Some(scale) => format.round_under(rows, width, scale.value()),
                None => format.round(rows, width),
            };
            rows.copy_from_slice(&rounded.expect("a checked width"));
        }
    }
}

impl fmt::Display for InputTransform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.scale.is_some() { "-static" } else { "" };
        match (self.hadamard, self.format) {
            (None, None) => f.write_str("as it is"),
            (None, Some(format)) => write!(f, "{format}{kind}"),
            (Some(block), None) => write!(f, "hadamard{block}"),
            (Some(block), Some(format)) => write!(f, "hadamard{block}+{format}{kind}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let of = |hadamard, format| InputTransform { hadamard, format, scale: None };
        let mx = Some(ActivationFormat::Mxfp4);
        assert!(of(Some(12), None).check(24).is_ok());
        assert!(of(Some(10), None).check(20).unwrap_err().contains("matrix of 10 elements"));
        assert!(of(Some(16), None).check(40).unwrap_err().contains("multiple of 16"));
        assert!(of(None, mx).check(48).unwrap_err().contains("mxfp4 of 48 elements"));
        assert_eq!(of(Some(32), mx).unit(), Some(32));
        assert_eq!(of(Some(16), mx).unit(), Some(512));
        assert_eq!(of(Some(64), None).unit(), Some(64));
        assert_eq!(of(None, Some(ActivationFormat::Int8Token)).unit(), None);
        assert_eq!(of(Some(32), Some(ActivationFormat::Nvfp4)).unit(), None);
        let under = |format| InputTransform { scale: StaticScale::new(2.0), ..of(None, format) };
        assert!(under(mx).check(64).unwrap_err().contains("mxfp4-static under a stored scale"));
        assert!(under(None).check(64).is_err());
        assert_eq!(under(Some(ActivationFormat::Nvfp4)).unit(), Some(16));
        assert_eq!(under(Some(ActivationFormat::Fp8Token)).unit(), Some(1));
        for odd in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(StaticScale::new(odd), None);
        }
    }

    /// By hand: 3, 1, 1, -1 times H4 / 2 is 2, 2, 2, 0. The scale of int4 is 2 / 7.5, so 2 is code
    /// 7.5. It rounds to 8 (ties to even) and saturates to 7.
    #[test]
    fn a_rotation_comes_before_the_rounding() {
        let mut row = [3.0, 1.0, 1.0, -1.0];
        let format = Some(ActivationFormat::Int4Token);
        InputTransform { hadamard: Some(4), format, scale: None }.apply(&mut row, 4);
        let seven = 7.0 * (2.0f32 / 7.5);
        assert_eq!(row, [seven, seven, seven, 0.0]);
    }

    /// By hand, with a step of a half: 3.3 is code 6.6, which e4m3 rounds to 6.5, and 300 saturates
    /// at 448 halves. int8 rounds to 7 and saturates at 127 halves.
    #[test]
    fn a_stored_scale_is_the_step_of_a_code() {
        let rounded = |format| {
            let mut row = [3.3, -300.0, 0.1, 0.0];
            let scale = StaticScale::new(0.5);
            InputTransform { hadamard: None, format: Some(format), scale }.apply(&mut row, 4);
            row
        };
        assert_eq!(rounded(ActivationFormat::Fp8Token), [3.25, -224.0, 0.1015625, 0.0]);
        assert_eq!(rounded(ActivationFormat::Int8Token), [3.5, -64.0, 0.0, 0.0]);
    }

    /// With NVFP4's divisor of one, a block's scale is its largest number over six, rounded to
    /// e4m3: 24 and 3 give 4 and 0.5.
    #[test]
    fn blocks_of_nvfp4_are_scaled_under_a_stored_divisor() {
        let mut row = [0.0f32; 32];
        (row[0], row[1], row[16], row[17]) = (24.0, 7.0, 3.0, -0.8);
        let format = Some(ActivationFormat::Nvfp4);
        let scale = StaticScale::new(1.0);
        InputTransform { hadamard: None, format, scale }.apply(&mut row, 32);
        assert_eq!([row[0], row[1], row[16], row[17]], [24.0, 8.0, 3.0, -0.75]);
    }
}
