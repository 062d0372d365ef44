//! How long an all-reduce of ranks that are threads takes:
//! `cargo run --release -p lathe-program --example collective_bench [RANKS]`.

use std::time::Instant;

use lathe_program::{Collective, ThreadRank};

const CALLS: usize = 2000;

fn main() {
    let ranks = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(2);
    for floats in [1, 576, 4096, 65_536, 294_912] {
        let times = std::thread::scope(|scope| {
            let group = ThreadRank::group(ranks, ranks);
            let time = |end: ThreadRank| {
                let mut values = vec![0.0; floats];
                let mut times: Vec<f64> = (0..CALLS)
                    .map(|_| {
                        let start = Instant::now();
                        end.all_reduce_sum(&mut values).expect("all ranks are here");
                        start.elapsed().as_secs_f64() * 1e6
                    })
                    .collect();
                times.sort_by(f64::total_cmp);
                times[CALLS / 2]
            };
            let threads: Vec<_> =
                group.into_iter().map(|end| scope.spawn(move || time(end))).collect();
            threads.into_iter().map(|thread| thread.join().expect("it ends")).collect::<Vec<f64>>()
        });
        println!("{ranks} ranks, {floats} floats: median {:.2} us a call", times[0]);
    }
}
