//! Attention over the paged cache, with separate keys and values or with latents.

use rayon::prelude::*;

use super::LatentForm;
use super::cache::Cache;
use super::math::{dot, matmul, softcap};
use crate::op::{AttendSpec, KvLayer, LatentSpec};
use crate::step::{Step, StepSequence};
use crate::tables::SequenceTables;

/// The rows of `step`, each with its sequence's index and its place in the sequence.
fn rows(step: &Step) -> Vec<(usize, usize)> {
    let of = |(index, sequence): (usize, &StepSequence)| {
        (0..sequence.rows as usize).map(move |i| (index, i))
    };
    step.sequences.iter().enumerate().flat_map(of).collect()
}

/// The slots that row `i` of `sequence` sees, ascending.
fn visible(step: &Step, sequence: &StepSequence, i: usize, window: Option<usize>) -> Vec<usize> {
    let (first, cached) = (sequence.first_row as usize, sequence.cached as usize);
    let position = step.positions[first + i] as usize;
    let inside = |other: usize| window.is_none_or(|window| other + window > position);
    match &sequence.ancestors {
        None => (0..=cached + i).filter(|slot| inside(*slot)).collect(),
        Some(ancestors) => {
            let before = (0..cached).filter(|slot| inside(*slot));
            let rows = (0..sequence.rows as usize).filter(|j| {
                ancestors[i] >> j & 1 == 1 && inside(step.positions[first + j] as usize)
            });
            before.chain(rows.map(|j| cached + j)).collect()
        }
    }
}

/// `exp(score - max) / sum`, in place; a sink joins the maximum and the sum.
fn softmax(scores: &mut [f32], sink: Option<f32>) {
    let most = scores.iter().copied().fold(sink.unwrap_or(f32::NEG_INFINITY), f32::max);
    let mut sum = sink.map_or(0.0, |sink| f64::from(sink - most).exp());
    for score in scores.iter_mut() {
        *score = (*score - most).exp();
        sum += f64::from(*score);
    }
    let inverse = (1.0 / sum) as f32;
    scores.iter_mut().for_each(|score| *score *= inverse);
}

/// The rows of a step, with the tables and the cache that they see.
#[derive(Clone, Copy)]
pub(super) struct Seen<'a> {
    pub(super) step: &'a Step,
    pub(super) tables: &'a SequenceTables,
    pub(super) cache: &'a Cache,
}

pub(super) fn attend(
    Seen { step, tables, cache }: Seen<'_>,
    layer: KvLayer,
    group: usize,
    spec: &AttendSpec,
    sinks: Option<&[f32]>,
    query: &[f32],
) -> Vec<f32> {
    let AttendSpec { heads, kv_heads, head_dim, value_dim, .. } = *spec;
    let rows = rows(step);
    let mut out = vec![0f32; rows.len() * heads * value_dim];
    let work = out.par_chunks_mut(heads * value_dim).zip(query.par_chunks(heads * head_dim));
    work.zip(&rows).for_each(|((out, query), (index, i))| {
        let sequence = &step.sequences[*index];
        let table = tables.table(sequence.id, group);
        let slots = visible(step, sequence, *i, spec.window);
        let tokens: Vec<(&[f32], &[f32])> =
            slots.iter().map(|slot| cache.read(layer, table, *slot)).collect();
        for (head, out) in out.chunks_exact_mut(value_dim).enumerate() {
            let kv_head = head / (heads / kv_heads);
            let query = &query[head * head_dim..(head + 1) * head_dim];
            let key = |token: &(&[f32], &[f32])| {
                let key = &token.0[kv_head * head_dim..(kv_head + 1) * head_dim];
                softcap(spec.softcap, dot(query, key) * spec.scale)
            };
            let mut scores: Vec<f32> = tokens.iter().map(key).collect();
            softmax(&mut scores, sinks.map(|sinks| sinks[head]));
            for (score, token) in scores.iter().zip(&tokens) {
                let value = &token.1[kv_head * value_dim..(kv_head + 1) * value_dim];
                add_scaled(out, *score, value);
            }
        }
    });
    out
}

/// The weights of a latent attention.
pub(super) struct LatentWeights<'a> {
    pub(super) key_up: &'a [f32],
    pub(super) value_up: &'a [f32],
}

pub(super) fn attend_latent(
    seen: Seen<'_>,
    layer: KvLayer,
    group: usize,
    spec: &LatentSpec,
    weights: &LatentWeights<'_>,
    query: &[f32],
    form: LatentForm,
) -> Vec<f32> {
    let latent = Latent { seen, layer, group, spec, weights };
    match form {
        LatentForm::Expanded => latent.expanded(query),
        LatentForm::Absorbed => latent.absorbed(query),
    }
}

struct Latent<'a> {
    seen: Seen<'a>,
    layer: KvLayer,
    group: usize,
    spec: &'a LatentSpec,
    weights: &'a LatentWeights<'a>,
}

impl Latent<'_> {
    fn query_dim(&self) -> usize {
        self.spec.nope_dim + self.spec.rope_dim
    }

    /// Makes keys and values of all heads from the latents, once for all rows of a sequence.
    fn expanded(&self, query: &[f32]) -> Vec<f32> {
        let LatentSpec { heads, rank, nope_dim, value_dim, .. } = *self.spec;
        let width = heads * self.query_dim();
        let mut out = vec![0f32; query.len() / width * heads * value_dim];
        let Seen { step, tables, cache } = self.seen;
        for sequence in &step.sequences {
            let first_slot = visible(step, sequence, 0, self.spec.window)[0];
            let slots = first_slot..sequence.slots_end();
            let table = tables.table(sequence.id, self.group);
            let read = |slot| cache.read(self.layer, table, slot);
            let latents: Vec<f32> = slots.clone().flat_map(|slot| read(slot).0.to_vec()).collect();
            let keys = matmul(self.weights.key_up, None, &latents, rank);
            let values = matmul(self.weights.value_up, None, &latents, rank);
            let (first, rows) = (sequence.first_row as usize, sequence.rows as usize);
            let out = &mut out[first * heads * value_dim..(first + rows) * heads * value_dim];
            out.par_chunks_mut(heads * value_dim).enumerate().for_each(|(i, out)| {
                let query = &query[(first + i) * width..(first + i + 1) * width];
                let slots = visible(step, sequence, i, self.spec.window);
                for (head, out) in out.chunks_exact_mut(value_dim).enumerate() {
                    let query = &query[head * self.query_dim()..(head + 1) * self.query_dim()];
                    let (nope, rope) = query.split_at(nope_dim);
                    let score = |slot: &usize| {
                        let at = ((slot - first_slot) * heads + head) * nope_dim;
                        dot(nope, &keys[at..at + nope_dim]) + dot(rope, read(*slot).1)
                    };
                    let mut scores: Vec<f32> = slots.iter().map(score).collect();
                    self.soften(&mut scores);
                    for (score, slot) in scores.iter().zip(&slots) {
                        let at = ((slot - first_slot) * heads + head) * value_dim;
                        add_scaled(out, *score, &values[at..at + value_dim]);
                    }
                }
            });
        }
        out
    }

    /// `q . (K c) = (K^T q) . c`: each head attends to the latents themselves.
    fn absorbed(&self, query: &[f32]) -> Vec<f32> {
        let LatentSpec { heads, rank, nope_dim, value_dim, .. } = *self.spec;
        let Seen { step, tables, cache } = self.seen;
        let rows = rows(step);
        let mut out = vec![0f32; rows.len() * heads * value_dim];
        let work = out.par_chunks_mut(heads * value_dim);
        let work = work.zip(query.par_chunks(heads * self.query_dim())).zip(&rows);
        work.for_each(|((out, query), (index, i))| {
            let sequence = &step.sequences[*index];
            let table = tables.table(sequence.id, self.group);
            let slots = visible(step, sequence, *i, self.spec.window);
            let tokens: Vec<(&[f32], &[f32])> =
                slots.iter().map(|slot| cache.read(self.layer, table, *slot)).collect();
            for (head, out) in out.chunks_exact_mut(value_dim).enumerate() {
                let query = &query[head * self.query_dim()..(head + 1) * self.query_dim()];
                let (nope, rope) = query.split_at(nope_dim);
                let key_up = &self.weights.key_up[head * nope_dim * rank..];
                let mut turned = vec![0f32; rank];
                for (element, row) in nope.iter().zip(key_up.chunks_exact(rank)) {
                    add_scaled(&mut turned, *element, row);
                }
                let score = |token: &(&[f32], &[f32])| dot(&turned, token.0) + dot(rope, token.1);
                let mut scores: Vec<f32> = tokens.iter().map(score).collect();
                self.soften(&mut scores);
                let mut mixed = vec![0f32; rank];
                for (score, token) in scores.iter().zip(&tokens) {
                    add_scaled(&mut mixed, *score, token.0);
                }
                let value_up = &self.weights.value_up[head * value_dim * rank..];
                for (out, row) in out.iter_mut().zip(value_up.chunks_exact(rank)) {
                    *out = dot(&mixed, row);
                }
            }
        });
        out
    }

    fn soften(&self, scores: &mut [f32]) {
        for score in scores.iter_mut() {
            *score = softcap(self.spec.softcap, *score * self.spec.scale);
        }
        softmax(scores, None);
    }
}

fn add_scaled(out: &mut [f32], scale: f32, values: &[f32]) {
    out.iter_mut().zip(values).for_each(|(out, value)| *out += scale * value);
}
