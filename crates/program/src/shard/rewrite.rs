//! Writes one rank's program, op by op.

use std::collections::HashMap;
use std::ops::Range;

use super::wishes::{Columns, Wishes, head_split, is_even, kv_heads_of, scaled};
use super::{ExpertSplit, RankProgram, ShardOptions, WeightPart, partition};
use crate::builder::{LinearSpec, ProgramBuilder};
use crate::collective::vocabulary_part;
use crate::kv::{KvLayerShape, KvLayout};
use crate::op::*;
use crate::program::Program;
use crate::transform::InputTransform;

/// The form of a value of the whole program on the ranks.
#[derive(Debug, Clone, PartialEq)]
enum Place {
    /// Every rank has the whole value.
    Whole,
    /// Each rank has its columns.
    Columns(Columns),
    /// Each rank has a summand. The value is the sum over all ranks.
    Partial,
}

pub(super) fn rewrite(
    program: &Program,
    options: &ShardOptions,
    wishes: &Wishes,
    rank: usize,
) -> Result<RankProgram, String> {
    let kv = rank_layout(program, options.ranks, rank)?;
    let builder = ProgramBuilder::with_layout(program.vocabulary, program.context_max, kv);
    let mut writer = Writer {
        program,
        options,
        wishes,
        rank,
        builder,
        places: HashMap::new(),
        routings: HashMap::new(),
        parts: Vec::new(),
    };
    for op in &program.ops {
        writer.write(op)?;
    }
    Ok(RankProgram { program: writer.builder.finish(), parts: writer.parts })
}

/// The same groups and slots, because steps name blocks by group, with this rank's KV heads.
fn rank_layout(program: &Program, ranks: usize, rank: usize) -> Result<KvLayout, String> {
    let mut layout = program.kv.clone();
    for (index, decl) in layout.layers.iter_mut().enumerate() {
        if let KvLayerShape::Heads { kv_heads, .. } = &mut decl.shape {
            *kv_heads = kv_heads_of(program, KvLayer(index as u32), ranks)?[rank].len();
        }
    }
    Ok(layout)
}

/// Whether no rank's part of a row depends on the part of another.
fn cuts_at_borders(transform: &InputTransform, columns: &[Range<usize>]) -> bool {
    let at_border = |unit: usize, part: &Range<usize>| {
        part.start.is_multiple_of(unit) && part.end.is_multiple_of(unit)
    };
    transform.unit().is_some_and(|unit| columns.iter().all(|part| at_border(unit, part)))
}

struct Writer<'a> {
    program: &'a Program,
    options: &'a ShardOptions,
    wishes: &'a Wishes,
    rank: usize,
    builder: ProgramBuilder,
    places: HashMap<Value, (Value, Place)>,
    routings: HashMap<Routing, Routing>,
    parts: Vec<WeightPart>,
}

impl Writer<'_> {
    fn write(&mut self, op: &Op) -> Result<(), String> {
        match op {
            Op::Embed { table, multiplier, out, .. } => self.embed(*table, *multiplier, *out),
            Op::Input { input, out } => self.input(*input, *out),
            Op::Norm { .. } => self.norm(op),
            Op::Linear { input, parts } => self.linear(*input, parts),
            Op::Transform { input, transform, out } => self.transform(*input, transform, *out),
            Op::Rope { input, heads, offset, rope, out } => {
                let head = self.program.value_width(*input) / heads;
                let table = self.program.ropes[rope.0 as usize].clone();
                let rope = self.builder.rope_table(table);
                let (value, place) = self.settled(*input)?;
                let heads = self.builder.width(value) / head;
                let name = self.name(*out);
                let made = self.builder.rope(value, heads, *offset, rope, name);
                self.place(*out, made, place)
            }
            Op::WriteKv { key, value, layer } => {
                let heads = kv_heads_of(self.program, *layer, self.options.ranks)?;
                let [(_, key_dim), (_, value_dim)] = self.program.kv.layer(*layer).shape.vectors();
                let key = self.columns(*key, &scaled(&heads, key_dim))?;
                let value = self.columns(*value, &scaled(&heads, value_dim))?;
                self.builder.write_kv(key, value, *layer);
                Ok(())
            }
            Op::Attend { query, layer, spec, out } => self.attend(*query, *layer, spec, *out),
            Op::WriteLatent { latent, rope_key, layer } => {
                let (latent, rope_key) = (self.whole(*latent)?, self.whole(*rope_key)?);
                self.builder.write_latent(latent, rope_key, *layer);
                Ok(())
            }
            Op::AttendLatent { query, layer, spec, out } => {
                self.attend_latent(*query, *layer, spec, *out)
            }
            Op::Activate { gate, up, kind, out } => self.activate(*gate, *up, *kind, *out),
            Op::Route { input, spec, out } => {
                let input = self.whole(*input)?;
                let weight = self.whole_weight(spec.weight);
                let [bias, correction] =
                    [spec.bias, spec.correction].map(|w| w.map(|w| self.whole_weight(w)));
                let spec = RouterSpec { weight, bias, correction, ..spec.clone() };
                let routing = self.builder.route(input, spec);
                self.routings.insert(*out, routing);
                Ok(())
            }
            Op::Experts { input, routing, spec, out } => self.experts(*input, *routing, spec, *out),
            Op::Add { left, right, scale, out } => self.add(*left, *right, *scale, *out),
            Op::Gate { input, gate, kind, out } => self.gate(*input, *gate, *kind, *out),
            Op::Slice { input, start, out } => {
                let (input, width) = (self.whole(*input)?, self.program.value_width(*out));
                let name = self.name(*out);
                let made = self.builder.slice(input, *start, width, name);
                self.place(*out, made, Place::Whole)
            }
            Op::Logits { input, head, scale, softcap, .. } => {
                self.logits(*input, *head, *scale, *softcap)
            }
            Op::Capture { input, tap } => {
                let input = self.whole(*input)?;
                self.builder.capture(input, *tap);
                Ok(())
            }
            Op::AllReduce { .. } | Op::AllGather { .. } => {
                Err("the program is divided already".to_owned())
            }
        }
    }

    fn name(&self, value: Value) -> String {
        self.program.values[value.0 as usize].name.clone()
    }

    /// Records the form of `value`. If a whole value is wanted in columns, it is cut at once, so
    /// that the ops after it work on the rank's columns only.
    fn place(&mut self, value: Value, made: Value, place: Place) -> Result<(), String> {
        self.places.insert(value, (made, place.clone()));
        match self.wishes.get(value).cloned() {
            Some(wish) if place == Place::Whole => {
                let made = self.columns(value, &wish)?;
                self.places.insert(value, (made, Place::Columns(wish)));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn at(&self, value: Value) -> (Value, Place) {
        self.places[&value].clone()
    }

    /// The whole of `value`, summed or gathered if necessary.
    fn whole(&mut self, value: Value) -> Result<Value, String> {
        let (made, place) = self.at(value);
        let whole = match place {
            Place::Whole => return Ok(made),
            Place::Partial => {
                let name = format!("{}.sum", self.name(value));
                self.builder.all_reduce(made, name)
            }
            Place::Columns(columns) => {
                let width = self.program.value_width(value);
                let name = self.name(value);
                if !is_even(&columns, width) {
                    return Err(format!("{name} is needed whole, its parts are not even"));
                }
                let out = self.builder.value(format!("{name}.gathered"), width);
                self.builder.push(Op::AllGather { input: made, out });
                out
            }
        };
        self.places.insert(value, (whole, Place::Whole));
        Ok(whole)
    }

    /// This rank's columns of `value`.
    fn columns(&mut self, value: Value, columns: &Columns) -> Result<Value, String> {
        let (made, place) = self.at(value);
        if place == Place::Columns(columns.clone()) {
            return Ok(made);
        }
        let whole = self.whole(value)?;
        let part = &columns[self.rank];
        let name = format!("{}.part", self.name(value));
        Ok(self.builder.slice(whole, part.start, part.len(), name))
    }

    /// `value` as a whole or in columns. A partial value is summed first.
    fn settled(&mut self, value: Value) -> Result<(Value, Place), String> {
        if self.at(value).1 == Place::Partial {
            self.whole(value)?;
        }
        Ok(self.at(value))
    }

    /// Declares the part `ranges` of `weight`.
    fn weight(&mut self, weight: Weight, ranges: Vec<Range<usize>>) -> Weight {
        let decl = self.program.weight(weight).clone();
        let shape: Vec<usize> = ranges.iter().map(Range::len).collect();
        let part = self.builder.weight(decl.name, &shape, decl.role, decl.layer);
        let cut = WeightPart { source: weight, ranges };
        match self.parts.get(part.0 as usize) {
            None => self.parts.push(cut),
            Some(known) => assert_eq!(known, &cut, "one weight is cut in two ways"),
        }
        part
    }

    fn whole_weight(&mut self, weight: Weight) -> Weight {
        let ranges = self.program.weight(weight).shape.iter().map(|n| 0..*n).collect();
        self.weight(weight, ranges)
    }

    /// The part `range` of dimension `dimension`, with all other dimensions whole.
    fn weight_part(&mut self, weight: Weight, dimension: usize, range: &Range<usize>) -> Weight {
        let shape = &self.program.weight(weight).shape;
        let mut ranges: Vec<Range<usize>> = shape.iter().map(|n| 0..*n).collect();
        ranges[dimension] = range.clone();
        self.weight(weight, ranges)
    }

    /// The rows of the vocabulary of each rank. All parts are equal except the last, as gathering
    /// requires.
    fn vocabulary_part(&self, rows: usize) -> Result<Range<usize>, String> {
        let ranks = self.options.ranks;
        // The last rank has the fewest rows.
        if vocabulary_part(rows, ranks - 1, ranks).is_empty() {
            return Err(format!("{rows} tokens leave a rank without"));
        }
        Ok(vocabulary_part(rows, self.rank, ranks))
    }

    fn input(&mut self, input: u32, out: Value) -> Result<(), String> {
        let made = self.builder.value(self.name(out), self.program.value_width(out));
        self.builder.push(Op::Input { input, out: made });
        self.place(out, made, Place::Whole)
    }

    fn embed(&mut self, table: Weight, multiplier: f32, out: Value) -> Result<(), String> {
        let name = self.name(out);
        if !self.options.vocabulary || self.options.ranks == 1 {
            let table = self.whole_weight(table);
            let made = self.builder.embed(table, multiplier, name);
            return self.place(out, made, Place::Whole);
        }
        let rows = self.vocabulary_part(self.program.weight(table).shape[0])?;
        let table = self.weight_part(table, 0, &rows);
        let made = self.builder.value(name, self.program.value_width(out));
        let first_token = rows.start as u32;
        self.builder.push(Op::Embed { table, first_token, multiplier, out: made });
        self.place(out, made, Place::Partial)
    }

    fn norm(&mut self, op: &Op) -> Result<(), String> {
        let Op::Norm { input, weight, bias, kind, epsilon, groups, out } = op else {
            unreachable!("called for norms")
        };
        let width = self.program.value_width(*input);
        let (mut value, mut place) = self.settled(*input)?;
        if *groups == 1 && place != Place::Whole {
            (value, place) = (self.whole(*input)?, Place::Whole);
        }
        let columns = match &place {
            Place::Columns(columns) => columns[self.rank].clone(),
            _ => 0..width,
        };
        let local_groups = columns.len() / (width / groups);
        let [weight, bias] = [*weight, *bias].map(|vector| {
            let vector = vector?;
            // A weight for each element of the row is cut with the row. A weight for each element
            // of a group is not.
            let is_wide = self.program.weight(vector).shape[0] == width;
            Some(match is_wide {
                true => self.weight_part(vector, 0, &columns),
                false => self.whole_weight(vector),
            })
        });
        let name = self.name(*out);
        let made = self.builder.norm(value, weight, bias, *kind, *epsilon, local_groups, name);
        self.place(*out, made, place)
    }

    fn linear(&mut self, input: Value, parts: &[LinearPart]) -> Result<(), String> {
        // The product of a partial value is partial too, and joins a later sum that is needed
        // anyway.
        let stays = parts.iter().all(|part| self.wishes.get(part.out).is_none());
        let (value, place) = if stays { self.at(input) } else { self.settled(input)? };
        let mut specs = Vec::new();
        let mut places = Vec::new();
        for part in parts {
            let name = self.name(part.out);
            let (weight, bias, made) = match (&place, self.wishes.get(part.out).cloned()) {
                (Place::Columns(columns), _) => {
                    let weight = self.weight_part(part.weight, 1, &columns[self.rank].clone());
                    (weight, self.on_first_rank(part.bias), Place::Partial)
                }
                (Place::Partial, _) => {
                    let bias = self.on_first_rank(part.bias);
                    (self.whole_weight(part.weight), bias, Place::Partial)
                }
                (_, Some(wish)) => {
                    let rows = wish[self.rank].clone();
                    let weight = self.weight_part(part.weight, 0, &rows);
                    let bias = part.bias.map(|bias| self.weight_part(bias, 0, &rows));
                    (weight, bias, Place::Columns(wish))
                }
                (_, None) => {
                    let bias = part.bias.map(|bias| self.whole_weight(bias));
                    (self.whole_weight(part.weight), bias, Place::Whole)
                }
            };
            specs.push(LinearSpec::new(weight, name).bias(bias));
            places.push(made);
        }
        let outs = self.builder.linear(value, specs);
        for ((part, out), place) in parts.iter().zip(outs).zip(places) {
            self.place(part.out, out, place)?;
        }
        Ok(())
    }

    /// Columns stay columns. If a rank's part depends on another's, the whole row is transformed.
    fn transform(
        &mut self,
        input: Value,
        transform: &InputTransform,
        out: Value,
    ) -> Result<(), String> {
        let (value, place) = self.settled(input)?;
        let name = self.name(out);
        let columns = match &place {
            Place::Columns(columns) if !cuts_at_borders(transform, columns) => columns.clone(),
            _ => {
                let made = self.builder.transform(value, *transform, name);
                return self.place(out, made, place);
            }
        };
        let whole = self.whole(input)?;
        let whole = self.builder.transform(whole, *transform, format!("{name}.whole"));
        let part = columns[self.rank].clone();
        let made = self.builder.slice(whole, part.start, part.len(), name);
        self.place(out, made, Place::Columns(columns))
    }

    /// A bias that is added once to a sum over ranks: on the first rank only.
    fn on_first_rank(&mut self, bias: Option<Weight>) -> Option<Weight> {
        bias.filter(|_| self.rank == 0).map(|bias| self.whole_weight(bias))
    }

    fn attend(
        &mut self,
        query: Value,
        layer: KvLayer,
        spec: &AttendSpec,
        out: Value,
    ) -> Result<(), String> {
        let (heads, kv_heads) = head_split(spec.heads, spec.kv_heads, self.options.ranks)?;
        let query = self.columns(query, &scaled(&heads, spec.head_dim))?;
        let local = heads[self.rank].clone();
        let local_spec = AttendSpec {
            heads: local.len(),
            kv_heads: kv_heads[self.rank].len(),
            sinks: spec.sinks.map(|sinks| self.weight_part(sinks, 0, &local)),
            ..spec.clone()
        };
        let name = self.name(out);
        let made = self.builder.attend(query, layer, local_spec, name);
        self.place(out, made, Place::Columns(scaled(&heads, spec.value_dim)))
    }

    fn attend_latent(
        &mut self,
        query: Value,
        layer: KvLayer,
        spec: &LatentSpec,
        out: Value,
    ) -> Result<(), String> {
        let (heads, _) = head_split(spec.heads, spec.heads, self.options.ranks)?;
        let query = self.columns(query, &scaled(&heads, spec.nope_dim + spec.rope_dim))?;
        let rows = |width: usize| scaled(&heads, width)[self.rank].clone();
        let (key_rows, value_rows) = (rows(spec.nope_dim), rows(spec.value_dim));
        let local_spec = LatentSpec {
            heads: heads[self.rank].len(),
            key_up: self.weight_part(spec.key_up, 0, &key_rows),
            value_up: self.weight_part(spec.value_up, 0, &value_rows),
            ..spec.clone()
        };
        let name = self.name(out);
        let made = self.builder.attend_latent(query, layer, local_spec, name);
        self.place(out, made, Place::Columns(scaled(&heads, spec.value_dim)))
    }

    fn activate(
        &mut self,
        gate: Value,
        up: Option<Value>,
        kind: Activation,
        out: Value,
    ) -> Result<(), String> {
        let (gate, place) = self.settled(gate)?;
        let up = match (&place, up) {
            (_, None) => None,
            (Place::Columns(columns), Some(up)) => Some(self.columns(up, columns)?),
            (_, Some(up)) => Some(self.whole(up)?),
        };
        let name = self.name(out);
        let made = self.builder.activate(gate, up, kind, name);
        self.place(out, made, place)
    }

    fn experts(
        &mut self,
        input: Value,
        routing: Routing,
        spec: &ExpertsSpec,
        out: Value,
    ) -> Result<(), String> {
        let input = self.whole(input)?;
        let ranks = self.options.ranks;
        let local = match self.options.experts {
            ExpertSplit::ByExpert => {
                let part = &partition("experts", spec.experts, ranks, 1)?[self.rank];
                let mut cut = |weight| self.weight_part(weight, 0, part);
                ExpertsSpec {
                    experts: part.len(),
                    first_expert: spec.first_expert + part.start,
                    gate: cut(spec.gate),
                    up: cut(spec.up),
                    down: cut(spec.down),
                    gate_bias: spec.gate_bias.map(&mut cut),
                    up_bias: spec.up_bias.map(&mut cut),
                    down_bias: spec.down_bias.map(&mut cut),
                    ..spec.clone()
                }
            }
            ExpertSplit::ByColumn => {
                let (hidden, alignment) = (spec.hidden, self.options.alignment);
                let columns = partition("hidden elements", hidden, ranks, alignment)?;
                if !cuts_at_borders(&spec.hidden_transform, &columns) {
                    let transform = spec.hidden_transform;
                    return Err(format!("{transform} of experts' {hidden} hidden elements"));
                }
                let part = &columns[self.rank];
                ExpertsSpec {
                    hidden: part.len(),
                    gate: self.weight_part(spec.gate, 1, part),
                    up: self.weight_part(spec.up, 1, part),
                    down: self.weight_part(spec.down, 2, part),
                    gate_bias: spec.gate_bias.map(|bias| self.weight_part(bias, 1, part)),
                    up_bias: spec.up_bias.map(|bias| self.weight_part(bias, 1, part)),
                    down_bias: self.on_first_rank(spec.down_bias),
                    ..spec.clone()
                }
            }
        };
        let name = self.name(out);
        let made = self.builder.experts(input, self.routings[&routing], local, name);
        self.place(out, made, Place::Partial)
    }

    /// Partial values stay partial, and columns stay columns. Anything else is made whole.
    fn add(&mut self, left: Value, right: Value, scale: f32, out: Value) -> Result<(), String> {
        let ((_, left_place), (_, right_place)) = (self.at(left), self.at(right));
        let place = if left_place == right_place { left_place } else { Place::Whole };
        if place == Place::Whole {
            self.whole(left)?;
            self.whole(right)?;
        }
        let ((left, _), (right, _)) = (self.at(left), self.at(right));
        let name = self.name(out);
        let made = self.builder.add(left, right, scale, name);
        self.place(out, made, place)
    }

    fn gate(
        &mut self,
        input: Value,
        gate: Value,
        kind: GateKind,
        out: Value,
    ) -> Result<(), String> {
        let (mut value, mut place) = self.at(input);
        let run = self.program.value_width(input) / self.program.value_width(gate);
        let gate = match &place {
            Place::Columns(columns) => {
                let at_run = |part: &Range<usize>| {
                    part.start.is_multiple_of(run) && part.end.is_multiple_of(run)
                };
                if columns.iter().all(at_run) {
                    let parts = columns.iter().map(|part| part.start / run..part.end / run);
                    self.columns(gate, &parts.collect())?
                } else if self.program.value_width(gate) == 1 {
                    self.whole(gate)?
                } else {
                    (value, place) = (self.whole(input)?, Place::Whole);
                    self.whole(gate)?
                }
            }
            _ => self.whole(gate)?,
        };
        let name = self.name(out);
        let made = self.builder.gate(value, gate, kind, name);
        self.place(out, made, place)
    }

    fn logits(
        &mut self,
        input: Value,
        head: Weight,
        scale: f32,
        softcap: Option<f32>,
    ) -> Result<(), String> {
        let input = self.whole(input)?;
        let gather = self.options.vocabulary && self.options.ranks > 1;
        let head = if gather {
            let rows = self.vocabulary_part(self.program.vocabulary)?;
            self.weight_part(head, 0, &rows)
        } else {
            self.whole_weight(head)
        };
        self.builder.push(Op::Logits { input, head, gather, scale, softcap });
        Ok(())
    }
}
