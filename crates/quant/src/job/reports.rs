//! The reports of a job: for each matrix, each scaled group and each router.

use serde::{Deserialize, Deserializer, Serialize};

use crate::matrix::MatrixReport;

/// The registry's spelling of a technique's name. This alias hides the reference from serde's
/// derive, which would otherwise borrow from the input.
pub type TechniqueName = &'static str;

/// The report of one matrix.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WeightReport {
    /// Canonical name.
    pub tensor: String,
    /// The technique that chose the codes.
    #[serde(deserialize_with = "technique_named")]
    pub technique: TechniqueName,
    /// The error, with the correction if there is one.
    #[serde(flatten)]
    pub report: MatrixReport,
    /// The report of the correction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correction: Option<CorrectionReport>,
}

/// The correction of one quantized matrix.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CorrectionReport {
    /// The technique.
    #[serde(deserialize_with = "technique_named")]
    pub technique: TechniqueName,
    /// Columns of the first matrix and rows of the second.
    pub rank: usize,
    /// Bytes of both.
    pub bytes: usize,
    /// The round of the technique with the least loss, from 1.
    pub round: usize,
    /// The error of the codes alone.
    pub uncorrected: MatrixReport,
}

/// The report of one group whose channels were to be scaled.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PreparedReport {
    /// Canonical names of the group's matrices.
    pub tensors: Vec<String>,
    /// The technique.
    #[serde(deserialize_with = "technique_named")]
    pub technique: TechniqueName,
    /// The reason why nothing was scaled, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// The least and the largest scale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scales: Option<[f32; 2]>,
}

/// Reads a technique by its name.
fn technique_named<'de, D: Deserializer<'de>>(source: D) -> Result<TechniqueName, D::Error> {
    let name = String::deserialize(source)?;
    let technique = crate::technique::find(&name).map_err(serde::de::Error::custom)?;
    Ok(technique.name)
}

/// For each expert of a router, the calibration tokens that it was chosen for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CoverageReport {
    /// Canonical name of the router.
    pub router: String,
    /// Tokens, by expert.
    pub tokens: Vec<u64>,
}

/// The reports of a job, in the order of its work.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Reports {
    /// One report for each quantized matrix.
    #[serde(rename = "reports")]
    pub tensors: Vec<WeightReport>,
    /// One for each group whose channels were to be scaled.
    pub prepared: Vec<PreparedReport>,
    /// One for each router.
    pub coverage: Vec<CoverageReport>,
}
