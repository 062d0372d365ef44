//! Dense linear algebra for quantization and training: matrix products, Cholesky factors, quadratic
//! forms and leading singular vectors. All of it runs on rayon's threads. No result depends on the
//! number of threads.

#![forbid(unsafe_code)]

mod dense;
mod quadratic;
mod svd;

pub use dense::{
    NotPositive, add_product, cholesky, dot, inverse_of_lower, part, product, square,
    upper_factor_of_inverse,
};
pub use quadratic::Quadratic;
pub use svd::{leading_left, singular_values};
