//! Where in a file a weight is: rules from canonical names to tensors and the parts of them.
//!
//! Rules are data of a file layout; which rules a family has stands in [`crate::families`].

pub mod gguf;
pub mod hugging_face;

/// Where a weight may come from. Names are relative to the layer (or to the model, for weights of
/// none); `parts` are canonical names of the weights that one tensor holds together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorSource {
    /// The whole tensor.
    Whole(&'static str),
    /// Its place among `parts`, which lie below one another in `[sum of rows, in]` or, for
    /// experts, in `[experts, sum of rows, in]`.
    Part(&'static str, &'static [&'static str]),
    /// As `Part`, but the parts take turns head by head: head 0 of the first part, head 0 of the
    /// second, head 1 of the first, and so on.
    PartOfEachHead(&'static str, &'static [&'static str]),
    /// As `Part`, but the parts take turns row by row: even rows are the first of two parts.
    Alternate(&'static str, &'static [&'static str]),
    /// `[experts, in, out]`: each expert is transposed.
    Transposed(&'static str),
    /// `[experts, in, 2 * out]`: each expert is transposed and its columns are two parts that
    /// take turns.
    AlternateTransposed(&'static str, &'static [&'static str]),
    /// `[experts, in, sum of out]`: each expert is transposed and its columns are parts side by
    /// side.
    PartTransposed(&'static str, &'static [&'static str]),
    /// One tensor an expert; `{}` is the expert's number.
    EachExpert(&'static str),
    /// Query or key rows in the order that GGUF's converter gives Llama: the two halves of a
    /// head take turns row by row.
    Unpermuted(&'static str),
    /// `[heads, rank, out]`: each head is transposed.
    TransposedHeads(&'static str),
}

impl TensorSource {
    /// The tensor's name, if it is one.
    pub fn name(&self) -> Option<&'static str> {
        match self {
            TensorSource::EachExpert(_) => None,
            TensorSource::Whole(name)
            | TensorSource::Part(name, _)
            | TensorSource::PartOfEachHead(name, _)
            | TensorSource::Alternate(name, _)
            | TensorSource::Transposed(name)
            | TensorSource::AlternateTransposed(name, _)
            | TensorSource::PartTransposed(name, _)
            | TensorSource::Unpermuted(name)
            | TensorSource::TransposedHeads(name) => Some(name),
        }
    }
}

/// Where one weight may be: the first source whose tensors are in the file, in the shape that the
/// source says, is taken.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// The canonical name, without `layers.N.`.
    pub weight: &'static str,
    /// Candidates.
    pub sources: &'static [TensorSource],
}

impl Rule {
    /// Its candidates.
    pub fn sources(&self) -> &'static [TensorSource] {
        self.sources
    }
}

/// Rules of one layout; the first rule with a weight's name counts.
pub type Rules = &'static [Rule];

/// Shorthand for tables.
pub(crate) const fn rule(weight: &'static str, sources: &'static [TensorSource]) -> Rule {
    Rule { weight, sources }
}

/// The sources of `weight` in `rules`, most special rules first.
pub fn sources_of(rules: &[Rules], weight: &str) -> &'static [TensorSource] {
    let mut all = rules.iter().flat_map(|rules| rules.iter());
    all.find(|rule| rule.weight == weight).map_or(&[], |rule| rule.sources)
}
