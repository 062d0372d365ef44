//! What a job says of its work: of each matrix, of each group that was scaled, of each router.

use serde::{Deserialize, Deserializer, Serialize};

use crate::matrix::MatrixReport;

/// The registry's own spelling of a technique's name. Not spelt as the reference that it is where
/// it is deserialized: it does not borrow from what is read.
pub type TechniqueName = &'static str;

/// What became of one matrix.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WeightReport {
    /// Canonical name.
    pub tensor: String,
    /// The technique that chose its codes.
    #[serde(deserialize_with = "technique_named")]
    pub technique: TechniqueName,
    /// What it cost, with its correction if it has one.
    #[serde(flatten)]
    pub report: MatrixReport,
    /// What runs beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correction: Option<CorrectionReport>,
}

/// What runs beside one quantized matrix.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CorrectionReport {
    /// The technique.
    #[serde(deserialize_with = "technique_named")]
    pub technique: TechniqueName,
    /// Columns of the first matrix and rows of the second.
    pub rank: usize,
    /// Bytes of both.
    pub bytes: usize,
    /// Which of the technique's rounds lost least, from 1 on.
    pub round: usize,
    /// What the codes alone cost.
    pub uncorrected: MatrixReport,
}

/// What became of the scales of one group's channels.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PreparedReport {
    /// Canonical names of the group's matrices.
    pub tensors: Vec<String>,
    /// The technique.
    #[serde(deserialize_with = "technique_named")]
    pub technique: TechniqueName,
    /// Why nothing was scaled, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// The least and the largest scale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scales: Option<[f32; 2]>,
}

/// The technique that is called so.
fn technique_named<'de, D: Deserializer<'de>>(source: D) -> Result<TechniqueName, D::Error> {
    let name = String::deserialize(source)?;
    let technique = crate::technique::find(&name).map_err(serde::de::Error::custom)?;
    Ok(technique.name)
}

/// How many tokens of the calibration a router chose each expert for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CoverageReport {
    /// Canonical name of the router.
    pub router: String,
    /// By expert.
    pub tokens: Vec<u64>,
}

/// All that a job says of its work, in the order in which it was done.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Reports {
    /// Of each quantized matrix.
    #[serde(rename = "reports")]
    pub tensors: Vec<WeightReport>,
    /// Of each group whose channels were to be scaled.
    pub prepared: Vec<PreparedReport>,
    /// Of each router.
    pub coverage: Vec<CoverageReport>,
}
