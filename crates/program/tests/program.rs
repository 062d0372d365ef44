//! Programs, their buffer plans, and the checks of programs and steps.

use lathe_program::conformance::models::SmallDecoder;
use lathe_program::*;

fn step_of(program: &Program, cached: u32, rows: u32) -> Step {
    let tokens = program.kv.block_tokens as u32;
    let blocks = (cached + rows).div_ceil(tokens);
    let groups = program.kv.groups.len() as u32;
    let sequence = SequenceId(0);
    let extend = |group| TableChange::Extend {
        sequence,
        group,
        pages: (0..blocks).map(|b| b * groups + group).collect(),
    };
    Step {
        tokens: vec![TokenSource::Given(1); rows as usize],
        positions: (cached..cached + rows).collect(),
        sequences: vec![StepSequence {
            id: sequence,
            first_row: 0,
            rows,
            cached,
            expanded: 0,
            long_rope: false,
            ancestors: None,
        }],
        tables: [TableChange::Clear { sequence }]
            .into_iter()
            .chain((0..groups).map(extend))
            .collect(),
        choices: vec![Choice::logits_of(rows - 1)],
        inputs: Vec::new(),
    }
}

const LIMITS: ExecutorLimits =
    ExecutorLimits { rows_max: 32, sequences_max: 3, kv_blocks: 6, steps_in_flight: 1 };

fn accept(step: &Step, program: &Program) -> Result<(), StepError> {
    SequenceTables::new(&program.kv, LIMITS.sequences_max).accept(step, program, &LIMITS)
}

/// Replays a buffer plan: every op must find its inputs where they were left.
fn check_plan(program: &Program) {
    let plan = program.buffer_plan();
    let mut holds: Vec<Option<Value>> = vec![None; plan.slot_widths.len()];
    for op in &program.ops {
        for value in op.inputs() {
            assert_eq!(holds[plan.slot(value)], Some(value), "{op:?}");
        }
        for value in op.outputs() {
            let slot = plan.slot(value);
            assert!(program.value_width(value) <= plan.slot_widths[slot]);
            let clobbered = op.inputs().find(|input| plan.slot(*input) == slot);
            assert!(clobbered.is_none_or(|input| op.in_place_inputs().any(|i| i == input)));
            holds[slot] = Some(value);
        }
        let outputs: Vec<usize> = op.outputs().map(|value| plan.slot(value)).collect();
        let mut unique = outputs.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), outputs.len(), "two outputs share a slot: {op:?}");
    }
}

#[test]
fn buffer_plans_hold_what_is_read_and_reuse_slots() {
    for decoder in [SmallDecoder::grouped(), SmallDecoder::latent(), SmallDecoder::mixture()] {
        let program = decoder.program();
        check_plan(&program);
        let plan = program.buffer_plan();
        assert!(plan.slot_widths.len() <= 6, "{:?}", plan.slot_widths);
        let deeper = SmallDecoder { layers: 9, ..decoder }.program().buffer_plan();
        assert_eq!(plan.slot_widths.len(), deeper.slot_widths.len());
    }
}

#[test]
fn programs_that_are_wrong_are_found() {
    let good = SmallDecoder::grouped().program();
    assert_eq!(good.validate(), Ok(()));

    let mut twice = good.clone();
    twice.ops.insert(1, twice.ops[0].clone());
    assert!(twice.validate().unwrap_err().reason.contains("made twice"));

    let mut early = good.clone();
    early.ops.swap(1, 2);
    assert!(early.validate().unwrap_err().reason.contains("before it is made"));

    let mut narrow = good.clone();
    narrow.values[1].width -= 1;
    assert!(narrow.validate().is_err());

    let mut short = good.clone();
    short.ops.truncate(4);
    assert!(short.validate().unwrap_err().reason.contains("never made"));
}

fn reason(step: &Step, program: &Program) -> String {
    accept(step, program).unwrap_err().0
}

fn pages(step: &mut Step, change: usize) -> &mut Vec<u32> {
    match &mut step.tables[change] {
        TableChange::Extend { pages, .. } => pages,
        other => panic!("{other:?}"),
    }
}

#[test]
fn steps_that_are_wrong_are_found() {
    let program = SmallDecoder::grouped().program();
    let good = step_of(&program, 9, 3);
    assert_eq!(accept(&good, &program), Ok(()));

    let change = |change: &dyn Fn(&mut Step)| {
        let mut step = good.clone();
        change(&mut step);
        reason(&step, &program)
    };
    let sequence = SequenceId(0);
    assert!(change(&|s| s.tokens[1] = TokenSource::Given(96)).contains("token 96"));
    assert!(change(&|s| s.tokens[1] = TokenSource::Chosen(0)).contains("chose no token"));
    assert!(change(&|s| s.positions[2] = 4096).contains("position 4096"));
    assert!(change(&|s| s.positions[2] = 12).contains("expected 11"));
    assert!(change(&|s| s.sequences[0].rows = 2).contains("cover 2 of 3"));
    assert!(change(&|s| s.sequences[0].rows = 4).contains("ends at row 4"));
    assert!(change(&|s| s.sequences[0].id = SequenceId(3)).contains("sequence id 3"));
    assert!(change(&|s| s.choices = vec![Choice::logits_of(1); 2]).contains("ascend"));
    assert!(change(&|s| s.choices[0].row = 3).contains("row 3"));
    assert!(change(&|s| s.choices[0].bias = Some([(96, 1.0)].into())).contains("token 96"));
    assert!(change(&|s| s.choices[0].counts = Some(TokenCounts::new(&[96]).into())).contains("96"));
    assert!(change(&|s| s.choices[0].mask = Some(TokenMask::none(95).into())).contains("95"));
    assert!(change(&|s| s.inputs.push(StepInput::default())).contains("1 inputs"));
    assert!(change(&|s| pages(s, 1).truncate(2)).contains("ends at 8"));
    assert!(change(&|s| pages(s, 2)[2] = 4).contains("written twice"));
    assert!(change(&|s| pages(s, 2)[2] = 6).contains("page 6, the cache has 6"));
    assert!(change(&|s| s.sequences.clear()).contains("cover 0"));
    let slide = TableChange::Slide { sequence, group: 0, first: 1 };
    assert!(change(&|s| s.tables.push(slide.clone())).contains("position 0 is visible"));
    let truncate = TableChange::Truncate { sequence, group: 1, end: 4 };
    assert!(change(&|s| s.tables.push(truncate.clone())).contains("ends at block 4"));
    let extend = TableChange::Extend { sequence, group: 2, pages: vec![] };
    assert!(change(&|s| s.tables.push(extend.clone())).contains("group 2 of 2"));
}

/// A refused step leaves no trace, whatever of its changes had been applied already.
#[test]
fn refused_steps_change_no_table() {
    let program = SmallDecoder::grouped().program();
    let mut tables = SequenceTables::new(&program.kv, LIMITS.sequences_max);
    tables.accept(&step_of(&program, 9, 3), &program, &LIMITS).unwrap();
    let sequence = SequenceId(0);
    let before = [tables.table(sequence, 0).clone(), tables.table(sequence, 1).clone()];
    let mut bad = step_of(&program, 9, 3);
    bad.tables = vec![
        TableChange::Slide { sequence, group: 1, first: 1 },
        TableChange::Truncate { sequence, group: 1, end: 2 },
        TableChange::Extend { sequence, group: 1, pages: vec![0, 2, 4] },
        TableChange::Slide { sequence, group: 1, first: 9 },
        TableChange::Clear { sequence },
        TableChange::Extend { sequence, group: 0, pages: vec![5] },
    ];
    assert!(tables.accept(&bad, &program, &LIMITS).is_err());
    assert_eq!([tables.table(sequence, 0), tables.table(sequence, 1)], [&before[0], &before[1]]);
    // A step that was refused did not come before: its choices are nobody's.
    let mut next = step_of(&program, 9, 3);
    next.choices[0] = Choice::sample(2, Sampling::default(), 12);
    tables.accept(&next, &program, &LIMITS).unwrap();
    bad.tokens[0] = TokenSource::Chosen(1);
    assert!(tables.accept(&bad, &program, &LIMITS).unwrap_err().0.contains("choice 1"));
    next.tokens[0] = TokenSource::Chosen(0);
    assert_eq!(tables.accept(&next, &program, &LIMITS), Ok(()));
}

#[test]
fn moves_stay_within_tables() {
    let program = SmallDecoder::grouped().program();
    let mut tables = SequenceTables::new(&program.kv, LIMITS.sequences_max);
    tables.accept(&step_of(&program, 9, 3), &program, &LIMITS).unwrap();
    let moved = |sequence, from, to| {
        let moves = [SlotMove { sequence: SequenceId(sequence), from, to }];
        tables.check_moves(&moves, &program.kv).map_err(|error| error.0)
    };
    assert_eq!(moved(0, 11, 0), Ok(()));
    assert!(moved(0, 12, 0).unwrap_err().contains("holds 0..12"));
    assert!(moved(1, 0, 0).is_err());
    assert!(moved(9, 0, 0).unwrap_err().contains("sequence id 9"));
}

#[test]
fn tables_may_forget_blocks_outside_the_window() {
    let program = SmallDecoder::grouped().program();
    let mut step = step_of(&program, 9, 1);
    // Window 6: position 9 sees 4 to 9, so block 0 (positions 0 to 3) may be gone.
    let sequence = SequenceId(0);
    step.tables.push(TableChange::Slide { sequence, group: 1, first: 1 });
    assert_eq!(accept(&step, &program), Ok(()));
    step.tables.push(TableChange::Slide { sequence, group: 1, first: 2 });
    assert!(accept(&step, &program).is_err());
}

#[test]
fn trees_name_their_own_rows() {
    let program = SmallDecoder::grouped().program();
    let mut step = step_of(&program, 5, 3);
    step.positions = vec![5, 6, 6];
    step.sequences[0].ancestors = Some(vec![0b001, 0b011, 0b101]);
    assert_eq!(accept(&step, &program), Ok(()));
    step.sequences[0].ancestors = Some(vec![0b001, 0b011, 0b1101]);
    assert!(reason(&step, &program).contains("past 3"));
    step.sequences[0].ancestors = Some(vec![0b001, 0b001, 0b101]);
    assert!(reason(&step, &program).contains("leaves itself out"));
    step.sequences[0].ancestors = Some(vec![0b001, 0b011]);
    assert!(reason(&step, &program).contains("2 masks"));
}
