//! A low-rank correction of a quantized matrix: two thin matrices that run beside it.

use lathe_tensor::hadamard::Hadamard;
use lathe_tensor::{Bytes, FloatType, Format, Tensor, TensorError, codec};
use ndarray::ArrayView2;

use lathe_linalg::add_product;

/// `B A`, which is added to what a quantized matrix stands for. `A` reads the input of the whole
/// module: where that is rotated while the model runs, the quantized matrix reads it rotated, and
/// `A` as it was before.
#[derive(Debug, Clone)]
pub struct Correction {
    /// `A`, `[rank, columns]` in floats.
    pub a: Tensor,
    /// `B`, `[rows, rank]` in floats.
    pub b: Tensor,
    /// Elements of a block of the input that is rotated (by Hadamard's matrix) while the model
    /// runs.
    pub rotation: Option<usize>,
}

impl Correction {
    /// `B` `[rows, rank]` and `A` `[rank, columns]`, row-major, which reads what the quantized
    /// matrix reads, rounded to `float`.
    ///
    /// # Errors
    /// If the numbers are no whole number of rows.
    ///
    /// # Panics
    /// If there is no Hadamard matrix of `rotation`, or blocks of it do not divide the columns.
    pub fn new(
        shape: [usize; 2],
        mut a: Vec<f64>,
        b: &[f64],
        float: FloatType,
        rotation: Option<usize>,
    ) -> Result<Self, TensorError> {
        let [rows, columns] = shape;
        let rank = a.len() / columns.max(1);
        // The quantized matrix reads `H x`: `(a H) x` is what `a` makes of that.
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

    /// Rows of `A`.
    pub fn rank(&self) -> usize {
        self.a.shape[0]
    }

    /// Bytes of both matrices.
    pub fn bytes(&self) -> usize {
        self.a.codes.len() + self.b.codes.len()
    }

    /// Adds `B A` to `values`, `[rows, columns]`, as it is for the input that the quantized matrix
    /// reads.
    ///
    /// # Panics
    /// If `values` are of another shape.
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
