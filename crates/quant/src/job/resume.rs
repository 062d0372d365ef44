//! A calibrated job that can be interrupted. Each finished layer and the stream after it are saved
//! in a folder. A later run with the same recipe, model and text continues from there.
//!
//! `layer-N.safetensors` has the layer's new weights, and `stream-N.safetensors` the stream after
//! it. `state.json` has the number of finished layers, the reports so far, and the origin of the
//! run. Each file is written under a temporary name and then renamed, the state last. So a process
//! that ends at any point leaves a folder that a later run can use.
//!
//! Files are not synced to disk, because a sync for each layer is slow and a stream is soon
//! deleted. After a power loss a file may be cut short; it is then refused. Weights in the folder
//! are mapped, not kept in memory. The bits are those of a run without interruption.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lathe_program::{StaticScale, Weight};
use lathe_tensor::safetensors::{Dtype, SafetensorsFile, TensorDeclaration, Writer};
use lathe_tensor::{Bytes, Format, GlobalScale, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Job;
use super::reports::Reports;
use crate::calibrate::{Calibration, Prefixes, Stream};
use crate::correction::Correction;
use crate::error::QuantError;

/// Bytes of each weight that are hashed, to tell models apart.
const SAMPLE_BYTES: usize = 4096;

/// The origin of a run. Only a run of the same origin continues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Origin {
    recipe: String,
    /// SHA-256 of the weights' names, shapes, formats and first bytes.
    model: String,
    /// SHA-256 of the tokens and of the settings that run them.
    calibration: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    origin: Origin,
    layers: usize,
    /// Elements of matrices that are done.
    done: usize,
    #[serde(flatten)]
    reports: Reports,
}

/// The folder of finished layers.
pub(super) struct Store {
    folder: PathBuf,
    origin: Origin,
    /// Names of the files that are saved already.
    saved: BTreeSet<String>,
}

impl Store {
    fn refused(&self, reason: impl ToString) -> QuantError {
        QuantError::Resume { folder: self.folder.clone(), reason: reason.to_string() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn layer(&self, layer: usize) -> PathBuf {
        self.path(&format!("layer-{layer}.safetensors"))
    }

    fn stream(&self, layers: usize) -> PathBuf {
        self.path(&format!("stream-{layers}.safetensors"))
    }

    /// The state of an earlier run, if there was one.
    fn state(&self) -> Result<Option<State>, QuantError> {
        let text = match std::fs::read_to_string(self.path("state.json")) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.refused(error)),
        };
        let state: State = serde_json::from_str(&text)
            .map_err(|error| self.refused(format!("state.json: {error}")))?;
        let (found, expected) = (&state.origin, &self.origin);
        let same = [
            ("recipe", found.recipe == expected.recipe),
            ("model", found.model == expected.model),
            ("calibration text", found.calibration == expected.calibration),
        ];
        match same.iter().find(|(_, same)| !same) {
            None => Ok(Some(state)),
            Some((what, _)) => Err(self.refused(format!(
                "it holds {} layers of a run with another {what}, expected the same; remove it to begin \
                 again",
                state.layers
            ))),
        }
    }

    fn write(&self, path: &Path, planes: &[Plane<'_>]) -> Result<(), QuantError> {
        let declare = |plane: &Plane<'_>| TensorDeclaration {
            name: plane.name.clone(),
            dtype: Dtype::U8,
            shape: vec![plane.bytes.len()],
        };
        let declared: Vec<TensorDeclaration> = planes.iter().map(declare).collect();
        let about =
            planes.iter().filter_map(|plane| Some((plane.name.clone(), plane.about.clone()?)));
        let mut writer = Writer::create(path, &declared, &about.collect())
            .map_err(|error| self.refused(error))?;
        for plane in planes {
            writer.write(&plane.name, &plane.bytes).map_err(|error| self.refused(error))?;
        }
        writer.finish_cached().map_err(|error| self.refused(error))?;
        Ok(())
    }

    fn open(&self, path: &Path) -> Result<SafetensorsFile, QuantError> {
        SafetensorsFile::open(path).map_err(|error| self.refused(error))
    }

    fn write_state(&self, state: &State) -> Result<(), QuantError> {
        let text = serde_json::to_string(state).map_err(|error| self.refused(error))?;
        let partial = self.path("state.json.partial");
        std::fs::write(&partial, text)
            .and_then(|()| std::fs::rename(&partial, self.path("state.json")))
            .map_err(|error| self.refused(error))
    }
}

/// One plane of a tensor: its name and bytes with shape and type.
struct Plane<'a> {
    name: String,
    bytes: std::borrow::Cow<'a, [u8]>,
    about: Option<String>,
}

fn floats(name: String, values: &[f32]) -> Plane<'static> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Plane { name, bytes: bytes.into(), about: None }
}

fn plane_of_stream<'a>((name, stream): (&str, &'a Stream)) -> Plane<'a> {
    let bytes: &[u8] = stream.values.as_ref();
    Plane { name: name.to_owned(), bytes: bytes.into(), about: Some(stream.width.to_string()) }
}

fn floats_of(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// The planes of a tensor called `name`. Planes that the tensor lacks are empty.
fn planes_of<'a>(name: &str, tensor: &'a Tensor) -> Vec<Plane<'a>> {
    let shape: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
    let about = format!("{} {}", tensor.format, shape.join(" "));
    let plane = |kind: &str, bytes: &'a [u8]| Plane {
        name: format!("{name}.{kind}"),
        bytes: bytes.into(),
        about: None,
    };
    let mut planes = vec![
        Plane { about: Some(about), ..plane("codes", &tensor.codes) },
        plane("scales", &tensor.scales),
        plane("zeros", &tensor.zeros),
    ];
    let global = |kind, all: &[f32]| floats(format!("{name}.{kind}"), all);
    match &tensor.global {
        GlobalScale::One => {}
        GlobalScale::Multiply(all) => planes.push(global("multiply", all)),
        GlobalScale::Divide(all) => planes.push(global("divide", all)),
    }
    planes
}

/// The tensor whose planes begin with `name`. Its bytes stay in the mapped file.
fn tensor_of(file: &SafetensorsFile, name: &str) -> Option<Tensor> {
    let about = file.metadata().get(&format!("{name}.codes"))?;
    let mut words = about.split(' ');
    let format = Format::parse(words.next()?).ok()?;
    let shape = words.map(str::parse).collect::<Result<Vec<usize>, _>>().ok()?;
    let plane = |kind: &str| file.raw(&format!("{name}.{kind}")).map(|it| it.bytes.clone());
    let global = match (plane("multiply"), plane("divide")) {
        (Ok(all), _) => GlobalScale::Multiply(floats_of(&all)),
        (_, Ok(all)) => GlobalScale::Divide(floats_of(&all)),
        _ => GlobalScale::One,
    };
    let (codes, scales, zeros): (Bytes, Bytes, Bytes) =
        (plane("codes").ok()?, plane("scales").ok()?, plane("zeros").ok()?);
    Tensor::new_scaled(shape, format, codes, scales, zeros, global).ok()
}

/// Whether a job wrote the file of this name in its folder.
fn is_ours(name: &str) -> bool {
    let numbered = |prefix: &str| {
        let number = name.strip_prefix(prefix).and_then(|rest| rest.split('.').next());
        number.is_some_and(|it| !it.is_empty() && it.bytes().all(|byte| byte.is_ascii_digit()))
    };
    matches!(name, "state.json" | "state.json.partial") || numbered("layer-") || numbered("stream-")
}

/// Removes the folder of [`Job::calibrate_resumable`] when its result is written. Files that no job
/// wrote stay, and the folder with them.
///
/// # Errors
/// If a file cannot be removed.
pub fn remove_finished_layers(folder: &Path) -> std::io::Result<()> {
    let mut foreign = false;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_name().to_str().is_some_and(is_ours) {
            true => std::fs::remove_file(entry.path())?,
            false => foreign = true,
        }
    }
    if foreign { Ok(()) } else { std::fs::remove_dir(folder) }
}

fn hex(digest: Sha256) -> String {
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Job<'_> {
    /// The store of this job in a folder, which may hold an earlier run of the same origin.
    pub(super) fn store(
        &self,
        folder: &Path,
        calibration: &Calibration<'_>,
    ) -> Result<Store, QuantError> {
        let mut model = Sha256::new();
        for (index, decl) in self.plan.program.weights.iter().enumerate() {
            let tensor = self.plan.weights.load(Weight(index as u32))?;
            model.update(format!("{} {:?} {}\n", decl.name, tensor.shape, tensor.format));
            model.update(&tensor.codes[..tensor.codes.len().min(SAMPLE_BYTES)]);
        }
        let mut text = Sha256::new();
        let Calibration { backend, tokens, window, exact, kv_format, threads: _ } = calibration;
        text.update(format!("{} {window} {exact} {kv_format:?}\n", backend.name()));
        tokens.iter().for_each(|token| text.update(token.to_le_bytes()));
        let recipe = self.plan.recipe.to_toml();
        let origin = Origin { recipe, model: hex(model), calibration: hex(text) };
        let store = Store { folder: folder.to_owned(), origin, saved: BTreeSet::new() };
        std::fs::create_dir_all(folder).map_err(|error| store.refused(error))?;
        for entry in std::fs::read_dir(folder).map_err(|error| store.refused(error))? {
            let name = entry.map_err(|error| store.refused(error))?.file_name();
            let name = name.to_string_lossy();
            if !is_ours(&name) {
                let reason = format!("it holds `{name}`, which no run wrote; move it away");
                return Err(store.refused(reason));
            }
        }
        Ok(store)
    }

    /// Restores an earlier run: the number of finished layers and the stream after them.
    pub(super) fn restore(
        &mut self,
        store: &mut Store,
    ) -> Result<Option<(usize, Prefixes)>, QuantError> {
        let Some(state) = store.state()? else { return Ok(None) };
        for layer in 0..state.layers {
            self.map_layer(store, layer)?;
        }
        let file = store.open(&store.stream(state.layers))?;
        let stream = |name: &str| -> Option<Stream> {
            let width = file.metadata().get(name)?.parse().ok()?;
            Some(Stream { width, values: floats_of(&file.raw(name).ok()?.bytes).into() })
        };
        let (found, float) = (stream("stream"), stream("float"));
        let found = found.ok_or_else(|| store.refused("its stream is missing"))?;
        if float.is_none() && self.plan.recipe.is_asymmetric() {
            return Err(store.refused("the float model's stream is missing"));
        }
        self.ledger.done = state.done;
        self.ledger.reports = state.reports;
        Ok(Some((state.layers, Prefixes { stream: found, float })))
    }

    /// Saves layer `layer`, the next one, and the streams after it.
    pub(super) fn save(
        &mut self,
        store: &mut Store,
        layer: usize,
        prefixes: &Prefixes,
    ) -> Result<(), QuantError> {
        let mut planes = Vec::new();
        let tensors = [("weight", &self.ledger.finished), ("norm", &self.ledger.norms)];
        for (kind, list) in tensors {
            for (weight, tensor) in list {
                let name = format!("{kind} {}", weight.0);
                if !store.saved.contains(&name) {
                    planes.extend(planes_of(&name, tensor));
                }
            }
        }
        for (weight, correction) in &self.ledger.corrections {
            for (kind, tensor) in [("lora_a", &correction.a), ("lora_b", &correction.b)] {
                let name = format!("{kind} {}", weight.0);
                if !store.saved.contains(&name) {
                    planes.extend(planes_of(&name, tensor));
                }
            }
        }
        let rows = self.ledger.rows.iter().map(|(weight, all)| (format!("rows {}", weight.0), all));
        let columns = self.ledger.columns.iter().map(|(op, all)| (format!("columns {op}"), all));
        for (name, scales) in rows.chain(columns) {
            if !store.saved.contains(&name) {
                planes.push(Plane { about: Some(String::new()), ..floats(name, scales) });
            }
        }
        for (weight, scale) in &self.ledger.input_scales {
            let name = format!("input {}", weight.0);
            if !store.saved.contains(&name) {
                let plane = floats(name, &[scale.value()]);
                planes.push(Plane { about: Some(String::new()), ..plane });
            }
        }
        store.write(&store.layer(layer), &planes)?;
        drop(planes);
        self.map_layer(store, layer)?;
        let float = prefixes.float.iter().map(|float| ("float", float));
        let streams: Vec<Plane<'_>> =
            [("stream", &prefixes.stream)].into_iter().chain(float).map(plane_of_stream).collect();
        store.write(&store.stream(layer + 1), &streams)?;
        let state = State {
            origin: store.origin.clone(),
            layers: layer + 1,
            done: self.ledger.done,
            reports: self.ledger.reports.clone(),
        };
        store.write_state(&state)?;
        // The state no longer needs this file. If it cannot be removed, that does no harm.
        let _ = std::fs::remove_file(store.stream(layer));
        Ok(())
    }

    /// Replaces a layer's weights in memory by those mapped from its file.
    fn map_layer(&mut self, store: &mut Store, layer: usize) -> Result<(), QuantError> {
        let file = store.open(&store.layer(layer))?;
        let mut names = Vec::new();
        for key in file.metadata().keys() {
            let name = key.trim_end_matches(".codes");
            let unknown = || store.refused(format!("layer {layer} has an unknown part `{key}`"));
            let (kind, number) = name.split_once(' ').ok_or_else(unknown)?;
            let number: u32 = number.parse().map_err(|_| unknown())?;
            let tensor = || tensor_of(&file, name).ok_or_else(unknown);
            let scales = || file.raw(name).map(|it| floats_of(&it.bytes)).map_err(|_| unknown());
            let known = (number as usize) < self.plan.program.weights.len();
            match kind {
                "weight" if known => drop(self.ledger.finished.insert(Weight(number), tensor()?)),
                "lora_a" if known => {
                    let other = tensor_of(&file, &format!("lora_b {number}"));
                    let (a, b) = (tensor()?, other.ok_or_else(unknown)?);
                    let rotation = self.plan.rotation_of(Weight(number));
                    let correction = Correction { a, b, rotation };
                    self.ledger.corrections.insert(Weight(number), correction);
                }
                // It is read together with `lora_a`.
                "lora_b" if known => {}
                "norm" if known => drop(self.ledger.norms.insert(Weight(number), tensor()?)),
                "rows" if known => drop(self.ledger.rows.insert(Weight(number), scales()?)),
                "input" if known => {
                    let scale = match scales()?[..] {
                        [scale] => StaticScale::new(scale).ok_or_else(unknown)?,
                        _ => return Err(unknown()),
                    };
                    self.ledger.input_scales.insert(Weight(number), scale);
                }
                "columns" => drop(self.ledger.columns.insert(number as usize, scales()?)),
                _ => return Err(unknown()),
            }
            names.push(name.to_owned());
        }
        store.saved.extend(names);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
