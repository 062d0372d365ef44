//! A model to count or to time: a real one, or its shape with random weights.

use std::collections::HashMap;
use std::path::Path;

use lathe_model::adapter::AdapterChoice;
use lathe_model::weights::DummyWeights;
use lathe_model::{DecoderSpec, Model, OpenOptions, read_spec};
use lathe_program::{Program, Weight, WeightRole, WeightSource};
use lathe_tensor::{FloatType, Format};

use crate::catalogue::Catalogue;
use crate::error::SessionError;
use crate::open::open;

/// The seed of random weights. Times do not depend on it.
const SEED: u64 = 1;

/// A model to count or to time.
pub struct Shape {
    name: String,
    source: ShapeSource,
}

enum ShapeSource {
    Model(Box<Model>),
    Dummy { spec: DecoderSpec, format: Format },
}

/// Bytes and format of each weight of a program.
pub struct Sizes {
    weights: Vec<(u64, Format)>,
    tied_head: bool,
}

impl Shape {
    /// The model itself, with the adapter of `options`.
    ///
    /// # Errors
    /// As [`open`].
    pub fn open(
        catalogue: &Catalogue<'_>,
        name: &str,
        options: &OpenOptions,
    ) -> Result<Self, SessionError> {
        let model = open(catalogue, name, options)?.model;
        Ok(Self { name: model.name.clone(), source: ShapeSource::Model(Box::new(model)) })
    }

    /// The shape of a model without an adapter, with random weights in `format` (bf16 if `None`).
    ///
    /// # Errors
    /// If an adapter is asked for, the format does not exist, or as [`open`].
    pub fn dummy(
        catalogue: &Catalogue<'_>,
        name: &str,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Self, SessionError> {
        if let AdapterChoice::Folder(folder) = &options.adapter {
            return Err(SessionError::AdapterOfDummy(folder.clone()));
        }
        let format = match format {
            Some(text) => Format::parse(text).map_err(SessionError::Format)?,
            None => Format::BF16,
        };
        let path = Path::new(name);
        let spec = match path.join("config.json").is_file() {
            true => {
                let bad = |source| SessionError::Shape {
                    name: name.to_owned(),
                    source: Box::new(source),
                };
                let (spec, notes) = read_spec(path, options).map_err(bad)?;
                let tell = |note| catalogue.reporter.line(&format!("{name}: {note}"));
                notes.iter().for_each(tell);
                spec
            }
            false => {
                let options = OpenOptions { adapter: AdapterChoice::None, ..options.clone() };
                open(catalogue, name, &options)?.model.spec
            }
        };
        Ok(Self { name: short_name(name), source: ShapeSource::Dummy { spec, format } })
    }

    /// The model itself. If it has a configuration without weights, or if a format is given, its
    /// shape.
    ///
    /// # Errors
    /// As [`Shape::open`] and [`Shape::dummy`].
    pub fn describe(
        catalogue: &Catalogue<'_>,
        name: &str,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Self, SessionError> {
        if format.is_some() || has_no_weights(Path::new(name)) {
            Self::dummy(catalogue, name, format, options)
        } else {
            Self::open(catalogue, name, options)
        }
    }

    /// The name to show.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The model's spec.
    pub fn spec(&self) -> &DecoderSpec {
        match &self.source {
            ShapeSource::Model(model) => &model.spec,
            ShapeSource::Dummy { spec, .. } => spec,
        }
    }

    /// The model itself, unless its weights are random.
    pub fn model(&self) -> Option<&Model> {
        match &self.source {
            ShapeSource::Model(model) => Some(model),
            ShapeSource::Dummy { .. } => None,
        }
    }

    /// Its weights, for `program`.
    pub fn weights<'a>(
        &'a self,
        program: &'a Program,
    ) -> Result<Box<dyn WeightSource + 'a>, SessionError> {
        Ok(match &self.source {
            ShapeSource::Model(model) => Box::new(model.weights(program)?),
            ShapeSource::Dummy { format, .. } => {
                Box::new(DummyWeights::new(program, *format, SEED))
            }
        })
    }

    /// The sizes of the weights in the checkpoint.
    pub fn sizes(&self, program: &Program) -> Result<Sizes, SessionError> {
        match &self.source {
            ShapeSource::Model(model) => Sizes::of_model(model, program),
            ShapeSource::Dummy { format, .. } => {
                let weights = weights_of(program).map(|w| dummy_size(program, w, *format));
                let weights = weights.collect::<Result<Vec<_>, SessionError>>()?;
                Ok(Sizes { weights, tied_head: self.spec().tied_head })
            }
        }
    }
}

fn weights_of(program: &Program) -> impl Iterator<Item = Weight> {
    (0..program.weights.len() as u32).map(Weight)
}

/// The size that [`DummyWeights`] would make, without making the weight.
fn dummy_size(
    program: &Program,
    weight: Weight,
    format: Format,
) -> Result<(u64, Format), SessionError> {
    let decl = program.weight(weight);
    let columns = decl.shape.last().copied().unwrap_or(1);
    let format = match decl.role {
        WeightRole::Vector => Format::F32,
        WeightRole::Router => Format::BF16,
        _ if columns.is_multiple_of(format.block_len().max(1)) => format,
        _ => Format::BF16,
    };
    let bytes = format
        .bytes_for(&decl.shape)
        .map_err(|source| SessionError::Weight { weight: decl.name.clone(), source })?;
    Ok((bytes as u64, format))
}

impl Sizes {
    /// The sizes of a model's weights in its files.
    pub fn of_model(model: &Model, program: &Program) -> Result<Self, SessionError> {
        let source = model.weights(program)?;
        let size = |weight| {
            let tensor = source.tensor(weight).map_err(SessionError::Weights)?;
            Ok((tensor.byte_len() as u64, tensor.format))
        };
        let weights = weights_of(program).map(size).collect::<Result<Vec<_>, SessionError>>()?;
        Ok(Self { weights, tied_head: model.spec.tied_head })
    }

    /// Bytes of one weight.
    pub fn of(&self, weight: Weight) -> u64 {
        self.weights[weight.0 as usize].0
    }

    /// Number format of one weight.
    pub fn format_of(&self, weight: Weight) -> Format {
        self.weights[weight.0 as usize].1
    }

    /// Bytes of all weights. A head that is the embedding counts once.
    pub fn total(&self, program: &Program) -> u64 {
        let counts = |decl: WeightRole| !(self.tied_head && decl == WeightRole::Head);
        let sizes = program.weights.iter().zip(&self.weights);
        sizes.filter(|(decl, _)| counts(decl.role)).map(|(_, (bytes, _))| bytes).sum()
    }

    /// The format with the most bytes among the weights whose role is `wanted`.
    pub fn main_format_of(&self, program: &Program, wanted: impl Fn(WeightRole) -> bool) -> Format {
        let pairs = program.weights.iter().zip(&self.weights);
        let wanted = pairs.filter(|(decl, _)| wanted(decl.role)).map(|(_, size)| size);
        by_format(wanted).first().map_or(Format::F32, |(format, _)| *format)
    }

    /// The format with the most bytes.
    pub fn main_format(&self) -> Format {
        by_format(&self.weights).first().map_or(Format::F32, |(format, _)| *format)
    }

    /// The formats of the matrices, most bytes first: `q4_1+q8_0`.
    pub fn formats(&self) -> String {
        let mut formats = by_format(&self.weights);
        let total: u64 = formats.iter().map(|(_, size)| size).sum();
        // Norms are f32 in most files, so they do not count.
        formats
            .retain(|(format, size)| *format != Format::Float(FloatType::F32) || size * 20 > total);
        formats.iter().map(|(format, _)| format.to_string()).collect::<Vec<_>>().join("+")
    }
}

/// Bytes in each format, the most first.
fn by_format<'a>(sizes: impl IntoIterator<Item = &'a (u64, Format)>) -> Vec<(Format, u64)> {
    let mut bytes: HashMap<Format, u64> = HashMap::new();
    for (size, format) in sizes {
        *bytes.entry(*format).or_default() += size;
    }
    let mut formats: Vec<_> = bytes.into_iter().collect();
    formats.sort_by_key(|(format, size)| (std::cmp::Reverse(*size), format.to_string()));
    formats
}

fn has_no_weights(folder: &Path) -> bool {
    let weights = ["model.safetensors", "model.safetensors.index.json"];
    folder.join("config.json").is_file() && !weights.iter().any(|name| folder.join(name).exists())
}

fn short_name(name: &str) -> String {
    let last = Path::new(name).file_name().map(|name| name.to_string_lossy().into_owned());
    last.unwrap_or_else(|| name.to_owned())
}
