//! `StepData`: the rows, tables and choices of a step on the device.

use std::sync::Arc;

use lathe_program::{
    BackendError, ExecutorLimits, Program, SequenceTables, Step, StepInput, TokenSource,
};

use crate::device::{Device, Memory};
use crate::parameters::Row;
use crate::units;

pub(crate) struct StepData {
    rows: Memory,
    tables: Memory,
    firsts: Memory,
    pick: Memory,
    /// Neighbouring rows of a sequence: the first, and how many.
    tiles: Memory,
    inputs: Vec<Memory>,
    groups: usize,
    /// Rows of a tile at most, and tiles of the step: 0 where rows attend one by one.
    tile_rows: usize,
    tile_count: usize,
    /// Blocks from one table to the next: at least those of the step's longest table.
    stride: usize,
    stride_max: usize,
    host: Host,
}

/// What is put together here before it is copied; kept from step to step.
#[derive(Default)]
struct Host {
    rows: Vec<Row>,
    tables: Vec<u32>,
    firsts: Vec<u32>,
    pick: Vec<u32>,
    tiles: Vec<[u32; 2]>,
}

impl StepData {
    pub(crate) fn new(
        device: &Arc<Device>,
        program: &Program,
        limits: &ExecutorLimits,
    ) -> Result<Self, BackendError> {
        let groups = program.kv.groups.len();
        // A page is in one table at most, but sequences share the pages of a prefix.
        let blocks = program.context_max.div_ceil(program.kv.block_tokens) + 1;
        let blocks = blocks.min(limits.kv_blocks);
        let tables = limits.sequences_max * groups;
        let what = "the step's tables";
        let inputs = program.input_widths().into_iter();
        Ok(Self {
            rows: device.allocate(limits.rows_max * size_of::<Row>(), what)?,
            tables: device.allocate(tables * blocks * 4, what)?,
            firsts: device.allocate(tables * 4, what)?,
            pick: device.allocate(limits.rows_max * 4, what)?,
            tiles: device.allocate(limits.rows_max * 8, what)?,
            inputs: inputs
                .map(|width| device.allocate(limits.rows_max * width * 4, "the step's inputs"))
                .collect::<Result<_, _>>()?,
            groups,
            tile_rows: units::prefill_rows(program),
            tile_count: 0,
            stride: 0,
            stride_max: blocks,
            host: Host::default(),
        })
    }

    /// Takes an accepted step. `chosen` are the tokens of the step before, by choice; `None` where
    /// the device has them.
    pub(crate) fn upload(
        &mut self,
        step: &Step,
        chosen: Option<&[Option<u32>]>,
        tables: &SequenceTables,
    ) -> Result<(), BackendError> {
        self.host.fill_rows(step, chosen);
        let of = |group| step.sequences.iter().map(move |s| tables.table(s.id, group));
        let lengths = (0..self.groups).flat_map(|group| of(group).map(|table| table.blocks.len()));
        // Few strides, so that few graphs are recorded.
        self.stride = lengths.max().unwrap_or(0).next_power_of_two().min(self.stride_max);
        let host = &mut self.host;
        host.tables.clear();
        host.firsts.clear();
        for sequence in &step.sequences {
            for group in 0..self.groups {
                let table = tables.table(sequence.id, group);
                host.tables.extend(&table.blocks);
                host.firsts.push(table.first);
                host.tables.resize(host.firsts.len() * self.stride, 0);
            }
        }
        host.pick.clear();
        host.pick.extend(step.choices.iter().map(|choice| choice.row));
        host.fill_tiles(step, self.tile_rows);
        self.tile_count = host.tiles.len();
        self.tiles.write(0, &host.tiles)?;
        self.rows.write(0, &host.rows)?;
        self.tables.write(0, &host.tables)?;
        self.firsts.write(0, &host.firsts)?;
        self.pick.write(0, &host.pick)?;
        for (memory, StepInput { values }) in self.inputs.iter().zip(&step.inputs) {
            memory.write(0, values)?;
        }
        Ok(())
    }

    pub(crate) fn rows(&self) -> u64 {
        self.rows.address()
    }

    pub(crate) fn tables(&self) -> u64 {
        self.tables.address()
    }

    pub(crate) fn firsts(&self) -> u64 {
        self.firsts.address()
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    pub(crate) fn tiles(&self) -> u64 {
        self.tiles.address()
    }

    pub(crate) fn tile_rows(&self) -> usize {
        self.tile_rows
    }

    /// 0: the rows attend one by one.
    pub(crate) fn tile_count(&self) -> usize {
        self.tile_count
    }

    /// The row of each choice.
    pub(crate) fn pick(&self) -> u64 {
        self.pick.address()
    }

    pub(crate) fn input(&self, input: u32) -> u64 {
        self.inputs[input as usize].address()
    }
}

/// Rows of the smallest step that attends by tiles, and rows that its tiles have on average.
const TILED_ROWS_MIN: usize = 65;
const TILE_ROWS_MEAN_MIN: usize = 4;

impl Host {
    /// No tiles where they would be small, or where rows of a tree do not see all before them.
    fn fill_tiles(&mut self, step: &Step, tile_rows: usize) {
        self.tiles.clear();
        let trees = step.sequences.iter().any(|sequence| sequence.ancestors.is_some());
        if trees || step.rows() < TILED_ROWS_MIN {
            return;
        }
        for sequence in &step.sequences {
            for place in (0..sequence.rows).step_by(tile_rows) {
                let count = (sequence.rows - place).min(tile_rows as u32);
                self.tiles.push([sequence.first_row + place, count]);
            }
        }
        if self.tiles.len() * TILE_ROWS_MEAN_MIN > step.rows() {
            self.tiles.clear();
        }
    }

    fn fill_rows(&mut self, step: &Step, chosen: Option<&[Option<u32>]>) {
        self.rows.clear();
        for (index, sequence) in (0..).zip(&step.sequences) {
            for place in 0..sequence.rows {
                let row = (sequence.first_row + place) as usize;
                let ancestors = sequence.ancestors.as_ref().map(|masks| masks[place as usize]);
                let (token, choice) = match (step.tokens[row], chosen) {
                    (TokenSource::Given(token), _) => (token, 0),
                    (TokenSource::Chosen(choice), None) => (0, choice + 1),
                    (TokenSource::Chosen(choice), Some(tokens)) => {
                        (tokens.get(choice as usize).copied().flatten().unwrap_or(0), 0)
                    }
                };
                self.rows.push(Row {
                    ancestors: ancestors.unwrap_or(0),
                    token,
                    position: step.positions[row],
                    first_row: sequence.first_row,
                    place,
                    cached: sequence.cached,
                    sequence: index,
                    tree: u32::from(ancestors.is_some()),
                    choice,
                    long_rope: u32::from(sequence.long_rope),
                    unused: 0,
                });
            }
        }
    }
}
