//! `InputTransform`: what is done to the input of matrices before they multiply it.

use std::fmt;

use lathe_tensor::ActivationFormat;
use lathe_tensor::hadamard::Hadamard;

/// A rotation and a rounding of each row by itself: first the rotation, whose inverse is folded
/// into the matrices that read the row (QuaRot's R4, arXiv 2404.00456; MR-GPTQ's blocks, arXiv
/// 2509.23202), then the rounding to a format of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct InputTransform {
    /// Elements of each block that `lathe_tensor::hadamard`'s orthonormal matrix `H` multiplies:
    /// a block `x` becomes `x Hᵀ`. `None` leaves rows as they are.
    pub hadamard: Option<usize>,
    /// What the (rotated) row is rounded to.
    pub format: Option<ActivationFormat>,
}

impl InputTransform {
    /// Whether it changes nothing.
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

    /// Whether rows of `width` elements can be treated so.
    ///
    /// # Errors
    /// What was found and what was expected.
    pub fn check(&self, width: usize) -> Result<(), String> {
        self.matrix()?;
        let units = [self.hadamard, self.format.map(ActivationFormat::width_unit)];
        match units.into_iter().flatten().find(|unit| !width.is_multiple_of(*unit)) {
            None => Ok(()),
            Some(unit) => Err(format!("{self} of {width} elements, expected a multiple of {unit}")),
        }
    }

    /// Elements that depend on no others, from the first on: where a row may be cut. `None` if
    /// an element depends on the whole row.
    pub fn unit(&self) -> Option<usize> {
        let format = self.format.map_or(Some(1), ActivationFormat::group)?;
        let block = self.hadamard.unwrap_or(1);
        // Powers of two, or one of them is 1; otherwise a common multiple does.
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
            rows.copy_from_slice(&format.round(rows, width).expect("a checked width"));
        }
    }
}

impl fmt::Display for InputTransform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.hadamard, self.format) {
            (None, None) => f.write_str("as it is"),
            (None, Some(format)) => write!(f, "{format}"),
            (Some(block), None) => write!(f, "hadamard{block}"),
            (Some(block), Some(format)) => write!(f, "hadamard{block}+{format}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let of = |hadamard, format| InputTransform { hadamard, format };
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
    }

    /// By hand: 3, 1, 1, -1 times H4 / 2 is 2, 2, 2, 0; the scale of int4 is 2 / 7.5, so that a 2
    /// is code 7.5, which saturates to 7 (ties to even gives 8).
    #[test]
    fn a_rotation_comes_before_the_rounding() {
        let mut row = [3.0, 1.0, 1.0, -1.0];
        let format = Some(ActivationFormat::Int4Token);
        InputTransform { hadamard: Some(4), format }.apply(&mut row, 4);
        let seven = 7.0 * (2.0f32 / 7.5);
        assert_eq!(row, [seven, seven, seven, 0.0]);
    }
}
