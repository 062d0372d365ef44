//! What a rotation does to each weight of a program. It is derived from the program alone.
//!
//! The stream is rotated (QuaRot's R1). Every matrix that writes to the stream gets `Q^T` on its
//! rows, and every matrix that reads it gets `Q` on its columns. An RMS norm between them commutes
//! with an orthogonal matrix, after its weight has moved into its readers. Values between the value
//! projection and the output projection are rotated one head at a time (R2), because attention only
//! mixes them over positions. No work is left for the time when the model runs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lathe_program::{LinearPart, NormKind, Op, Program, Value, Weight};

use super::orthogonal::{Kind, Orthogonal};
use crate::error::QuantError;
use crate::rotated::rotated;

/// One change of a weight.
#[derive(Debug, Clone, PartialEq)]
pub enum Turn {
    /// Columns are multiplied by `offset + weight` of a norm.
    Absorb {
        /// The norm's weight.
        norm: Weight,
        /// What is added to it.
        offset: f32,
    },
    /// The weight of a norm that its readers absorbed: `1 - offset` everywhere.
    Neutral {
        /// What is added to it.
        offset: f32,
    },
    /// Each row `x` of the last dimension becomes `x Q`.
    Columns(Arc<Orthogonal>),
    /// `[.., out, in]` becomes `Q^T W`.
    Rows(Arc<Orthogonal>),
    /// Each block `w` of this many elements in a row of the last dimension becomes `w H^T`. This is
    /// the inverse of the rotation of the input while the model runs.
    Hadamard(usize),
}

/// The changes of every weight that a rotation touches, in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Turns {
    of: BTreeMap<Weight, Vec<Turn>>,
    /// Attentions whose values could not be rotated, with the reason.
    pub skipped: Vec<String>,
}

impl Turns {
    /// The changes of `weight`. Empty if there are none.
    pub fn of(&self, weight: Weight) -> &[Turn] {
        self.of.get(&weight).map_or(&[], Vec::as_slice)
    }

    /// The weights that change.
    pub fn weights(&self) -> impl Iterator<Item = Weight> + '_ {
        self.of.keys().copied()
    }

    /// Adds the inverses of the rotations that `program` does while it runs. They come last,
    /// because those rotations are next to the matrices.
    pub(crate) fn fold_inputs(&mut self, program: &Program) {
        for (weight, block) in rotated(program) {
            self.push(weight, Turn::Hadamard(block));
        }
    }

    fn push(&mut self, weight: Weight, turn: Turn) {
        self.of.entry(weight).or_default().push(turn);
    }
}

/// The rotations to apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RotationSettings {
    /// What kind of matrix.
    pub kind: Kind,
    /// Elements of the stream that are rotated together; 0 for all.
    pub block: usize,
    /// Whether the stream is rotated.
    pub stream: bool,
    /// Whether the heads' values are rotated.
    pub values: bool,
    /// The seed of the random kinds.
    pub seed: u64,
}

/// What `choice` does to the weights of `program`.
///
/// # Errors
/// If an op between two matrices does not commute with a rotation of the stream. The message names
/// it.
pub fn turns(program: &Program, choice: &RotationSettings) -> Result<Turns, QuantError> {
    let mut turns = Turns::default();
    if choice.stream {
        let width = stream_width(program)?;
        let block = if choice.block == 0 { width } else { choice.block };
        if !width.is_multiple_of(block) {
            let reason = format!("blocks of {block} do not divide the stream's {width} elements");
            return Err(QuantError::Recipe(format!("rotate: {reason}")));
        }
        let matrix = Arc::new(Orthogonal::new(choice.kind, block, choice.seed));
        Flow::new(program, &mut turns, matrix).run()?;
    }
    if choice.values {
        for index in 0..program.ops.len() {
            turn_values(program, index, choice, &mut turns);
        }
    }
    Ok(turns)
}

fn refuse(program: &Program, op: &Op, reason: &str) -> QuantError {
    let weights = op.weights();
    let first = op.outputs().next().map(|value| program.values[value.0 as usize].name.clone());
    let name = first.or_else(|| weights.first().map(|it| program.weight(*it).name.clone()));
    QuantError::Technique {
        technique: "rotate",
        tensor: name.unwrap_or_else(|| op.kind().to_owned()),
        reason: reason.to_owned(),
    }
}

fn stream_width(program: &Program) -> Result<usize, QuantError> {
    let width = program.ops.iter().find_map(|op| match op {
        Op::Embed { out, .. } => Some(program.value_width(*out)),
        _ => None,
    });
    width.ok_or_else(|| QuantError::Recipe("rotate: the program embeds no tokens".to_owned()))
}

/// Follows the stream through a program.
struct Flow<'a> {
    program: &'a Program,
    turns: &'a mut Turns,
    matrix: Arc<Orthogonal>,
    /// Values in the basis of the stream.
    stream: BTreeSet<Value>,
    /// Outputs of norms of the stream, with the norm's weight and offset that their readers absorb.
    normed: BTreeMap<Value, Option<(Weight, f32)>>,
}

impl<'a> Flow<'a> {
    fn new(program: &'a Program, turns: &'a mut Turns, matrix: Arc<Orthogonal>) -> Self {
        let (stream, normed) = (BTreeSet::new(), BTreeMap::new());
        Flow { program, turns, matrix, stream, normed }
    }

    fn run(&mut self) -> Result<(), QuantError> {
        for op in &self.program.ops {
            match op {
                Op::Embed { table, out, .. } => {
                    self.stream.insert(*out);
                    self.turns.push(*table, Turn::Columns(Arc::clone(&self.matrix)));
                }
                Op::Norm { input, out, .. } if self.stream.contains(input) => {
                    self.norm(op, *out)?;
                }
                Op::Add { left, right, out, .. } => self.add(*left, *right, *out)?,
                Op::Linear { input, parts } => {
                    self.read(*input, parts.iter().map(|part| part.weight))?;
                }
                // The matrices behind a transform read the stream in its old basis, rotated by the
                // transform.
                Op::Transform { input, out, .. } => {
                    if let Some(absorbed) = self.normed.get(input).copied() {
                        self.normed.insert(*out, absorbed);
                    } else if self.stream.contains(input) {
                        self.normed.insert(*out, None);
                    }
                }
                Op::Route { input, spec, .. } => self.read(*input, [spec.weight])?,
                Op::Experts { input, spec, .. } => self.read(*input, [spec.gate, spec.up])?,
                Op::Logits { input, head, .. } => self.read(*input, [*head])?,
                Op::Capture { .. } => {}
                other => {
                    let turned = |it: &Value| self.is_turned(*it);
                    if other.inputs().any(|it| turned(&it)) {
                        return Err(refuse(self.program, other, "it reads the stream"));
                    }
                }
            }
        }
        Ok(())
    }

    fn is_turned(&self, value: Value) -> bool {
        self.stream.contains(&value) || self.normed.contains_key(&value)
    }

    fn norm(&mut self, op: &Op, out: Value) -> Result<(), QuantError> {
        let Op::Norm { weight, bias: None, kind: NormKind::Rms { offset }, groups: 1, .. } = op
        else {
            return Err(refuse(self.program, op, "expected an RMS norm of the whole stream"));
        };
        if let Some(weight) = weight {
            once(self.program, *weight)?;
            self.turns.push(*weight, Turn::Neutral { offset: *offset });
        }
        self.normed.insert(out, weight.map(|weight| (weight, *offset)));
        Ok(())
    }

    fn add(&mut self, left: Value, right: Value, out: Value) -> Result<(), QuantError> {
        match (self.stream.contains(&left), self.stream.contains(&right)) {
            (false, false) => return Ok(()),
            (true, true) => {}
            (true, false) => self.write(right)?,
            (false, true) => self.write(left)?,
        }
        self.stream.insert(out);
        Ok(())
    }

    /// Marks the matrices that read `input`.
    fn read(
        &mut self,
        input: Value,
        weights: impl IntoIterator<Item = Weight>,
    ) -> Result<(), QuantError> {
        let absorbed = match self.normed.get(&input) {
            Some(absorbed) => *absorbed,
            None if self.stream.contains(&input) => None,
            None => return Ok(()),
        };
        for weight in weights {
            once(self.program, weight)?;
            if let Some((norm, offset)) = absorbed {
                self.turns.push(weight, Turn::Absorb { norm, offset });
            }
            self.turns.push(weight, Turn::Columns(Arc::clone(&self.matrix)));
        }
        Ok(())
    }

    /// Marks the op that makes `value`, which is added to the stream.
    fn write(&mut self, value: Value) -> Result<(), QuantError> {
        let program = self.program;
        let readers = program.ops.iter().filter(|op| op.inputs().any(|it| it == value)).count();
        let maker = program.ops.iter().find(|op| op.outputs().any(|out| out == value));
        let maker = maker.expect("validated programs make what they read");
        if readers != 1 || self.is_turned(value) {
            return Err(refuse(program, maker, "what it adds to the stream is read elsewhere too"));
        }
        match maker {
            Op::Linear { parts, .. } => {
                let part = parts.iter().find(|part| part.out == value).expect("the maker's part");
                self.write_rows(part.weight, part.bias)
            }
            Op::Experts { spec, .. } => self.write_rows(spec.down, spec.down_bias),
            Op::Add { left, right, .. } => {
                self.write(*left)?;
                self.write(*right)
            }
            // A gate of width one is one factor for the whole row.
            Op::Gate { input, gate, .. } if program.value_width(*gate) == 1 => self.write(*input),
            other => {
                let reason = "it lies between a matrix and the stream, expected nothing there";
                Err(refuse(program, other, reason))
            }
        }
    }

    fn write_rows(&mut self, weight: Weight, bias: Option<Weight>) -> Result<(), QuantError> {
        once(self.program, weight)?;
        self.turns.push(weight, Turn::Rows(Arc::clone(&self.matrix)));
        if let Some(bias) = bias {
            once(self.program, bias)?;
            self.turns.push(bias, Turn::Columns(Arc::clone(&self.matrix)));
        }
        Ok(())
    }
}

fn once(program: &Program, weight: Weight) -> Result<(), QuantError> {
    let users = program.ops.iter().filter(|op| op.weights().contains(&weight)).count();
    match users {
        1 => Ok(()),
        _ => Err(QuantError::Technique {
            technique: "rotate",
            tensor: program.weight(weight).name.clone(),
            reason: format!("{users} ops read it, expected one"),
        }),
    }
}

/// Rotates the values of the attention at `index`, if the op is one and nothing prevents it.
fn turn_values(program: &Program, index: usize, choice: &RotationSettings, turns: &mut Turns) {
    let op = &program.ops[index];
    let found = match op {
        Op::Attend { layer, spec, out, .. } => {
            let uses = program.ops.iter().filter(|op| op.kv_layer() == Some(*layer)).count();
            let value = program.ops.iter().find_map(|op| match op {
                Op::WriteKv { value, layer: written, .. } if written == layer => Some(*value),
                _ => None,
            });
            let makers = match (uses, value) {
                (2, Some(value)) => projection(program, value),
                _ => Err("other layers use its cache".to_owned()),
            };
            makers.map(|part| (part.weight, part.bias, spec.value_dim, *out))
        }
        Op::AttendLatent { spec, out, .. } => Ok((spec.value_up, None, spec.value_dim, *out)),
        _ => return,
    };
    let turned = found.and_then(|(weight, bias, dim, out)| {
        let parts = readers_of(program, out)?;
        let weights = parts.iter().map(|part| part.weight).chain([weight]).chain(bias);
        for weight in weights {
            once(program, weight).map_err(|error| error.to_string())?;
        }
        let matrix = Arc::new(Orthogonal::new(choice.kind, dim, choice.seed));
        turns.push(weight, Turn::Rows(Arc::clone(&matrix)));
        if let Some(bias) = bias {
            turns.push(bias, Turn::Columns(Arc::clone(&matrix)));
        }
        for part in parts {
            turns.push(part.weight, Turn::Columns(Arc::clone(&matrix)));
        }
        Ok(())
    });
    if let Err(reason) = turned {
        let out = op.outputs().next().map_or(0, |value| value.0 as usize);
        turns.skipped.push(format!("{}: {reason}", program.values[out].name));
    }
}

/// The linear part that makes `value`, if only the cache reads it.
fn projection(program: &Program, value: Value) -> Result<&LinearPart, String> {
    let readers = program.ops.iter().filter(|op| op.inputs().any(|it| it == value)).count();
    if readers != 1 {
        return Err("its values are read elsewhere too".to_owned());
    }
    let parts = program.ops.iter().filter_map(|op| match op {
        Op::Linear { parts, .. } => Some(parts),
        _ => None,
    });
    let part = parts.flatten().find(|part| part.out == value);
    part.ok_or_else(|| "no matrix makes its values".to_owned())
}

/// The parts of the one linear op that reads `value`.
fn readers_of(program: &Program, value: Value) -> Result<&[LinearPart], String> {
    let mut readers = program.ops.iter().filter(|op| op.inputs().any(|it| it == value));
    match (readers.next(), readers.next()) {
        (Some(Op::Linear { parts, .. }), None) => Ok(parts),
        (Some(Op::Transform { out, .. }), None) => readers_of(program, *out),
        (Some(op), None) => Err(format!("{} lies behind it", op.kind())),
        _ => Err("its outputs are read elsewhere too".to_owned()),
    }
}
