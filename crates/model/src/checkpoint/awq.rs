//! AutoAWQ's `gemm` layout: 4-bit codes packed along outputs, `[inputs, outputs / 8]`, in the order
//! in which its kernel takes them from a word.

use lathe_tensor::Tensor;
use lathe_tensor::safetensors::Checkpoint as SafetensorsFiles;
use rayon::prelude::*;

use super::gptq::group_of;
use super::integers::{CODES, Integers, SCALES, ZEROS, words};
use super::naming::Naming;
use super::{CheckpointError, unlike};
use crate::config::Config;
use crate::spec::SpecError;

pub(super) static NAMING: Naming =
    Naming { whole: "weight", codes: &[CODES], beside: &[ZEROS, SCALES] };

/// Where in a word output `i` of eight lies, in codes: the packer writes outputs 0, 2, 4, 6, 1, 3,
/// 5 and 7 from the low bits up.
const PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
const BITS: usize = 4;
/// Codes in a word.
const WORD: usize = 8;

/// What a `quantization_config` whose method is `awq` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AwqScheme {
    /// Inputs that share a scale; `None` for all.
    pub group: Option<u32>,
    /// Whether there are zero points; without them a code of 8 is zero.
    pub zero_points: bool,
}

impl AwqScheme {
    pub(super) fn from_hf_config(c: &Config<'_>) -> Result<Self, SpecError> {
        let refuse = |what: String| Err(SpecError::feature(format!("AWQ {what}")));
        match c.size("bits")?.or(c.size("w_bit")?) {
            None | Some(BITS) => {}
            Some(bits) => return refuse(format!("weights of {bits} bits")),
        }
        let version = c.text("version")?.unwrap_or("gemm").to_lowercase();
        if version != "gemm" {
            return refuse(format!("version `{version}`"));
        }
        let group = group_of(c.get("group_size").or(c.get("q_group_size")))?;
        let zero_points = c.flag("zero_point")?.unwrap_or(true);
        Ok(AwqScheme { group, zero_points })
    }
}

/// `[outputs, inputs]`.
pub(super) fn shape(files: &SafetensorsFiles, name: &str) -> Result<Vec<usize>, CheckpointError> {
    let codes = NAMING.part(name, CODES);
    if !files.contains(&codes) {
        return Ok(files.raw(name)?.shape.clone());
    }
    let raw = files.raw(&codes)?;
    let refuse = || unlike(&codes, raw, "I32 [inputs, outputs / 8]");
    let &[inputs, words] = raw.shape.as_slice() else { return Err(refuse()) };
    // Without inputs, words may be any number.
    Ok(vec![words.checked_mul(WORD).ok_or_else(refuse)?, inputs])
}

pub(super) fn tensor(
    files: &SafetensorsFiles,
    name: &str,
    scheme: &AwqScheme,
) -> Result<Tensor, CheckpointError> {
    let part = |ending| NAMING.part(name, ending);
    if !files.contains(&part(CODES)) {
        return Ok(files.tensor(name)?);
    }
    let shape = shape(files, name)?;
    let (outputs, inputs) = (shape[0], shape[1]);
    let (packed, [_, along]) = words(&part(CODES), files.raw(&part(CODES))?)?;
    let code = |word: u32, output: usize| (word >> (BITS * PLACES[output % WORD]) & 15) as u8;
    let mut codes = vec![0; outputs * inputs];
    if inputs > 0 {
        codes.par_chunks_mut(inputs).enumerate().for_each(|(output, row)| {
            let word = |input: usize| packed[input * along + output / WORD];
            row.iter_mut().enumerate().for_each(|(input, it)| *it = code(word(input), output));
        });
    }
    let scales_name = part(SCALES);
    let scales = files.raw(&scales_name)?;
    let zeros = match scheme.zero_points {
        false => vec![8; scales.shape.iter().product()],
        true => {
            let raw = files.raw(&part(ZEROS))?;
            let (packed, [groups, words]) = words(&part(ZEROS), raw)?;
            if words != along {
                return Err(unlike(&part(ZEROS), raw, format!("I32 [groups, {along}]")));
            }
            let place = |at: usize| (at / outputs * along + at % outputs / WORD, at % outputs);
            let zero = |(word, output): (usize, usize)| code(packed[word], output);
            (0..groups * outputs).map(place).map(zero).collect()
        }
    };
    let integers = Integers {
        name,
        shape: [outputs, inputs],
        bits: BITS,
        codes,
        zeros,
        scales: (&scales_name, scales),
        group: scheme.group.map(|size| size as usize),
    };
    integers.tensor()
}
