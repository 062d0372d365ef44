//! Which tensor of a model is to blame where its logits are no numbers.

use lathe_engine::score::ScoreError;
use lathe_model::Model;
use lathe_program::{Program, Weight};

use crate::error::SessionError;
use crate::open::Session;

impl Session {
    /// `error` as this library's. If the model gave no finite logits, the weights are searched for
    /// the tensor that has NaN or infinite numbers.
    pub fn blame(&self, error: ScoreError) -> SessionError {
        match error {
            ScoreError::NotFinite { .. } => {
                match not_finite(&self.model, self.executor.program()) {
                    Some(tensor) => SessionError::NotFinite { tensor },
                    None => error.into(),
                }
            }
            error => error.into(),
        }
    }
}

/// The name in the file of the first tensor that has NaN or infinite numbers.
fn not_finite(model: &Model, program: &Program) -> Option<String> {
    let weights = model.weights(program).ok()?;
    (0..program.weights.len() as u32).map(Weight).find_map(|weight| {
        let values = weights.load(weight).ok()?.to_f32();
        weights.release();
        let strange = values.iter().any(|value| !value.is_finite());
        strange.then(|| weights.tensors_of(weight).first().cloned())?
    })
}
