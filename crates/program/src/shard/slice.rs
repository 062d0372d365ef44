//! Parts of a tensor in any format.

use std::ops::Range;

use lathe_tensor::{Block, Bytes, Format, GlobalScale, ScaledFormat, Tensor, ZeroPoint};

/// The part `ranges` (one for each dimension) of `tensor`, with the same numbers. Floats and blocks
/// keep their format. If codes with separate scales are cut within a group or tile, the part has
/// smaller groups with repeated scales (`refined`). GGUF blocks cannot be cut.
///
/// # Errors
/// If a range does not fit its dimension, or cuts a block.
pub fn slice_tensor(tensor: &Tensor, ranges: &[Range<usize>]) -> Result<Tensor, String> {
    let fits = |(range, n): (&Range<usize>, &usize)| range.start <= range.end && range.end <= *n;
    if ranges.len() != tensor.shape.len() || !ranges.iter().zip(&tensor.shape).all(fits) {
        return Err(format!("found shape {:?}, expected one that holds {ranges:?}", tensor.shape));
    }
    let Some((columns, leading)) = ranges.split_last() else {
        return Ok(tensor.clone());
    };
    let shape: Vec<usize> = ranges.iter().map(Range::len).collect();
    if shape == tensor.shape {
        return Ok(tensor.clone());
    }
    let tensor = &refined(tensor, leading.last(), columns).unwrap_or_else(|| tensor.clone());
    let rows = rows_of(&tensor.shape, leading);
    sliced(tensor, &rows, leading, columns, &shape).ok_or_else(|| {
        format!("the part {ranges:?} of {:?} cuts a block of {}", tensor.shape, tensor.format)
    })
}

/// A part in `format` must begin and end at a multiple of this many elements of a row.
pub(super) fn rigid_columns(format: Format) -> usize {
    match format {
        Format::Float(_) => 1,
        Format::Ggml(kind) => kind.block_len(),
        // A number of codes that fills whole bytes.
        Format::Scaled(format) => 8 / common(8, format.element.bits()),
    }
}

/// The elements of a row and the rows that share a scale, if any. A part that is cut at their
/// multiples keeps the groups and tiles of the whole.
pub(super) fn shared_scale(format: Format) -> usize {
    match format {
        Format::Scaled(ScaledFormat { block: Block::Group(n), .. }) => n as usize,
        Format::Scaled(ScaledFormat { block: Block::Tile(r, c), .. }) => {
            least_common_multiple(r as usize, c as usize)
        }
        other => rigid_columns(other),
    }
}

/// The greatest common divisor; `common(0, n)` is `n`.
fn common(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common(b, a % b) }
}

pub(super) fn least_common_multiple(a: usize, b: usize) -> usize {
    let (a, b) = (a.max(1), b.max(1));
    (a / common(a, b)).saturating_mul(b)
}

/// `tensor` with smaller groups or tiles, so that `rows` (of a matrix) and `columns` cut none. Each
/// new group repeats the scale of the old one, so every number stays the same. `None` if nothing is
/// cut, or if blocks cannot be made smaller.
fn refined(tensor: &Tensor, rows: Option<&Range<usize>>, columns: &Range<usize>) -> Option<Tensor> {
    let Format::Scaled(format) = tensor.format else { return None };
    // A border at the end of the tensor cuts nothing.
    let fine = |block: u32, range: &Range<usize>, whole: usize| {
        let end = if range.end == whole { 0 } else { range.end };
        common(common(block as usize, range.start), end) as u32
    };
    let matrix_rows = tensor.shape.len().checked_sub(2).map_or(1, |at| tensor.shape[at]);
    let block = match format.block {
        Block::Group(n) => Block::Group(fine(n, columns, tensor.columns())),
        Block::Tile(r, c) => {
            let r = rows.map_or(r, |rows| fine(r, rows, matrix_rows));
            Block::Tile(r, fine(c, columns, tensor.columns()))
        }
        Block::Tensor | Block::Channel => return None,
    };
    if block == format.block {
        return None;
    }
    let (fine_format, old) = (ScaledFormat { block, ..format }, format.grid(&tensor.shape)?);
    let grid = fine_format.grid(&tensor.shape)?;
    let size = format.scale.bytes();
    let (mut scales, mut zeros) = (Vec::with_capacity(grid.len() * size), Vec::new());
    for matrix in 0..grid.matrices {
        for row in 0..grid.rows {
            let start = old.row_start(matrix * grid.matrix_rows + row * grid.block_rows);
            for column in 0..grid.columns {
                let at = start + column * grid.block_columns / old.block_columns;
                scales.extend_from_slice(&tensor.scales[at * size..(at + 1) * size]);
                zeros.extend(tensor.zeros.get(at));
            }
        }
    }
    let (shape, codes) = (tensor.shape.clone(), tensor.codes.clone());
    let (scales, zeros) = (Bytes::new(scales), Bytes::new(zeros));
    let format = Format::Scaled(fine_format);
    Tensor::new_scaled(shape, format, codes, scales, zeros, tensor.global.clone()).ok()
}

/// The rows of the flattened matrix that the ranges `leading` keep.
fn rows_of(shape: &[usize], leading: &[Range<usize>]) -> Vec<usize> {
    let mut rows = vec![0];
    for (n, range) in shape.iter().zip(leading) {
        rows = rows.iter().flat_map(|row| range.clone().map(move |i| row * n + i)).collect();
    }
    rows
}

/// The part in the same format, or `None` if a block would be cut.
fn sliced(
    tensor: &Tensor,
    rows: &[usize],
    leading: &[Range<usize>],
    columns: &Range<usize>,
    shape: &[usize],
) -> Option<Tensor> {
    let by_rows = if leading.iter().zip(&tensor.shape).all(|(range, n)| range.len() == *n) {
        tensor.clone()
    } else {
        let mut kept = shape.to_vec();
        *kept.last_mut()? = tensor.columns();
        slice_rows(tensor, rows, kept)?
    };
    if columns.len() == tensor.columns() { Some(by_rows) } else { slice_columns(&by_rows, columns) }
}

/// `rows` of `tensor` in the shape `kept`. If the rows are neighbours and their blocks are
/// separate, it is one run of bytes. Otherwise it is made matrix by matrix.
fn slice_rows(tensor: &Tensor, rows: &[usize], kept: Vec<usize>) -> Option<Tensor> {
    let run = |rows: &[usize]| {
        let (first, last) = (*rows.first()?, *rows.last()?);
        (last + 1 - first == rows.len()).then(|| tensor.slice_rows(first..last + 1).ok())?
    };
    let whole = run(rows).and_then(|part| part.reshape(kept.clone()).ok());
    whole.or_else(|| {
        let matrix_rows = kept[kept.len().checked_sub(2)?];
        let matrices = rows.chunks_exact(matrix_rows.max(1)).map(run);
        stacked(&matrices.collect::<Option<Vec<Tensor>>>()?, kept)
    })
}

/// Stacks matrices of one format.
fn stacked(matrices: &[Tensor], shape: Vec<usize>) -> Option<Tensor> {
    let plane = |of: fn(&Tensor) -> &Bytes| {
        let bytes = matrices.iter().flat_map(|matrix| of(matrix).iter().copied());
        Bytes::new(bytes.collect::<Vec<u8>>())
    };
    let numbers = |matrix: &Tensor| match &matrix.global {
        GlobalScale::One => Vec::new(),
        GlobalScale::Multiply(global) | GlobalScale::Divide(global) => global.clone(),
    };
    let globals: Vec<f32> = matrices.iter().flat_map(numbers).collect();
    let first = matrices.first()?;
    let global = match &first.global {
        GlobalScale::One => GlobalScale::One,
        GlobalScale::Multiply(_) => GlobalScale::Multiply(globals),
        GlobalScale::Divide(_) => GlobalScale::Divide(globals),
    };
    let [codes, scales, zeros] = [plane(|m| &m.codes), plane(|m| &m.scales), plane(|m| &m.zeros)];
    Tensor::new_scaled(shape, first.format, codes, scales, zeros, global).ok()
}

fn slice_columns(tensor: &Tensor, columns: &Range<usize>) -> Option<Tensor> {
    let mut shape = tensor.shape.clone();
    *shape.last_mut()? = columns.len();
    let whole = tensor.columns();
    let at_borders = |n: usize| {
        columns.start.is_multiple_of(n) && (columns.end.is_multiple_of(n) || columns.end == whole)
    };
    let bytes = |column: usize| tensor.format.row_bytes(column).ok();
    let Format::Scaled(format) = tensor.format else {
        if !at_borders(tensor.format.block_len()) {
            return None;
        }
        let range = bytes(columns.start)?..bytes(columns.end)?;
        let codes = columns_of(&tensor.codes, tensor.row_bytes(), &range);
        return Tensor::new(shape, tensor.format, codes).ok();
    };
    let bits = format.element.bits();
    if !(columns.start * bits).is_multiple_of(8) {
        return None;
    }
    let start = columns.start * bits / 8;
    let codes = start..start + (columns.len() * bits).div_ceil(8);
    let codes = columns_of(&tensor.codes, tensor.row_bytes(), &codes);
    let (scales, zeros) = slice_scales(tensor, &format, columns, at_borders)?;
    Tensor::new_scaled(shape, tensor.format, codes, scales, zeros, tensor.global.clone()).ok()
}

fn slice_scales(
    tensor: &Tensor,
    format: &ScaledFormat,
    columns: &Range<usize>,
    at_borders: impl Fn(usize) -> bool,
) -> Option<(Bytes, Bytes)> {
    if matches!(format.block, Block::Tensor | Block::Channel) {
        return Some((tensor.scales.clone(), tensor.zeros.clone()));
    }
    let grid = format.grid(&tensor.shape)?;
    let n = grid.block_columns;
    if !at_borders(n) {
        return None;
    }
    let blocks = columns.start / n..columns.end.div_ceil(n);
    let scale = format.scale.bytes();
    let range = blocks.start * scale..blocks.end * scale;
    let scales = columns_of(&tensor.scales, grid.columns * scale, &range);
    let zeros = match format.zero {
        ZeroPoint::None => tensor.zeros.clone(),
        ZeroPoint::Int => columns_of(&tensor.zeros, grid.columns, &blocks),
    };
    Some((scales, zeros))
}

/// Bytes `range` of each row of `row_bytes`.
fn columns_of(plane: &Bytes, row_bytes: usize, range: &Range<usize>) -> Bytes {
    let rows = plane.chunks_exact(row_bytes.max(1));
    Bytes::new(rows.flat_map(|row| &row[range.clone()]).copied().collect::<Vec<u8>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_tensor::{Element, ScaleType, codec};

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.713).sin()).collect()
    }

    fn check(tensor: &Tensor, ranges: &[Range<usize>], keeps_format: bool) {
        let part = slice_tensor(tensor, ranges);
        if !keeps_format && matches!(tensor.format, Format::Ggml(_)) {
            assert!(part.unwrap_err().contains("cuts a block"));
            return;
        }
        let part = part.unwrap();
        // The part has as many bits, with groups that are no larger.
        assert!(part.format.block_len() <= tensor.format.block_len());
        assert_eq!(part.codes.len() * tensor.elements(), tensor.codes.len() * part.elements());
        assert_eq!(part.shape, ranges.iter().map(Range::len).collect::<Vec<_>>());
        assert_eq!(part.format == tensor.format, keeps_format, "{ranges:?} {}", tensor.format);
        let (columns, leading) = ranges.split_last().unwrap();
        let whole = tensor.to_f32();
        let expected: Vec<f32> = rows_of(&tensor.shape, leading)
            .iter()
            .flat_map(|row| &whole[row * tensor.columns()..][columns.clone()])
            .copied()
            .collect();
        assert_eq!(part.to_f32(), expected);
    }

    #[test]
    fn parts_of_floats_and_blocks() {
        for name in ["f32", "bf16", "q4_0", "q8_0"] {
            let format = Format::parse(name).unwrap();
            let codes = Bytes::new(codec::quantize(format, &values(4 * 6 * 96)));
            let tensor = Tensor::new(vec![4, 6, 96], format, codes).unwrap();
            check(&tensor, &[1..3, 0..6, 0..96], true);
            check(&tensor, &[0..4, 2..5, 0..96], true);
            check(&tensor, &[0..4, 0..6, 32..96], true);
            check(&tensor, &[2..4, 1..2, 32..64], true);
            check(&tensor, &[0..4, 0..6, 48..96], format.block_len() == 1);
            let matrix = tensor.reshape(vec![24, 96]).unwrap();
            check(&matrix, &[5..9, 0..96], true);
            check(&matrix, &[5..9, 64..96], true);
        }
    }

    #[test]
    fn parts_of_planes() {
        for (block, border, cut, keeps_format) in [
            (Block::Tensor, 40..80, 42..80, true),
            (Block::Channel, 40..80, 42..80, true),
            (Block::Group(16), 16..80, 24..80, false),
            (Block::Tile(4, 16), 32..64, 24..64, false),
        ] {
            let (element, scale, zero) = (Element::Int(4), ScaleType::F32, ZeroPoint::None);
            let format = ScaledFormat { element, block, scale, zero };
            let shape = vec![8, 80];
            let scales = format.grid(&shape).unwrap().len();
            let codes = Bytes::new((0..8 * 40).map(|i| (i * 37) as u8).collect::<Vec<u8>>());
            let scales = values(scales).iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
            let none = Bytes::new(Vec::new());
            let format = Format::Scaled(format);
            let tensor = Tensor::new_scaled(
                shape,
                format,
                codes,
                Bytes::new(scales),
                none,
                GlobalScale::One,
            )
            .unwrap();
            check(&tensor, &[0..8, border.clone()], true);
            check(&tensor, &[4..8, border], true);
            check(&tensor, &[0..8, cut.clone()], keeps_format);
            check(&tensor, &[2..8, cut], keeps_format && !matches!(block, Block::Tile(..)));
            // Two codes share a byte.
            assert!(slice_tensor(&tensor, &[0..8, 41..80]).is_err());
        }
    }

    #[test]
    fn parts_of_stacks() {
        let shape = vec![5, 4, 32];
        let format = ScaledFormat::NVFP4;
        let scales = format.grid(&shape).unwrap().len();
        let codes = Bytes::new((0..5 * 4 * 16).map(|i| (i * 91) as u8).collect::<Vec<u8>>());
        let scales = Bytes::new((0..scales).map(|i| 40 + (i % 30) as u8).collect::<Vec<u8>>());
        let global = GlobalScale::Divide(vec![1.0, 3.0, 5.0, 7.0, 9.0]);
        let none = Bytes::new(Vec::new());
        let format = Format::Scaled(format);
        let tensor = Tensor::new_scaled(shape, format, codes, scales, none, global).unwrap();
        check(&tensor, &[1..4, 0..4, 0..32], true);
        check(&tensor, &[0..5, 1..3, 0..32], true);
        check(&tensor, &[2..4, 0..4, 16..32], true);
        check(&tensor, &[2..4, 0..4, 8..32], false);
    }

    #[test]
    fn ranges_must_fit() {
        let tensor = Tensor::from_f32(&[2, 3], &values(6));
        assert!(slice_tensor(&tensor, &[0..3, 0..3]).is_err());
        assert!(slice_tensor(&tensor, &[0..2, 0..3, 0..1]).is_err());
    }
}
