//! A low-rank correction of a quantized matrix: two thin matrices that run beside it.

use lathe_tensor::hadamard::Hadamard;
use lathe_tensor::{Bytes, FloatType, Format, Tensor, TensorError, codec};
use ndarray::ArrayView2;

use lathe_linalg::add_product;

/// `B A`, which is added to the value of a quantized matrix. `A` reads the input of the whole
/// module. If that input is rotated while the model runs, the quantized matrix reads it after the
/// rotation and `A` reads it before.
#[derive(Debug, Clone)]
pub struct Correction {
    /// `A`, `[rank, columns]`, in a float format.
    pub a: Tensor,
    /// `B`, `[rows, rank]`, in a float format.
    pub b: Tensor,
    /// Elements of a block of the input, if a Hadamard matrix rotates the input while the model
    /// runs.
    pub rotation: Option<usize>,
}

impl Correction {
    /// A correction of `B` `[rows, rank]` and `A` `[rank, columns]`, both row-major, rounded to
    /// `float`. The given `A` is for the input that the quantized matrix reads (after the
    /// rotation).
    ///
    /// # Errors
    /// If the numbers do not fill whole rows.
    ///
    /// # Panics
    /// If there is no Hadamard matrix of size `rotation`, or if `rotation` does not divide the
    /// columns.
    pub fn new(
        shape: [usize; 2],
        mut a: Vec<f64>,
        b: &[f64],
        float: FloatType,
        rotation: Option<usize>,
    ) -> Result<Self, TensorError> {
        let [rows, columns] = shape;
        let rank = a.len() / columns.max(1);
        // The quantized matrix reads `H x`. So the stored `A` is `a H`, because `a (H x) = (a H)
        // x`.
        if let Some(block) = rotation {
            hadamard(block).apply_transposed(&mut a);
        }
        let rounded = |shape: [usize; 2], values: &[f64]| {
            let values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
            let format = Format::Float(float);
            Tensor::new(shape.to_vec(), format, Bytes::new(codec::quantize(format, &values)))
        };
        let (a, b) = (rounded([rank, columns], &a)?, rounded([rows, rank], b)?);
        Ok(Correction { a, b, rotation })
    }

    /// The rank: rows of `A`.
    pub fn rank(&self) -> usize {
        self.a.shape[0]
    }

    /// Bytes of both matrices.
    pub fn bytes(&self) -> usize {
        self.a.codes.len() + self.b.codes.len()
    }

    /// Adds `B A` to `values`, `[rows, columns]`, in the basis of the input that the quantized
    /// matrix reads.
    ///
    /// # Panics
    /// If `values` has another shape.
    pub fn add_to(&self, values: &mut [f32]) {
        let (rank, columns) = (self.rank(), self.a.shape[1]);
        let mut a = self.a.to_f32();
        if let Some(block) = self.rotation {
            hadamard(block).apply(&mut a);
        }
        let b = self.b.to_f32();
        assert_eq!(values.len(), self.b.shape[0] * columns, "a matrix of that shape");
        let a = ArrayView2::from_shape((rank, columns), &a).expect("its shape");
        let b = ArrayView2::from_shape((self.b.shape[0], rank), &b).expect("its shape");
        add_product(b, a, values);
    }
}

fn hadamard(block: usize) -> Hadamard {
    Hadamard::new(block).expect("a valid program's block has a matrix")
}
