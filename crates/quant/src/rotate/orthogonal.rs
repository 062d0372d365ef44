//! Orthogonal matrices with cheap products: Hadamard, random, and blocks of them.

use lathe_tensor::random::SplitMix64;

/// The kind of matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Hadamard's matrix by Sylvester's construction. If the size is no power of two, it is the
    /// product with a fixed orthogonal matrix of the odd factor.
    Hadamard,
    /// The same after random signs (QuaRot, arXiv 2404.00456), so that rows look like noise.
    RandomHadamard,
    /// Uniformly random among all orthogonal matrices.
    Random,
}

/// An orthogonal matrix `Q` with equal blocks on its diagonal.
#[derive(Debug, Clone, PartialEq)]
pub struct Orthogonal {
    block: usize,
    /// Signs that are multiplied first, one for each element of a block. Empty means no signs.
    signs: Vec<f64>,
    /// The size of the Hadamard part: a power of two.
    power: usize,
    /// `[odd, odd]`: mixes the `block / power` runs.
    odd: Vec<f64>,
}

impl Orthogonal {
    /// Blocks of `block` elements of `kind`, all equal.
    ///
    /// # Panics
    /// If `block` is 0.
    pub fn new(kind: Kind, block: usize, seed: u64) -> Self {
        assert!(block > 0, "a block has elements");
        let mut random = SplitMix64::new(seed ^ block as u64);
        let power = match kind {
            Kind::Random => 1,
            Kind::Hadamard | Kind::RandomHadamard => 1 << block.trailing_zeros(),
        };
        let signs = match kind {
            Kind::RandomHadamard => {
                (0..block).map(|_| if random.next_u64() >> 63 == 0 { 1.0 } else { -1.0 }).collect()
            }
            Kind::Hadamard | Kind::Random => Vec::new(),
        };
        // The plain Hadamard rotation is the same for every seed, and so is its odd part.
        let mut random = if kind == Kind::Hadamard { SplitMix64::new(0) } else { random };
        let odd = orthogonal(block / power, &mut random);
        Orthogonal { block, signs, power, odd }
    }

    /// Elements of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// Replaces each block `x` of `row` by `x Q`.
    ///
    /// # Panics
    /// If `row` is not a whole number of blocks.
    pub fn turn(&self, row: &mut [f64]) {
        assert!(row.len().is_multiple_of(self.block), "whole blocks");
        let (odd, power) = (self.block / self.power, self.power);
        let norm = (power as f64).sqrt().recip();
        let mut mixed = vec![0.0; self.block];
        for x in row.chunks_exact_mut(self.block) {
            x.iter_mut().zip(&self.signs).for_each(|(x, sign)| *x *= sign);
            for run in x.chunks_exact_mut(power) {
                hadamard(run);
                run.iter_mut().for_each(|x| *x *= norm);
            }
            if odd == 1 {
                continue;
            }
            mixed.fill(0.0);
            for (from, run) in x.chunks_exact(power).enumerate() {
                for (to, out) in mixed.chunks_exact_mut(power).enumerate() {
                    let share = self.odd[from * odd + to];
                    out.iter_mut().zip(run).for_each(|(out, x)| *out += share * x);
                }
            }
            x.copy_from_slice(&mixed);
        }
    }
}

/// Sylvester's Hadamard transform without its factor, in place.
fn hadamard(x: &mut [f64]) {
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (low, high) in low.iter_mut().zip(high) {
                (*low, *high) = (*low + *high, *low - *high);
            }
        }
        half *= 2;
    }
}

/// `[n, n]`, uniform over the orthogonal matrices: normal numbers, orthogonalised by the modified
/// Gram-Schmidt process. It runs twice, which is enough for full precision.
fn orthogonal(n: usize, random: &mut SplitMix64) -> Vec<f64> {
    if n == 1 {
        return vec![1.0];
    }
    let mut rows: Vec<f64> = (0..n * n).map(|_| random.normal()).collect();
    for i in 0..n {
        let (before, rest) = rows.split_at_mut(i * n);
        let row = &mut rest[..n];
        for _ in 0..2 {
            for other in before.chunks_exact(n) {
                let share: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= share * b);
            }
            let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            row.iter_mut().for_each(|x| *x /= length);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_orthogonal_to_a_part_in_a_trillion() {
        for kind in [Kind::Hadamard, Kind::RandomHadamard, Kind::Random] {
            for block in [1, 2, 12, 32, 64, 96, 171, 576] {
                let matrix = Orthogonal::new(kind, block, 7);
                let row = |i: usize| {
                    let mut row = vec![0.0; block];
                    row[i] = 1.0;
                    matrix.turn(&mut row);
                    row
                };
                let rows: Vec<Vec<f64>> = (0..block).map(row).collect();
                for i in 0..block {
                    for j in 0..=i {
                        let dot: f64 = rows[i].iter().zip(&rows[j]).map(|(a, b)| a * b).sum();
                        let expected = if i == j { 1.0 } else { 0.0 };
                        assert!((dot - expected).abs() < 1e-12, "{kind:?} {block}: {i} {j} {dot}");
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_do_not_mix_and_seeds_differ() {
        let matrix = Orthogonal::new(Kind::RandomHadamard, 4, 1);
        let mut row = vec![0.0; 12];
        row[5] = 1.0;
        matrix.turn(&mut row);
        assert!(row[..4].iter().chain(&row[8..]).all(|x| *x == 0.0));
        assert!(row[4..8].iter().all(|x| (x.abs() - 0.5).abs() < 1e-15));
        let turned = |kind, seed| {
            let mut row: Vec<f64> = (0..48).map(f64::from).collect();
            Orthogonal::new(kind, 48, seed).turn(&mut row);
            row
        };
        assert!(turned(Kind::RandomHadamard, 1) != turned(Kind::RandomHadamard, 2));
        assert!(turned(Kind::Random, 1) != turned(Kind::Random, 2));
        assert_eq!(turned(Kind::Hadamard, 1), turned(Kind::Hadamard, 2));
    }

    /// [1, 2, 3, 4] times H4 / 2, computed by hand.
    #[test]
    fn a_hadamard_product_by_hand() {
        let mut row = vec![1.0, 2.0, 3.0, 4.0];
        Orthogonal::new(Kind::Hadamard, 4, 0).turn(&mut row);
        assert_eq!(row, [5.0, -1.0, -2.0, 0.0]);
    }
}
