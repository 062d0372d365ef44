//! The arguments of a call, of a filter or of a test.

use super::error::{Failure, Outcome};
use super::value::Value;

/// The arguments of one call.
#[derive(Default)]
pub(super) struct Given {
    pub(super) positional: Vec<Value>,
    pub(super) named: Vec<(String, Value)>,
}

impl Given {
    /// The arguments by the names of the function's parameters.
    pub(super) fn bind<const N: usize>(
        &self,
        function: &str,
        names: [&str; N],
    ) -> Outcome<[Option<Value>; N]> {
        let mut bound = [const { None }; N];
        if self.positional.len() > N {
            let found = self.positional.len();
            return Err(Failure::failed(format!("{function}() takes {N} arguments, not {found}")));
        }
        for (place, value) in bound.iter_mut().zip(&self.positional) {
            *place = Some(value.clone());
        }
        for (name, value) in &self.named {
            let place = names.iter().position(|known| known == name);
            match place.map(|place| &mut bound[place]) {
                Some(place @ None) => *place = Some(value.clone()),
                _ => {
                    let reason = format!("{function}() got an unexpected argument {name:?}");
                    return Err(Failure::failed(reason));
                }
            }
        }
        Ok(bound)
    }
}
