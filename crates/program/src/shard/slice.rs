//! Parts of a tensor in any format.

use std::ops::Range;

use lathe_tensor::{Block, Bytes, Format, GlobalScale, ScaledFormat, Tensor, ZeroPoint};

/// The part `ranges` (one a dimension) of `tensor`, in the same format where no block is cut and
/// otherwise in `f32` with the same numbers.
///
/// # Errors
/// If a range does not fit its dimension.
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
    let rows = rows_of(&tensor.shape, leading);
    Ok(sliced(tensor, &rows, leading, columns, &shape)
        .unwrap_or_else(|| dequantized(tensor, &rows, columns, &shape)))
}

/// The rows of the flattened matrix that `leading` dimensions keep.
fn rows_of(shape: &[usize], leading: &[Range<usize>]) -> Vec<usize> {
    let mut rows = vec![0];
    for (n, range) in shape.iter().zip(leading) {
        rows = rows.iter().flat_map(|row| range.clone().map(move |i| row * n + i)).collect();
    }
    rows
}

/// In the same format, or `None` where a block would be cut.
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

/// `rows` of `tensor` in the shape `kept`: one run of bytes if they are neighbours and their
/// blocks can be had apart, else matrix by matrix.
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

/// Matrices of one format on top of each other.
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

fn dequantized(tensor: &Tensor, rows: &[usize], columns: &Range<usize>, shape: &[usize]) -> Tensor {
    let mut row_values = vec![0f32; tensor.columns()];
    let mut values = Vec::with_capacity(rows.len() * columns.len());
    for row in rows {
        tensor.row_into(*row, &mut row_values);
        values.extend_from_slice(&row_values[columns.clone()]);
    }
    Tensor::from_f32(shape, &values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_tensor::{Element, ScaleType, codec};

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.713).sin()).collect()
    }

    fn check(tensor: &Tensor, ranges: &[Range<usize>], keeps_format: bool) {
        let part = slice_tensor(tensor, ranges).unwrap();
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
        for (block, border, cut) in [
            (Block::Tensor, 40..80, 41..80),
            (Block::Channel, 40..80, 41..80),
            (Block::Group(16), 16..80, 24..80),
            (Block::Tile(4, 16), 32..64, 24..64),
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
            check(&tensor, &[0..8, cut], false);
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
