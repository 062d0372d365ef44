//! Which of the model's tokens a drafter's tokens are.

use lathe_tensor::safetensors::{Dtype, RawTensor};

use super::EagleError;
use crate::checkpoint::{Checkpoint, CheckpointError};

/// Offsets from the drafter's tokens to the model's, `I64` `[draft]`.
pub(super) const OFFSETS: &str = "d2t";
/// Whether the drafter knows a token of the model, `BOOL` `[vocabulary]`.
pub(super) const KNOWN: &str = "t2d";

/// By token of the drafter: the model's, of `vocabulary`. Token `i` is the model's `i + d2t[i]`.
pub(super) fn read(
    checkpoint: &Checkpoint,
    draft: usize,
    vocabulary: usize,
) -> Result<Vec<u32>, EagleError> {
    let tokens = match raw(checkpoint, OFFSETS)? {
        Some(offsets) => of_offsets(&offsets, draft, vocabulary)?,
        None if draft == vocabulary => (0..draft as u32).collect(),
        None => return Err(EagleError::MapMissing { draft, vocabulary }),
    };
    if let Some(known) = raw(checkpoint, KNOWN)? {
        check(&known, Dtype::BOOL, vocabulary, KNOWN)?;
        let mut expected = vec![0u8; vocabulary];
        tokens.iter().for_each(|token| expected[*token as usize] = 1);
        let differs = |token: &usize| (known.bytes[*token] != 0) != (expected[*token] != 0);
        if let Some(token) = (0..vocabulary).find(differs) {
            let reason = format!("token {token} is not as in {OFFSETS}");
            return Err(EagleError::Map { tensor: KNOWN, reason });
        }
    }
    Ok(tokens)
}

fn of_offsets(raw: &RawTensor, draft: usize, vocabulary: usize) -> Result<Vec<u32>, EagleError> {
    check(raw, Dtype::I64, draft, OFFSETS)?;
    let mut taken = vec![false; vocabulary];
    let offsets = raw.bytes.chunks_exact(8).map(|it| i64::from_le_bytes(it.try_into().unwrap()));
    let token = |(index, offset): (usize, i64)| {
        let token = (index as i64).checked_add(offset);
        let token = token.and_then(|token| usize::try_from(token).ok());
        let wrong = |what: &str| {
            let reason = format!("the drafter's token {index} has offset {offset}, {what}");
            EagleError::Map { tensor: OFFSETS, reason }
        };
        match token.filter(|token| *token < vocabulary) {
            None => Err(wrong(&format!("expected a token below {vocabulary}"))),
            Some(token) if std::mem::replace(&mut taken[token], true) => {
                Err(wrong("which is another one's token"))
            }
            Some(token) => Ok(token as u32),
        }
    };
    offsets.enumerate().map(token).collect()
}

fn check(
    raw: &RawTensor,
    dtype: Dtype,
    length: usize,
    tensor: &'static str,
) -> Result<(), EagleError> {
    if raw.dtype == dtype && raw.shape == [length] {
        return Ok(());
    }
    let reason = format!("found {} {:?}, expected {dtype} [{length}]", raw.dtype, raw.shape);
    Err(EagleError::Map { tensor, reason })
}

fn raw(checkpoint: &Checkpoint, name: &str) -> Result<Option<RawTensor>, EagleError> {
    let Checkpoint::Safetensors { files, .. } = checkpoint else { return Ok(None) };
    match files.contains(name) {
        true => Ok(Some(files.raw(name).map_err(CheckpointError::from)?.clone())),
        false => Ok(None),
    }
}
