//! Division with respect to the weights' formats. Borders cut no block, or the division is refused
//! with the weight's name. No weight changes its numbers or is converted to `f32`.

use std::collections::HashMap;

use lathe_tensor::Format;

use super::slice::{least_common_multiple, rigid_columns, shared_scale};
use super::{RankProgram, ShardError, ShardOptions, shard};
use crate::backend::BackendError;
use crate::op::Weight;
use crate::program::Program;

/// As [`shard`], with an alignment for the formats of the weights. Borders are at multiples of all
/// groups that share a scale, if every rank then has a part. Otherwise they are at multiples of
/// what cannot be cut (GGUF blocks, and codes that share a byte), and groups become smaller.
///
/// # Errors
/// [`BackendError::Shard`] as from [`shard`], or for a weight whose blocks would be cut by heads or
/// ranks; the errors of `format_of`.
pub fn shard_fitting(
    program: &Program,
    options: &ShardOptions,
    format_of: &dyn Fn(Weight) -> Result<Format, BackendError>,
) -> Result<Vec<RankProgram>, BackendError> {
    let first = shard(program, options)?;
    let formats = cut_formats(program, &first, format_of)?;
    let mut refusal = None;
    for columns_of in [shared_scale, rigid_columns] {
        let columns = formats.values().map(|format| columns_of(*format));
        let alignment = columns.fold(options.alignment, least_common_multiple);
        let ranks = match alignment == options.alignment {
            true => Ok(first.clone()),
            false => shard(program, &ShardOptions { alignment, ..options.clone() }),
        };
        let checked = ranks.and_then(|ranks| {
            ranks.iter().try_for_each(|rank| check(program, rank, options.ranks, &formats))?;
            Ok(ranks)
        });
        match checked {
            Ok(ranks) => return Ok(ranks),
            Err(error) => refusal = refusal.or(Some(error)),
        }
    }
    Err(refusal.expect("it was tried").into())
}

/// The formats of the weights that are divided by column.
fn cut_formats(
    program: &Program,
    ranks: &[RankProgram],
    format_of: &dyn Fn(Weight) -> Result<Format, BackendError>,
) -> Result<HashMap<Weight, Format>, BackendError> {
    let mut formats = HashMap::new();
    for part in ranks.iter().flat_map(|rank| &rank.parts) {
        let shape = &program.weight(part.source).shape;
        let cut =
            shape.len() > 1 && part.ranges.last().map(|range| range.len()) != shape.last().copied();
        if cut && !formats.contains_key(&part.source) {
            formats.insert(part.source, format_of(part.source)?);
        }
    }
    Ok(formats)
}

/// Checks that each cut is at a border of what cannot be cut.
fn check(
    program: &Program,
    rank: &RankProgram,
    ranks: usize,
    formats: &HashMap<Weight, Format>,
) -> Result<(), ShardError> {
    for part in &rank.parts {
        let Some(format) = formats.get(&part.source) else { continue };
        let decl = program.weight(part.source);
        let (Some(columns), Some(whole)) = (part.ranges.last(), decl.shape.last()) else {
            continue;
        };
        let block = rigid_columns(*format);
        let at_border = |at: usize| at == *whole || at.is_multiple_of(block);
        if !at_border(columns.start) || !at_border(columns.end) {
            let reason = format!(
                "columns {columns:?} of {} cut a block of {block} of its format {format}",
                decl.name
            );
            return Err(ShardError { ranks, reason });
        }
    }
    Ok(())
}
