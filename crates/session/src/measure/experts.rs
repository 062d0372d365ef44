//! Expert statistics: how often each expert of each layer was chosen, and how evenly.

use lathe_program::cost::RoutingLoad;
use lathe_program::{Executor, Op, Program, Routing};
use serde::Serialize;

/// The load of one layer's experts.
#[derive(Debug, Clone, Serialize)]
pub struct LayerLoad {
    /// The layer.
    pub layer: u32,
    /// Rows of each expert, over all steps.
    pub counts: Vec<u64>,
    /// The mean number of experts that a step used.
    pub distinct_per_step: f64,
    /// The largest count over the mean count; 1 is even.
    pub imbalance: f64,
    #[serde(skip)]
    routing: Routing,
    #[serde(skip)]
    distinct: u64,
}

/// Reads a program's routers after each step.
#[derive(Debug, Clone)]
pub struct ExpertTap {
    layers: Vec<LayerLoad>,
    routings: usize,
    steps: u64,
}

/// Rows of each expert in one step, by router, as the cost counter takes them.
pub type StepLoad = Vec<Vec<u32>>;

impl ExpertTap {
    /// A tap of every router of `program`; `None` if it has none.
    pub fn new(program: &Program) -> Option<Self> {
        let layer = |op: &Op| match op {
            Op::Route { spec, out, .. } => Some(LayerLoad {
                layer: program.weight(spec.weight).layer.unwrap_or_default(),
                counts: vec![0; spec.experts],
                distinct_per_step: 0.0,
                imbalance: 0.0,
                routing: *out,
                distinct: 0,
            }),
            _ => None,
        };
        let layers: Vec<LayerLoad> = program.ops.iter().filter_map(layer).collect();
        let tap = Self { layers, routings: program.routings, steps: 0 };
        (!tap.layers.is_empty()).then_some(tap)
    }

    /// Counts the step that `executor` just ran. `None` if the backend does not keep the choices.
    pub fn read(&mut self, executor: &dyn Executor) -> Option<StepLoad> {
        let mut step: StepLoad = vec![Vec::new(); self.routings];
        for layer in &mut self.layers {
            let counts = &mut step[layer.routing.0 as usize];
            counts.resize(layer.counts.len(), 0);
            for &expert in executor.routing(layer.routing)?.experts {
                counts[expert as usize] += 1;
            }
            layer.add(counts);
        }
        self.steps += 1;
        Some(step)
    }

    /// The loads so far.
    pub fn loads(&self) -> Vec<LayerLoad> {
        self.layers.iter().map(|layer| layer.summed_up(self.steps)).collect()
    }
}

impl LayerLoad {
    fn add(&mut self, step: &[u32]) {
        self.distinct += step.iter().filter(|&&rows| rows > 0).count() as u64;
        self.counts.iter_mut().zip(step).for_each(|(sum, rows)| *sum += u64::from(*rows));
    }

    fn summed_up(&self, steps: u64) -> Self {
        let visits: u64 = self.counts.iter().sum();
        let most = self.counts.iter().max().copied().unwrap_or(0);
        let mean = visits as f64 / self.counts.len().max(1) as f64;
        Self {
            distinct_per_step: self.distinct as f64 / steps.max(1) as f64,
            imbalance: if visits == 0 { 0.0 } else { most as f64 / mean },
            ..self.clone()
        }
    }
}

/// The share of rows of each expert, for the cost counter.
pub fn shares(program: &Program, loads: &[LayerLoad]) -> RoutingLoad {
    let mut shares = vec![Vec::new(); program.routings];
    for load in loads {
        let per_token = program.ops.iter().find_map(|op| match op {
            Op::Route { spec, out, .. } if *out == load.routing => Some(spec.experts_per_token),
            _ => None,
        });
        let rows = load.counts.iter().sum::<u64>() as f64 / per_token.unwrap_or(1) as f64;
        let share = |count: &u64| *count as f64 / rows.max(1.0);
        shares[load.routing.0 as usize] = load.counts.iter().map(share).collect();
    }
    if loads.is_empty() { RoutingLoad::Even } else { RoutingLoad::Shares(shares) }
}

/// One line for each layer: its imbalance, and the experts with the most rows.
pub fn table(loads: &[LayerLoad]) -> String {
    let mut text = String::from("experts     layer  distinct a step  max/mean  most loaded\n");
    for load in loads {
        let visits = load.counts.iter().sum::<u64>().max(1);
        let mut order: Vec<usize> = (0..load.counts.len()).collect();
        order.sort_by_key(|&expert| std::cmp::Reverse(load.counts[expert]));
        let share = |expert: &usize| {
            let percent = load.counts[*expert] as f64 / visits as f64 * 100.0;
            format!("{expert} ({percent:.1} %)")
        };
        let best: Vec<String> = order.iter().take(4).map(share).collect();
        text.push_str(&format!(
            "{:>17} {:>9.2} of {:<3} {:>9.2}  {}\n",
            load.layer,
            load.distinct_per_step,
            load.counts.len(),
            load.imbalance,
            best.join(", ")
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_by_hand() {
        let mut layer = LayerLoad {
            layer: 3,
            counts: vec![0; 4],
            distinct_per_step: 0.0,
            imbalance: 0.0,
            routing: Routing(0),
            distinct: 0,
        };
        layer.add(&[2, 0, 0, 0]);
        layer.add(&[1, 1, 0, 0]);
        let load = layer.summed_up(2);
        assert_eq!(load.counts, [3, 1, 0, 0]);
        assert_eq!(load.distinct_per_step, 1.5);
        // Four choices among four experts: the mean is one and the largest is three.
        assert_eq!(load.imbalance, 3.0);
        assert!(table(&[load]).contains("0 (75.0 %), 1 (25.0 %)"));
    }
}
