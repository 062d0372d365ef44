//! Predicts a step on several ranks: bytes, FLOPs and communication, with experts divided by column
//! and by expert, and the time that follows from a machine's roofs.
//!
//! Conventions, in addition to those of [`super::count`]:
//! - Numbers are those of the busiest rank unless they say `mean`. Ranks wait for each other in
//!   every layer. So the expected largest load of a layer counts, not the largest expected load.
//!   Loads come from seeded draws in which every row visits `k` of `E` experts, with all sets
//!   equally likely. The mean number of experts touched on a rank then agrees with `E/n (1 - (1 -
//!   k/E)^b)`. The largest over ranks has no closed form.
//! - A row is copied for each expert that it visits on a rank. The experts' hidden elements and
//!   outputs are written and read once more. With experts by column, every rank does so for all
//!   visits. With whole experts, it does so only for its own visits. If all weights are read
//!   anyway, this makes the difference.
//! - Experts by column are balanced whatever the router does, except for borders at blocks of the
//!   format.

use std::collections::HashMap;
use std::ops::Range;

use lathe_tensor::Format;

use super::{Cost, StepCost, StepShape, count};
use crate::backend::BackendError;
use crate::conformance::Random;
use crate::kv::KvFormat;
use crate::op::*;
use crate::program::Program;
use crate::shard::{ExpertSplit, RankProgram, ShardOptions, shard_fitting};

/// Draws of a batch's routing. The expected largest load is accurate to a few percent.
const DRAWS: usize = 200;
/// Seed of the draws.
const SEED: u64 = 17;

/// The roofs of each rank and of its link.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct RankRoofs {
    /// Memory bandwidth of one rank.
    pub read_gb_s: f64,
    /// Arithmetic rate of one rank.
    pub gflop_s: f64,
    /// Send bandwidth of a rank, while it receives as much.
    pub link_gb_s: f64,
    /// The fixed time of a collective.
    pub link_us: f64,
}

/// Bytes that a rank sends in a step, by kind of collective, with ring algorithms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Communication {
    /// Sums that every rank gets whole: `2 (n - 1) / n` of the values.
    pub all_reduce_bytes: u64,
    /// Sums of which every rank gets a part: `(n - 1) / n` of the values.
    pub reduce_scatter_bytes: u64,
    /// Parts that every rank collects, such as logits: `(n - 1) / n` of the whole.
    pub all_gather_bytes: u64,
    /// Rows that go to their experts' ranks and back.
    pub all_to_all_bytes: u64,
    /// Calls.
    pub collectives: u64,
}

impl Communication {
    /// Bytes of all kinds.
    pub fn bytes(&self) -> u64 {
        self.all_reduce_bytes
            + self.reduce_scatter_bytes
            + self.all_gather_bytes
            + self.all_to_all_bytes
    }

    fn ms(&self, roofs: &RankRoofs) -> f64 {
        self.bytes() as f64 / roofs.link_gb_s / 1e6 + self.collectives as f64 * roofs.link_us / 1e3
    }
}

/// The cost of a step on the busiest rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct RankStep {
    /// Bytes of weights that are read.
    pub weight_bytes: u64,
    /// The mean over ranks.
    pub weight_bytes_mean: u64,
    /// Bytes of the cache that are read and written.
    pub kv_bytes: u64,
    /// Bytes of rows copied for experts, and of their hidden elements and outputs.
    pub moved_bytes: u64,
    /// Operations.
    pub flops: u64,
    /// The mean over ranks.
    pub flops_mean: u64,
    /// The communication of the rank.
    pub communication: Communication,
    /// Distinct experts that a rank reads in a layer, the mean over ranks.
    pub experts_touched_mean: Option<f64>,
    /// The same for the layer's busiest rank.
    pub experts_touched: Option<f64>,
    /// Visits to experts on the layer's busiest rank, relative to the mean over ranks; 1 is even.
    pub imbalance: Option<f64>,
}

impl RankStep {
    /// The least time: the larger of reading and computing, plus communication.
    pub fn ms(&self, roofs: &RankRoofs) -> f64 {
        let bytes = self.weight_bytes + self.kv_bytes + self.moved_bytes;
        let memory = bytes as f64 / roofs.read_gb_s / 1e6;
        memory.max(self.flops as f64 / roofs.gflop_s / 1e6) + self.communication.ms(roofs)
    }
}

/// A model that is divided in one way, ready to predict steps.
pub struct Division<'a> {
    program: &'a Program,
    split: ExpertSplit,
    ranks: usize,
    /// One rank for each set of weight shapes, with the number of ranks that share it.
    kinds: Vec<(RankProgram, u64)>,
    weight_bytes: &'a dyn Fn(Weight) -> u64,
    kv_format: KvFormat,
    /// Loads by experts and experts for each token, then by rows.
    loads: HashMap<(usize, usize), Vec<Load>>,
}

impl<'a> Division<'a> {
    /// Divides `program` as the engine would. `rows_max` is the largest step to predict.
    ///
    /// # Errors
    /// As [`shard_fitting`].
    pub fn new(
        program: &'a Program,
        options: &ShardOptions,
        format_of: &dyn Fn(Weight) -> Result<Format, BackendError>,
        weight_bytes: &'a dyn Fn(Weight) -> u64,
        kv_format: KvFormat,
        rows_max: usize,
    ) -> Result<Self, BackendError> {
        let mut kinds: Vec<(RankProgram, u64)> = Vec::new();
        for rank in shard_fitting(program, options, format_of)? {
            let same = |known: &RankProgram| {
                let shapes = known.program.weights.iter().map(|decl| &decl.shape);
                shapes.eq(rank.program.weights.iter().map(|decl| &decl.shape))
            };
            match kinds.iter_mut().find(|(known, _)| same(known)) {
                Some((_, count)) => *count += 1,
                None => kinds.push((rank, 1)),
            }
        }
        let mut loads = HashMap::new();
        for (experts, per_token) in routers(program) {
            let load = || loads_of(experts, per_token, options.ranks, rows_max);
            loads.entry((experts, per_token)).or_insert_with(load);
        }
        let (split, ranks) = (options.experts, options.ranks);
        Ok(Self { program, split, ranks, kinds, weight_bytes, kv_format, loads })
    }

    /// The predicted cost of a step of `shape`.
    pub fn step(&self, shape: &StepShape) -> RankStep {
        let shape = StepShape { ranks: self.ranks, ..shape.clone() };
        let mut busiest = RankStep::default();
        let (mut weights, mut flops) = (0.0, 0.0);
        for (rank, count_of) in &self.kinds {
            let (step, mean) = self.rank_step(rank, &shape);
            let share = *count_of as f64 / self.ranks as f64;
            weights += mean.weight_bytes as f64 * share;
            flops += mean.flops as f64 * share;
            busiest = RankStep {
                weight_bytes: busiest.weight_bytes.max(step.weight_bytes),
                kv_bytes: busiest.kv_bytes.max(step.kv_bytes),
                moved_bytes: busiest.moved_bytes.max(step.moved_bytes),
                flops: busiest.flops.max(step.flops),
                ..step
            };
        }
        RankStep { weight_bytes_mean: weights as u64, flops_mean: flops as u64, ..busiest }
    }

    /// The communication of the step if rows were divided over the ranks too. Attention's sums
    /// would be scattered, rows would go to their experts' ranks and back, and would be gathered
    /// for the next attention. Shares of rows are rounded up. `None` if ranks do not have whole
    /// experts.
    pub fn exchange(&self, shape: &StepShape) -> Option<Communication> {
        if self.split != ExpertSplit::ByExpert || self.loads.is_empty() {
            return None;
        }
        let mut found = self.step(shape).communication;
        let (n, rows) = (self.ranks as u64, shape.rows() as u64);
        for op in &self.program.ops {
            let Op::Experts { input, routing, .. } = op else { continue };
            let Some((experts, per_token)) = router_of(self.program, *routing) else { continue };
            let row_bytes = 4 * self.program.value_width(*input) as u64;
            let share = rows * row_bytes * (n - 1) / n;
            found.all_reduce_bytes -= (4 * share).min(found.all_reduce_bytes);
            found.reduce_scatter_bytes += share;
            found.all_gather_bytes += share;
            let there = rows.div_ceil(n) as f64 * remote_ranks(experts, per_token, self.ranks);
            found.all_to_all_bytes += (2.0 * there * row_bytes as f64).round() as u64;
            found.collectives += 2;
        }
        Some(found)
    }

    /// The step of one rank, with the loads of the layers' busiest ranks and with mean loads.
    fn rank_step(&self, rank: &RankProgram, shape: &StepShape) -> (RankStep, Cost) {
        let bytes_of = |weight: Weight| {
            let part = &rank.parts[weight.0 as usize];
            let whole: usize = self.program.weight(part.source).shape.iter().product();
            let kept: usize = part.ranges.iter().map(Range::len).product();
            let share = kept as f64 / whole.max(1) as f64;
            ((self.weight_bytes)(part.source) as f64 * share).round() as u64
        };
        let StepCost { ops: costs, total: mean } =
            count(&rank.program, shape, &bytes_of, self.kv_format);
        let mut step = RankStep::default();
        for (op, cost) in rank.program.ops.iter().zip(&costs) {
            step.kv_bytes += cost.kv_read_bytes + cost.kv_write_bytes;
            step.communication.add(op, cost, shape);
            match op {
                Op::Experts { .. } => self.add_experts(&mut step, &rank.program, op, cost, shape),
                _ => {
                    step.weight_bytes += cost.weight_bytes;
                    step.flops += cost.flops;
                }
            }
        }
        (step, mean)
    }

    fn add_experts(
        &self,
        step: &mut RankStep,
        program: &Program,
        op: &Op,
        cost: &Cost,
        shape: &StepShape,
    ) {
        let Op::Experts { input, routing, spec, out } = op else { return };
        let Some(router) = router_of(program, *routing) else { return };
        let rows = shape.rows();
        let load = self.loads[&router][rows - 1];
        let (experts, per_token) = (router.0 as f64, router.1 as f64);
        // Removes what the counter assumed: the rank's part of the experts and an even load.
        let here = spec.experts as f64;
        let even_visits = rows as f64 * per_token * here / experts;
        let even_touched = here * (1.0 - (1.0 - per_token / experts).powf(rows as f64));
        let (visits, touched) = match self.split {
            ExpertSplit::ByColumn => (even_visits, even_touched),
            ExpertSplit::ByExpert => (load.visits, load.touched),
        };
        step.weight_bytes += (cost.weight_bytes as f64 * touched / even_touched).round() as u64;
        step.flops += (cost.flops as f64 * visits / even_visits).round() as u64;
        let [input, out] = [*input, *out].map(|value| program.value_width(value));
        let floats = input + 3 * spec.hidden + out;
        step.moved_bytes += (visits * (4 * floats) as f64).round() as u64;
        let (mean_touched, mean_visits) = match self.split {
            ExpertSplit::ByColumn => (even_touched, even_visits),
            ExpertSplit::ByExpert => {
                (load.touched_mean, rows as f64 * per_token / self.ranks as f64)
            }
        };
        // Layers are mostly alike, so the last one is reported.
        step.experts_touched_mean = Some(mean_touched);
        step.experts_touched = Some(touched);
        step.imbalance = Some(visits / mean_visits);
    }
}

impl Communication {
    fn add(&mut self, op: &Op, cost: &Cost, shape: &StepShape) {
        match op {
            Op::AllReduce { .. } => self.all_reduce_bytes += cost.communication_bytes,
            Op::AllGather { .. } => self.all_gather_bytes += cost.communication_bytes,
            Op::Logits { gather: true, .. } if shape.logits_rows > 0 => {
                self.all_gather_bytes += cost.communication_bytes;
            }
            _ => return,
        }
        self.collectives += 1;
    }
}

/// Experts and experts a token of every router.
fn routers(program: &Program) -> impl Iterator<Item = (usize, usize)> + '_ {
    program.ops.iter().filter_map(|op| match op {
        Op::Route { spec, .. } => Some((spec.experts, spec.experts_per_token)),
        _ => None,
    })
}

fn router_of(program: &Program, routing: Routing) -> Option<(usize, usize)> {
    program.ops.iter().find_map(|op| match op {
        Op::Route { spec, out, .. } if *out == routing => {
            Some((spec.experts, spec.experts_per_token))
        }
        _ => None,
    })
}

/// The expected loads of a layer for some number of rows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Load {
    /// The mean over ranks of the experts that are touched.
    touched_mean: f64,
    /// Experts on the rank that touches most.
    touched: f64,
    /// Visits on the rank with the most visits.
    visits: f64,
}

/// Loads for 1 to `rows_max` rows. The draws for more rows continue those for fewer.
fn loads_of(experts: usize, per_token: usize, ranks: usize, rows_max: usize) -> Vec<Load> {
    let mut random = Random::new(SEED);
    let mut loads = vec![Load::default(); rows_max];
    // The engine's division: borders at multiples of experts / ranks, rounded down.
    let rank_of: Vec<usize> = (0..ranks)
        .flat_map(|rank| {
            let part = experts * rank / ranks..experts * (rank + 1) / ranks;
            part.map(move |_| rank)
        })
        .collect();
    let mut order: Vec<usize> = (0..experts).collect();
    for _ in 0..DRAWS {
        let mut seen = vec![false; experts];
        let (mut touched, mut visits) = (vec![0usize; ranks], vec![0usize; ranks]);
        for load in &mut loads {
            for place in 0..per_token {
                order.swap(place, place + random.below(experts - place));
                let expert = order[place];
                visits[rank_of[expert]] += 1;
                touched[rank_of[expert]] +=
                    usize::from(!std::mem::replace(&mut seen[expert], true));
            }
            load.touched_mean += touched.iter().sum::<usize>() as f64 / ranks as f64;
            load.touched += touched.iter().max().copied().unwrap_or(0) as f64;
            load.visits += visits.iter().max().copied().unwrap_or(0) as f64;
        }
    }
    for load in &mut loads {
        let mean = |sum: f64| sum / DRAWS as f64;
        let Load { touched_mean, touched, visits } = *load;
        *load =
            Load { touched_mean: mean(touched_mean), touched: mean(touched), visits: mean(visits) };
    }
    loads
}

/// The mean number of ranks, other than a row's own, that have its experts.
fn remote_ranks(experts: usize, per_token: usize, ranks: usize) -> f64 {
    let visited = |rank: usize| {
        let here = experts * (rank + 1) / ranks - experts * rank / ranks;
        let missed = (0..per_token)
            .map(|i| (experts - here).saturating_sub(i) as f64 / (experts - i) as f64);
        1.0 - missed.product::<f64>()
    };
    let all: f64 = (0..ranks).map(visited).sum();
    all * (ranks - 1) as f64 / ranks as f64
}

/// The first batch from which the strategy that wins at the largest batch always wins, if another
/// wins at 1. `wins[i]` is the winner at batch `i + 1`.
pub fn crossover<W: PartialEq>(wins: &[W]) -> Option<usize> {
    let last = wins.last()?;
    if wins.first() == Some(last) {
        return None;
    }
    wins.iter().rposition(|win| win != last).map(|index| index + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_agree_with_the_formula() {
        for (experts, per_token, ranks) in [(64, 6, 2), (8, 2, 4), (128, 8, 8)] {
            let loads = loads_of(experts, per_token, ranks, 64);
            for rows in [1, 2, 7, 64] {
                let load = loads[rows - 1];
                let (e, k) = (experts as f64, per_token as f64);
                let expected = e / ranks as f64 * (1.0 - (1.0 - k / e).powf(rows as f64));
                let off = (load.touched_mean / expected - 1.0).abs();
                assert!(off < 0.03, "{experts} {per_token} {ranks} {rows}: {load:?} {expected}");
                assert!(load.touched >= load.touched_mean);
                assert!(load.touched <= e / ranks as f64);
                assert!(load.visits >= rows as f64 * k / ranks as f64);
            }
        }
    }

    #[test]
    fn one_row_of_two_experts_on_two_ranks_by_hand() {
        // Of 4 experts, each rank has 2. Both chosen experts are on one rank in 2 of 6 cases, and
        // on different ranks in 4.
        let load = loads_of(4, 2, 2, 1)[0];
        assert!((load.touched - (2.0 * 2.0 + 4.0 * 1.0) / 6.0).abs() < 0.1, "{load:?}");
        assert_eq!(load.touched_mean, 1.0);
        // In 5 of 6 cases at least one of a row's experts is on the other rank.
        assert!((remote_ranks(4, 2, 2) - 5.0 / 6.0).abs() < 1e-12);
        // If every expert is chosen, all other ranks are needed.
        assert!((remote_ranks(8, 8, 4) - 3.0).abs() < 1e-12);
    }

    #[test]
    fn crossovers() {
        assert_eq!(crossover(&["a", "a", "b", "b"]), Some(3));
        assert_eq!(crossover(&["a", "b", "a", "b", "b"]), Some(4));
        assert_eq!(crossover(&["a", "b", "a"]), None);
        assert_eq!(crossover(&["a"]), None);
        assert_eq!(crossover::<bool>(&[]), None);
    }
}
