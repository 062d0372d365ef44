//! `ModelWeights`: the weights that a program declares, found in a checkpoint.
//!
//! Everything is located and checked when the source is made; a tensor's bytes are read (and
//! copied only where the file's layout differs from the canonical one) when a backend asks.

mod dummy;
mod layout;
mod locate;

use std::collections::BTreeSet;

use lathe_program::{BackendError, Program, Weight, WeightDecl, WeightRole, WeightSource};
use lathe_tensor::{Tensor, TensorError};

pub use dummy::DummyWeights;
pub use locate::Interleaved;
pub(crate) use locate::has_own_head;

use crate::adapter::{Adapter, AdapterError};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::names::Rules;
use crate::spec::DecoderSpec;
use locate::{Located, Locator};

/// Why a checkpoint does not have the weights of a program.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// None of a weight's possible tensors is in the file.
    #[error("weight {weight} is not in the checkpoint: looked for {}", .tried.join(", "))]
    Missing {
        /// Canonical name.
        weight: String,
        /// Names that it might have had.
        tried: Vec<String>,
    },
    /// A vector (a norm, a bias) has a number that is none. Sums and maxima over it would lose
    /// that, and the model would give wrong answers without a word.
    #[error("tensor {tensor} has NaN or infinite numbers, expected finite ones")]
    NotFinite {
        /// Its name in the file.
        tensor: String,
    },
    /// A tensor has another shape than the model's description says.
    #[error("tensor {tensor} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Its name in the file.
        tensor: String,
        /// Its shape, outermost first.
        found: Vec<usize>,
        /// The shape that its weight needs.
        expected: Vec<usize>,
    },
    /// A tensor of the decoder that the model's description has no place for.
    #[error("tensor {tensor} is not supported: no weight of this architecture uses it")]
    Unused {
        /// The first of their names in the file.
        tensor: String,
    },
    /// A tensor cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A weight of the adapter cannot be read.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The parts of a weight cannot be taken out or put together.
    #[error("tensor {tensor}: {source}")]
    Tensor {
        /// Its name in the file.
        tensor: String,
        /// What stands in the way.
        source: TensorError,
    },
}

/// Where a weight is.
#[derive(Debug)]
enum Place {
    Checkpoint(Located),
    /// In the adapter, in a tensor of this name.
    Adapter([String; 1]),
}

/// The weights of one program in one checkpoint, and in the adapter that it is run with.
#[derive(Debug)]
pub struct ModelWeights<'a> {
    checkpoint: &'a Checkpoint,
    program: &'a Program,
    adapter: Option<&'a Adapter>,
    places: Vec<Place>,
    unused: Vec<String>,
}

impl<'a> ModelWeights<'a> {
    /// Finds every weight of `program`, lowered from `spec`, by the `rules` of its family, and
    /// those of adapters in `adapter`.
    ///
    /// # Errors
    /// If a weight is missing, a tensor's shape is not what the weight needs, or the decoder has a
    /// tensor that no weight uses: it would compute something else.
    pub fn new(
        checkpoint: &'a Checkpoint,
        spec: &'a DecoderSpec,
        rules: &'a [Rules],
        adapter: Option<&'a Adapter>,
        program: &'a Program,
    ) -> Result<Self, WeightsError> {
        let locator = Locator::new(checkpoint, spec, rules, program);
        let place = |(index, decl): (usize, &WeightDecl)| match adapter
            .and_then(|adapter| adapter.tensor_of(&decl.name))
        {
            Some(tensor) => Ok(Place::Adapter([tensor.clone()])),
            None => locator.locate(Weight(index as u32)).map(Place::Checkpoint),
        };
        let places = program.weights.iter().enumerate().map(place);
        let places = places.collect::<Result<Vec<_>, WeightsError>>()?;
        let mut used = BTreeSet::new();
        for name in places.iter().filter_map(Place::located).flat_map(|located| &located.tensors) {
            used.extend(checkpoint.parts_of(name));
        }
        let unused = checkpoint
            .names()
            .into_iter()
            .filter(|name| {
                let counts = locator.is_of_the_decoder(name) && !locator.ignorable(name);
                counts && !used.contains(*name)
            })
            .map(str::to_owned)
            .collect::<Vec<_>>();
        for tensor in &unused {
            if !adds_nothing(checkpoint, tensor)? {
                return Err(WeightsError::Unused { tensor: tensor.clone() });
            }
        }
        Ok(ModelWeights { checkpoint, program, adapter, places, unused })
    }

    /// Tensors of the decoder that no weight uses and that add nothing: biases of zeros. Those that
    /// are known not to matter (rotary tables, layers for multi-token prediction) are left out.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// The program whose weights they are.
    pub fn program(&self) -> &Program {
        self.program
    }

    /// Names of the tensors that `weight` is made of.
    pub fn tensors_of(&self, weight: Weight) -> &[String] {
        match &self.places[weight.0 as usize] {
            Place::Checkpoint(located) => &located.tensors,
            Place::Adapter(tensor) => tensor,
        }
    }

    /// Where the rows of `weight`, experts that lie transposed in one tensor of floats, would lie
    /// in gpt-oss's `*_blocks`; `None` for all others.
    pub fn in_blocks(&self, weight: Weight) -> Option<Interleaved> {
        self.places[weight.0 as usize].located()?.in_blocks()
    }

    /// Which rows of its one tensor the rows of `weight` are, in order; `None` if it is no matrix
    /// whose rows lie among those of others.
    pub fn rows_in(&self, weight: Weight) -> Option<Vec<usize>> {
        let shape = &self.program.weight(weight).shape;
        let rows = *shape.first().filter(|_| shape.len() == 2)?;
        self.places[weight.0 as usize].located()?.rows(rows)
    }

    /// Gives the memory of what was read so far back (see [`lathe_tensor::Bytes::release`]).
    pub fn release(&self) {
        self.checkpoint.release();
    }

    /// A weight in the shape that the program declares.
    ///
    /// # Errors
    /// If a tensor cannot be read, or a vector has numbers that are not finite.
    pub fn load(&self, weight: Weight) -> Result<Tensor, WeightsError> {
        let decl = self.program.weight(weight);
        let tensor = self.read(weight, decl)?;
        // Matrices are too large to be looked at here.
        let vector = decl.role == WeightRole::Vector;
        if vector && !tensor.to_f32().iter().all(|value| value.is_finite()) {
            let names = self.tensors_of(weight).first();
            return Err(WeightsError::NotFinite { tensor: names.unwrap_or(&decl.name).clone() });
        }
        Ok(tensor)
    }

    fn read(&self, weight: Weight, decl: &WeightDecl) -> Result<Tensor, WeightsError> {
        match (&self.places[weight.0 as usize], self.adapter) {
            (Place::Checkpoint(located), _) => located.load(self.checkpoint, &decl.shape),
            (Place::Adapter(_), Some(adapter)) => Ok(adapter.tensor(&decl.name)?),
            (Place::Adapter(tensor), None) => unreachable!("{tensor:?} was found in an adapter"),
        }
    }
}

/// Whether a tensor is a bias of zeros, which some quantizers write beside every matrix.
fn adds_nothing(checkpoint: &Checkpoint, tensor: &str) -> Result<bool, WeightsError> {
    if !tensor.ends_with(".bias") {
        return Ok(false);
    }
    Ok(checkpoint.tensor(tensor)?.to_f32().iter().all(|value| *value == 0.0))
}

impl Place {
    fn located(&self) -> Option<&Located> {
        match self {
            Place::Checkpoint(located) => Some(located),
            Place::Adapter(_) => None,
        }
    }
}

impl WeightSource for ModelWeights<'_> {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        self.load(weight).map_err(|error| BackendError::Weight {
            name: self.program.weight(weight).name.clone(),
            reason: error.to_string(),
        })
    }
}
