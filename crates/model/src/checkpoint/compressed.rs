//! compressed-tensors: groups of modules, each with a scheme that says how its weights lie.
//!
//! What a step does to inputs, `input_activations` and the online part of `transform_config`, is
//! the business of [`super::InputScheme`].

use lathe_tensor::safetensors::{Checkpoint as SafetensorsFiles, Dtype};
use lathe_tensor::{Bytes, Element, GlobalScale, ScaleType, ScaledFormat, Tensor, ZeroPoint};

use super::integers::in_order;
use super::planes::{self, Beside, expect, float_scale, scalar, shape_of_bytes};
use super::scheme::{Encoding, NAMING, Scheme, refuse};
use super::targets::Targets;
use super::{CheckpointError, packed, unlike};
use crate::config::Config;
use crate::spec::SpecError;

/// A `quantization_config` whose method is `compressed-tensors`: the schemes of modules.
#[derive(Debug, Clone)]
pub struct CompressedTensors(Targets<Scheme>);

impl CompressedTensors {
    /// What a configuration says.
    ///
    /// # Errors
    /// If it asks for something that is not supported, which the error names.
    pub(super) fn from_hf_config(c: &Config<'_>) -> Result<Self, SpecError> {
        let top = c.text("format")?.unwrap_or("(none given)");
        if let Some(sparsity) = c.object("sparsity_config")?
            && sparsity.given().next().is_some()
            && sparsity.text("format")? != Some("dense")
        {
            return refuse("sparsity_config");
        }
        let Some(groups) = c.object("config_groups")? else {
            return Err(SpecError::Missing("quantization_config.config_groups".to_owned()));
        };
        let mut all = Targets::default();
        for name in groups.given() {
            let Some(group) = groups.object(name)? else { continue };
            let scheme = Scheme::of_group(&group, top)?;
            for target in group.texts("targets")?.unwrap_or_default() {
                all.add(target, scheme)?;
            }
        }
        match all.is_empty() {
            true => refuse("config without groups that have targets"),
            false => Ok(CompressedTensors(all)),
        }
    }

    /// The scheme of the module that owns weight `name`.
    fn scheme(&self, name: &str) -> Result<Scheme, SpecError> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        match self.0.find(module)? {
            Some(scheme) => Ok(scheme),
            None => {
                refuse(format!("config without a group for module {module}, which is quantized"))
            }
        }
    }

    /// Whether `name` is stored as codes and scales.
    fn is_quantized(files: &SafetensorsFiles, name: &str) -> bool {
        name.ends_with(NAMING.whole) && files.contains(&NAMING.part(name, "weight_scale"))
    }

    pub(super) fn shape(
        &self,
        files: &SafetensorsFiles,
        name: &str,
    ) -> Result<Vec<usize>, CheckpointError> {
        let packed = NAMING.part(name, "weight_packed");
        if !files.contains(&packed) {
            return Ok(files.raw(name)?.shape.clone());
        }
        let scheme = self.scheme(name)?;
        match scheme.encoding {
            Encoding::PackQuantized => Ok(packed::shape_of(files, name)?.to_vec()),
            _ => shape_of_bytes(&packed, files.raw(&packed)?, scheme.element.bits()),
        }
    }

    pub(super) fn tensor(
        &self,
        files: &SafetensorsFiles,
        name: &str,
    ) -> Result<Tensor, CheckpointError> {
        if !Self::is_quantized(files, name) {
            return Ok(files.tensor(name)?);
        }
        let scheme = self.scheme(name)?;
        let tensor = match scheme.encoding {
            Encoding::PackQuantized => packed::read(files, name, scheme)?,
            _ => scheme.read_planes(files, name)?,
        };
        let order = NAMING.part(name, "weight_g_idx");
        match scheme.ordered || files.contains(&order) {
            true => in_order(files, name, &order, tensor),
            false => Ok(tensor),
        }
    }
}

impl Scheme {
    /// Codes that lie as a tensor has them.
    fn read_planes(&self, files: &SafetensorsFiles, name: &str) -> Result<Tensor, CheckpointError> {
        let bits = self.element.bits();
        let (codes_name, dtype) = match self.element {
            _ if bits < 8 => (NAMING.part(name, "weight_packed"), Dtype::U8),
            Element::Int(_) => (name.to_owned(), Dtype::I8),
            _ => (name.to_owned(), Dtype::F8_E4M3),
        };
        let codes = files.raw(&codes_name)?;
        expect(&codes_name, codes, &[dtype])?;
        let shape = shape_of_bytes(&codes_name, codes, bits)?;
        let scales_name = NAMING.part(name, "weight_scale");
        let scales = files.raw(&scales_name)?;
        let scale = match self.encoding {
            Encoding::Mxfp4 | Encoding::Mxfp6 | Encoding::Mxfp8 => {
                expect(&scales_name, scales, &[Dtype::U8, Dtype::F8_E8M0])?;
                ScaleType::E8M0
            }
            Encoding::Nvfp4 => {
                expect(&scales_name, scales, &[Dtype::F8_E4M3])?;
                ScaleType::E4M3Global
            }
            _ => float_scale(&scales_name, scales)?,
        };
        let global = match scale {
            ScaleType::E4M3Global => {
                let global = NAMING.part(name, "weight_global_scale");
                GlobalScale::Divide(vec![scalar(files, &global)?])
            }
            _ => GlobalScale::One,
        };
        let zeros = self.zeros(files, name)?;
        let format =
            ScaledFormat { element: self.element, block: self.block, scale, zero: self.zero };
        let beside = Beside { scales_name: &scales_name, scales, zeros, global };
        planes::tensor(name, shape, format, codes, beside)
    }

    /// Zero points of codes that are not packed. Files of symmetric schemes may have some too, of
    /// nothing but zeros.
    fn zeros(&self, files: &SafetensorsFiles, name: &str) -> Result<Bytes, CheckpointError> {
        let part = NAMING.part(name, "weight_zero_point");
        let none = Bytes::new(Vec::new());
        if self.zero == ZeroPoint::None && !files.contains(&part) {
            return Ok(none);
        }
        let raw = files.raw(&part)?;
        if self.zero == ZeroPoint::None {
            // -0 is a zero as well.
            return match raw.bytes.iter().all(|byte| byte & 0x7f == 0) {
                true => Ok(none),
                false => Err(unlike(&part, raw, "zeros, for the scheme is symmetric")),
            };
        }
        expect(&part, raw, &[Dtype::I8])?;
        Ok(raw.bytes.clone())
    }
}
