//! `lathe inspect --tensor-parallel N`: the time of a step on each of N ranks. Compares experts
//! divided by column with experts divided by expert, and shows the batch from which the other is
//! faster.

use anyhow::Error;
use lathe_program::cost::StepShape;
use lathe_program::cost::parallel::{Communication, Division, RankRoofs, RankStep, crossover};
use lathe_program::shard::{ExpertSplit, ShardOptions};
use lathe_program::{KvFormat, Program, STEP_ROWS, Weight};
use lathe_session::measure::roofs::Roofs;
use lathe_session::measure::shape::Sizes;
use lathe_session::{has_experts, human_bytes};
use serde::Serialize;

use crate::arguments::RankArguments;
use crate::output::{bad_input, human_count};

/// Batches that are shown.
const BATCHES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];

/// A way to divide the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Strategy {
    /// Each rank has some columns of every expert.
    Tensor,
    /// Each rank has some whole experts.
    Expert,
}

/// The predictions.
#[derive(Serialize)]
pub(crate) struct ParallelReport {
    tensor_parallel: usize,
    expert_parallel: bool,
    /// `None` if nothing is measured and not all roofs are given.
    roofs: Option<RankRoofs>,
    decode: Vec<Line>,
    prefill: Line,
    /// The first batch, up to 256, from which the strategy that is faster at 256 is always faster.
    /// `None` if that strategy is also faster at 1.
    crossover_batch: Option<usize>,
}

/// A step with a number of rows.
#[derive(Serialize)]
struct Line {
    /// Sequences that decode, or 1 for the prompt.
    batch: usize,
    rows: usize,
    /// With experts by column.
    tensor: Prediction,
    /// With whole experts. `None` if the model has no experts.
    expert: Option<Prediction>,
    faster: Option<Strategy>,
}

#[derive(Serialize)]
struct Prediction {
    #[serde(flatten)]
    step: RankStep,
    ms: Option<f64>,
    /// The bytes of sending rows to their experts' ranks and back, if rows were divided over ranks.
    /// The engine does not do this.
    #[serde(skip_serializing_if = "Option::is_none")]
    exchange: Option<Communication>,
}

/// The input of the predictions.
pub(crate) struct Subject<'a> {
    pub program: &'a Program,
    pub sizes: &'a Sizes,
    pub kv_format: KvFormat,
    /// Tokens that each sequence holds.
    pub context: usize,
}

struct Divisions<'a> {
    tensor: Division<'a>,
    expert: Option<Division<'a>>,
    roofs: Option<RankRoofs>,
}

impl RankArguments {
    /// The predictions. `None` with a single rank.
    pub(crate) fn report(
        &self,
        subject: &Subject<'_>,
        machine: Option<&Roofs>,
    ) -> Result<Option<ParallelReport>, Error> {
        self.check()?;
        self.parallel.ranks().check(subject.program)?;
        if self.parallel.tensor_parallel.get() == 1 {
            return Ok(None);
        }
        let bytes_of = |weight: Weight| subject.sizes.of(weight);
        let chunk = subject.context.min(STEP_ROWS);
        let rows_max = chunk.max(BATCHES[BATCHES.len() - 1]);
        let divide = |experts| {
            let options =
                ShardOptions { experts, ..ShardOptions::new(self.parallel.tensor_parallel.get()) };
            let format_of = |weight| Ok(subject.sizes.format_of(weight));
            let (program, kv_format) = (subject.program, subject.kv_format);
            Division::new(program, &options, &format_of, &bytes_of, kv_format, rows_max)
                .map_err(|error| self.parallel.ranks().explain(error))
        };
        let expert = has_experts(subject.program).then(|| divide(ExpertSplit::ByExpert));
        let divisions = Divisions {
            tensor: divide(ExpertSplit::ByColumn)?,
            expert: expert.transpose()?,
            roofs: self.roofs(machine),
        };
        let decode = |batch| StepShape::decode(batch, subject.context - 1);
        let lines = BATCHES.map(|batch| divisions.line(batch, &decode(batch)));
        Ok(Some(ParallelReport {
            tensor_parallel: self.parallel.tensor_parallel.get(),
            expert_parallel: self.parallel.expert_parallel,
            roofs: divisions.roofs,
            decode: lines.into(),
            prefill: divisions.line(1, &StepShape::prefill(0, chunk)),
            crossover_batch: divisions.crossover(decode),
        }))
    }

    fn check(&self) -> Result<(), Error> {
        let given = [
            ("--link-gb-s", Some(self.link_gb_s)),
            ("--rank-read-gb-s", self.rank_read_gb_s),
            ("--rank-gflop-s", self.rank_gflop_s),
        ];
        for (name, value) in given {
            if let Some(value) = value
                && !(value.is_finite() && value > 0.0)
            {
                return Err(bad_input(format!("{name} is {value}, expected more than 0")));
            }
        }
        if !(self.link_us.is_finite() && self.link_us >= 0.0) {
            let message = format!("--link-us is {}, expected at least 0", self.link_us);
            return Err(bad_input(message));
        }
        Ok(())
    }

    fn roofs(&self, machine: Option<&Roofs>) -> Option<RankRoofs> {
        let part =
            |of: fn(&Roofs) -> f64| Some(of(machine?) / self.parallel.tensor_parallel.get() as f64);
        Some(RankRoofs {
            read_gb_s: self.rank_read_gb_s.or_else(|| part(|roofs| roofs.read_gb_s))?,
            gflop_s: self.rank_gflop_s.or_else(|| part(|roofs| roofs.matmul_gflop_s))?,
            link_gb_s: self.link_gb_s,
            link_us: self.link_us,
        })
    }
}

impl Divisions<'_> {
    fn line(&self, batch: usize, shape: &StepShape) -> Line {
        let predict = |division: &Division<'_>| {
            let step = division.step(shape);
            let ms = self.roofs.map(|roofs| step.ms(&roofs));
            Prediction { step, ms, exchange: division.exchange(shape) }
        };
        let (tensor, expert) = (predict(&self.tensor), self.expert.as_ref().map(predict));
        let faster = faster(tensor.ms, expert.as_ref().and_then(|expert| expert.ms));
        Line { batch, rows: shape.rows(), tensor, expert, faster }
    }

    fn crossover(&self, decode: impl Fn(usize) -> StepShape) -> Option<usize> {
        let (expert, roofs) = (self.expert.as_ref()?, self.roofs?);
        let win = |batch| {
            let shape = decode(batch);
            let ms = |division: &Division<'_>| Some(division.step(&shape).ms(&roofs));
            faster(ms(&self.tensor), ms(expert))
        };
        crossover(&(1..=BATCHES[BATCHES.len() - 1]).map(win).collect::<Vec<_>>())
    }
}

fn faster(tensor_ms: Option<f64>, expert_ms: Option<f64>) -> Option<Strategy> {
    let by_expert = expert_ms? < tensor_ms?;
    Some(if by_expert { Strategy::Expert } else { Strategy::Tensor })
}

/// A table for people.
pub(super) fn describe(report: &ParallelReport) -> String {
    let ranks = report.tensor_parallel;
    let mut text = match &report.roofs {
        Some(roofs) => format!(
            "ranks       {ranks}, each reads {:.1} GB/s, computes {}FLOP/s, sends {:.1} GB/s, {} us a \
             collective\n",
            roofs.read_gb_s,
            human_count(roofs.gflop_s * 1e9),
            roofs.link_gb_s,
            roofs.link_us,
        ),
        None => format!("ranks       {ranks}\n"),
    };
    let has_experts = report.prefill.expert.is_some();
    text.push_str("            a rank's step  weights        FLOP       sent  calls       ms");
    text.push_str(if has_experts { "  experts read  load\n" } else { "\n" });
    for line in report.decode.iter().chain([&report.prefill]) {
        let name = match line.rows == line.batch {
            true => format!("batch {}", line.batch),
            false => format!("chunk {}", line.rows),
        };
        let mut row = |name: &str, kind: &str, prediction: &Prediction, wins: bool| {
            text.push_str(&format!("{name:<11} {}\n", describe_step(kind, prediction, wins)));
        };
        let wins = |strategy| line.faster == Some(strategy);
        row(&name, "by column", &line.tensor, wins(Strategy::Tensor));
        if let Some(expert) = &line.expert {
            row("", "by expert", expert, wins(Strategy::Expert));
        }
    }
    if has_experts && report.roofs.is_some() {
        let winner = match report.decode.last().and_then(|line| line.faster) {
            Some(Strategy::Expert) => "whole experts (--expert-parallel) are faster",
            _ => "experts by column are faster",
        };
        text.push_str(&match report.crossover_batch {
            Some(batch) => format!("crossover   from batch {batch} on {winner}\n"),
            None => format!("crossover   none up to batch 256: {winner}\n"),
        });
    }
    text
}

fn describe_step(kind: &str, prediction: &Prediction, wins: bool) -> String {
    let step = &prediction.step;
    let mut text = format!(
        "{kind}  {:>12} {:>11} {:>10} {:>6} {:>8}",
        human_bytes(step.weight_bytes),
        human_count(step.flops as f64),
        human_bytes(step.communication.bytes()),
        step.communication.collectives,
        prediction.ms.map_or("-".to_owned(), |ms| format!("{ms:.3}")),
    );
    if let (Some(touched), Some(imbalance)) = (step.experts_touched, step.imbalance) {
        text.push_str(&format!("  {touched:>12.1}  {imbalance:.2}"));
    }
    if wins {
        text.push_str("  faster");
    }
    text
}
