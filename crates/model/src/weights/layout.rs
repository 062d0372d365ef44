//! From tensors as files have them to the canonical `[out, in]` and `[experts, out, in]`.
//!
//! Rows move as bytes, in whatever format; only what cannot (a transposed quantized tensor, rows
//! that cut a tile of scales) is dequantized, to `f32`.

use lathe_tensor::{Bytes, Format, GlobalScale, Tensor, TensorError};

/// What to do with the tensors of a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Arrangement {
    /// Nothing.
    Whole,
    /// Put one tensor an expert on top of one another.
    Stack,
    /// From every `period` rows take `run`, the first at `start`, each `step` after the last.
    Rows {
        /// Rows are elements of a vector.
        vector: bool,
        period: usize,
        start: usize,
        run: usize,
        step: usize,
    },
    /// Transpose each matrix of `columns` columns and take every `step`th row of the result, from
    /// `first` on.
    Transposed { columns: usize, first: usize, step: usize },
    /// Undo the order of query and key rows of GGUF's Llama; `head` rows belong together.
    Unpermuted {
        /// Rows are elements of a vector.
        vector: bool,
        head: usize,
    },
    /// Transpose each of `heads` matrices and put the rows of all below one another.
    TransposedHeads { heads: usize },
}

/// Whether two shapes hold the same rows in the same order: equal but for dimensions of 1, or
/// one of them with all rows put together.
pub(super) fn same_rows(found: &[usize], wanted: &[usize]) -> bool {
    let real = |shape: &[usize]| shape.iter().copied().filter(|d| *d != 1).collect::<Vec<_>>();
    let (found, wanted) = (real(found), real(wanted));
    if found == wanted {
        return true;
    }
    let flat = |shape: &[usize]| {
        let (last, rows) = shape.split_last()?;
        Some((rows.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?, *last))
    };
    found.len().min(wanted.len()) == 2 && flat(&found).is_some() && flat(&found) == flat(&wanted)
}

/// The weight of `shape` that `parts` hold.
pub(super) fn arrange(
    layout: &Arrangement,
    parts: Vec<Tensor>,
    shape: &[usize],
) -> Result<Tensor, TensorError> {
    let tensor = match layout {
        Arrangement::Stack => return stack(&parts, shape),
        _ => parts.into_iter().next().expect("one tensor"),
    };
    match layout {
        Arrangement::Stack | Arrangement::Whole => fit(tensor, shape),
        Arrangement::Rows { vector, period, start, run, step } => {
            let tensor = if *vector { as_column(tensor)? } else { tensor };
            let periods = tensor.rows() / period;
            if *step == 1 {
                let starts = (0..periods).map(|i| i * period + start);
                return fit(take_runs(&tensor, starts, *run)?, shape);
            }
            let rows = (0..periods)
                .flat_map(|i| (0..*run).map(move |row| i * period + start + row * step));
            fit(gather(&tensor, &rows.collect::<Vec<_>>())?, shape)
        }
        Arrangement::Unpermuted { vector, head } => {
            let tensor = if *vector { as_column(tensor)? } else { tensor };
            let half = head / 2;
            // Row `half * i + j` of a head (half i, pair j) lies at `2 * j + i`.
            let place = |row: usize| {
                let (start, at) = (row / head * head, row % head);
                start + 2 * (at % half) + at / half
            };
            let rows: Vec<usize> = (0..tensor.rows()).map(place).collect();
            fit(gather(&tensor, &rows)?, shape)
        }
        Arrangement::Transposed { columns, first, step } => {
            let [matrices, inner] = [shape[0], shape[2]];
            let whole = transpose(&tensor, [matrices, inner, *columns], (shape[1], *first, *step))?;
            fit(whole, shape)
        }
        Arrangement::TransposedHeads { heads } => {
            let out = shape[0] / heads;
            fit(transpose(&tensor, [*heads, shape[1], out], (out, 0, 1))?, shape)
        }
    }
}

/// The same rows under the program's shape.
fn fit(tensor: Tensor, shape: &[usize]) -> Result<Tensor, TensorError> {
    if tensor.shape == shape { Ok(tensor) } else { tensor.reshape(shape.to_vec()) }
}

/// A vector (or several) as rows of one element.
fn as_column(tensor: Tensor) -> Result<Tensor, TensorError> {
    let elements = tensor.elements();
    match tensor.format {
        Format::Float(_) => tensor.reshape(vec![elements, 1]),
        _ => Tensor::from_f32_vec(vec![elements], tensor.to_f32()).reshape(vec![elements, 1]),
    }
}

fn plain(tensor: &Tensor) -> Tensor {
    Tensor::from_f32_vec(tensor.shape.clone(), tensor.to_f32())
}

/// `run` rows from each of `starts`.
fn take_runs(
    tensor: &Tensor,
    starts: impl Iterator<Item = usize> + Clone,
    run: usize,
) -> Result<Tensor, TensorError> {
    let parts = |tensor: &Tensor| {
        let parts = starts.clone().map(|start| tensor.slice_rows(start..start + run));
        parts.collect::<Result<Vec<_>, _>>()
    };
    match parts(tensor) {
        Ok(parts) => concatenate(&parts),
        Err(TensorError::Rows { .. }) => concatenate(&parts(&plain(tensor))?),
        Err(error) => Err(error),
    }
}

fn gather(tensor: &Tensor, rows: &[usize]) -> Result<Tensor, TensorError> {
    match tensor.gather_rows(rows) {
        Err(TensorError::Rows { .. }) => plain(tensor).gather_rows(rows),
        result => result,
    }
}

/// Tensors of one format, width and global scale below one another; one alone is not copied.
fn concatenate(parts: &[Tensor]) -> Result<Tensor, TensorError> {
    let [first, rest @ ..] = parts else {
        return Ok(Tensor::from_f32(&[0, 0], &[]));
    };
    if rest.is_empty() {
        return Ok(first.clone());
    }
    let rows = parts.iter().map(Tensor::rows).sum();
    join(parts, vec![rows, first.columns()], first.global.clone())
}

/// One matrix an expert as `[experts, out, in]`.
fn stack(parts: &[Tensor], shape: &[usize]) -> Result<Tensor, TensorError> {
    let alike = parts.iter().all(|part| part.format == parts[0].format);
    match globals(parts) {
        Some(global) if alike => join(parts, shape.to_vec(), global),
        _ => {
            let plain: Vec<Tensor> = parts.iter().map(plain).collect();
            join(&plain, shape.to_vec(), GlobalScale::One)
        }
    }
}

/// The global scales of all parts, one a matrix, if they are of one kind.
fn globals(parts: &[Tensor]) -> Option<GlobalScale> {
    let of_kind = |pick: fn(&GlobalScale) -> Option<&Vec<f32>>| {
        let lists = parts.iter().map(|part| pick(&part.global)).collect::<Option<Vec<_>>>()?;
        Some(lists.into_iter().flatten().copied().collect::<Vec<f32>>())
    };
    match parts[0].global {
        GlobalScale::One => {
            parts.iter().all(|part| part.global == GlobalScale::One).then_some(GlobalScale::One)
        }
        GlobalScale::Multiply(_) => of_kind(|global| match global {
            GlobalScale::Multiply(list) => Some(list),
            _ => None,
        })
        .map(GlobalScale::Multiply),
        GlobalScale::Divide(_) => of_kind(|global| match global {
            GlobalScale::Divide(list) => Some(list),
            _ => None,
        })
        .map(GlobalScale::Divide),
    }
}

fn join(parts: &[Tensor], shape: Vec<usize>, global: GlobalScale) -> Result<Tensor, TensorError> {
    let plane = |of: fn(&Tensor) -> &Bytes| {
        let mut bytes = Vec::with_capacity(parts.iter().map(|part| of(part).len()).sum());
        parts.iter().for_each(|part| bytes.extend_from_slice(of(part)));
        Bytes::new(bytes)
    };
    let (codes, scales) = (plane(|part| &part.codes), plane(|part| &part.scales));
    let zeros = plane(|part| &part.zeros);
    Tensor::new_scaled(shape, parts[0].format, codes, scales, zeros, global)
}

/// `out` rows `first`, `first + step`, .. of the transposes of `matrices` matrices
/// `[inner, columns]`.
fn transpose(
    tensor: &Tensor,
    [matrices, inner, columns]: [usize; 3],
    (out, first, step): (usize, usize, usize),
) -> Result<Tensor, TensorError> {
    let tensor = match tensor.format {
        Format::Float(_) => tensor.clone(),
        _ => plain(tensor),
    };
    let element = tensor.format.row_bytes(1)?;
    let mut bytes = vec![0; matrices * out * inner * element];
    for matrix in 0..matrices {
        let from = &tensor.codes[matrix * inner * columns * element..];
        let to = &mut bytes[matrix * out * inner * element..][..out * inner * element];
        // Squares small enough for the nearest cache.
        for row_block in (0..out).step_by(64) {
            for column_block in (0..inner).step_by(64) {
                for row in row_block..(row_block + 64).min(out) {
                    for column in column_block..(column_block + 64).min(inner) {
                        let source = (column * columns + first + row * step) * element;
                        let target = (row * inner + column) * element;
                        to[target..target + element]
                            .copy_from_slice(&from[source..source + element]);
                    }
                }
            }
        }
    }
    Tensor::new(vec![matrices, out, inner], tensor.format, Bytes::new(bytes))
}
