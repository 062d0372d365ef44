//! How methods of quantization name the tensors that hold one weight together.

use lathe_tensor::safetensors::Checkpoint as SafetensorsFiles;

/// The endings of one method. A weight `layers.0.q_proj.weight` whose name ends with `whole` lies
/// as `layers.0.q_proj.` with each of the other endings.
#[derive(Debug, Clone, Copy)]
pub(super) struct Naming {
    /// Of the weight's own name.
    pub whole: &'static str,
    /// Of its codes, in place of `whole`.
    pub codes: &'static [&'static str],
    /// Of what belongs to the codes: scales, zero points, shapes, and what is known of inputs.
    pub beside: &'static [&'static str],
}

impl Naming {
    /// Plain floats: every tensor is whole.
    pub(super) const NONE: Naming = Naming { whole: "", codes: &[], beside: &[] };

    /// Whether some tensor of the files has a name of this method's own.
    pub(super) fn is_used(&self, files: &SafetensorsFiles) -> bool {
        files.names().any(|name| self.whole_name(files, name).as_deref() != Some(name))
    }

    /// An ending that only this method's tensors have; nothing, if it has none.
    pub(super) fn example(&self) -> Option<&'static str> {
        self.codes.iter().chain(self.beside).next().copied()
    }

    /// The name of the tensor that holds the codes of `name`, or `name` where it lies plainly.
    pub(super) fn codes_of(&self, files: &SafetensorsFiles, name: &str) -> Option<String> {
        let other = name.strip_suffix(self.whole).and_then(|stem| {
            let all = self.codes.iter().map(|ending| format!("{stem}{ending}"));
            all.into_iter().find(|codes| files.contains(codes))
        });
        other.or_else(|| files.contains(name).then(|| name.to_owned()))
    }

    /// The full name of what belongs to the codes of `name` under the ending `part`.
    pub(super) fn part(&self, name: &str, part: &str) -> String {
        format!("{}{part}", name.strip_suffix(self.whole).unwrap_or(name))
    }

    /// The names in the files of all that makes `name`, which comes first.
    pub(super) fn parts_of(&self, files: &SafetensorsFiles, name: &str) -> Vec<String> {
        let endings = self.codes.iter().chain(self.beside);
        let parts = endings.map(|ending| self.part(name, ending));
        let parts = parts.filter(|part| part != name && files.contains(part));
        std::iter::once(name.to_owned()).chain(parts).collect()
    }

    /// The weight that the stored tensor `stored` is, or holds the codes of; `None` for what
    /// belongs to codes.
    pub(super) fn whole_name(&self, files: &SafetensorsFiles, stored: &str) -> Option<String> {
        for ending in self.codes {
            if let Some(stem) = stored.strip_suffix(ending) {
                return Some(format!("{stem}{}", self.whole));
            }
        }
        let of_codes = |stem: &str| {
            let mut endings = self.codes.iter().chain(std::iter::once(&self.whole));
            !stem.is_empty() && endings.any(|ending| files.contains(&format!("{stem}{ending}")))
        };
        let beside = self.beside.iter().filter_map(|ending| stored.strip_suffix(ending));
        let beside = beside.into_iter().any(of_codes);
        (!beside).then(|| stored.to_owned())
    }
}
