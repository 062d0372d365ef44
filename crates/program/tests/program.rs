//! Programs, their buffer plans, and the checks of programs and steps.

use lathe_program::conformance::models::SmallDecoder;
use lathe_program::*;

fn step_of(program: &Program, cached: u32, rows: u32) -> Step {
    let tokens = program.kv.block_tokens as u32;
    let blocks = (cached + rows).div_ceil(tokens);
    let groups = program.kv.groups.len() as u32;
    let table =
        |group| BlockTable { first: 0, blocks: (0..blocks).map(|b| b * groups + group).collect() };
    Step {
        tokens: vec![1; rows as usize],
        positions: (cached..cached + rows).collect(),
        sequences: vec![StepSequence {
            first_row: 0,
            rows,
            cached,
            tables: (0..groups).map(table).collect(),
            expanded: 0,
            ancestors: None,
        }],
        logits_rows: vec![rows - 1],
    }
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
    step.validate(program).unwrap_err().0
}

#[test]
fn steps_that_are_wrong_are_found() {
    let program = SmallDecoder::grouped().program();
    let good = step_of(&program, 9, 3);
    assert_eq!(good.validate(&program), Ok(()));
    assert_eq!(good.check_blocks(6), Ok(()));
    assert!(good.check_blocks(5).is_err());

    let change = |change: &dyn Fn(&mut Step)| {
        let mut step = good.clone();
        change(&mut step);
        reason(&step, &program)
    };
    assert!(change(&|s| s.tokens[1] = 96).contains("token 96"));
    assert!(change(&|s| s.positions[2] = 4096).contains("position 4096"));
    assert!(change(&|s| s.positions[2] = 12).contains("expected 11"));
    assert!(change(&|s| s.sequences[0].rows = 2).contains("cover 2 of 3"));
    assert!(change(&|s| s.sequences[0].rows = 4).contains("ends at row 4"));
    assert!(change(&|s| s.logits_rows = vec![1, 1]).contains("ascend"));
    assert!(change(&|s| s.logits_rows = vec![3]).contains("row 3"));
    assert!(change(&|s| s.sequences[0].tables.truncate(1)).contains("1 block tables"));
    assert!(change(&|s| s.sequences[0].tables[0].blocks.truncate(2)).contains("ends at 8"));
    assert!(change(&|s| s.sequences[0].tables[0].first = 1).contains("position 0 is visible"));
    assert!(change(&|s| s.sequences[0].tables[1].blocks[2] = 4).contains("written twice"));
    assert!(change(&|s| s.sequences.clear()).contains("cover 0"));
}

#[test]
fn tables_may_forget_blocks_outside_the_window() {
    let program = SmallDecoder::grouped().program();
    let mut step = step_of(&program, 9, 1);
    // Window 6: position 9 sees 4 to 9, so block 0 (positions 0 to 3) may be gone.
    let table = &mut step.sequences[0].tables[1];
    *table = BlockTable { first: 1, blocks: table.blocks[1..].to_vec() };
    assert_eq!(step.validate(&program), Ok(()));
    step.sequences[0].tables[1].first = 2;
    assert!(step.validate(&program).is_err());
}

#[test]
fn trees_name_their_own_rows() {
    let program = SmallDecoder::grouped().program();
    let mut step = step_of(&program, 5, 3);
    step.positions = vec![5, 6, 6];
    step.sequences[0].ancestors = Some(vec![0b001, 0b011, 0b101]);
    assert_eq!(step.validate(&program), Ok(()));
    step.sequences[0].ancestors = Some(vec![0b001, 0b011, 0b1101]);
    assert!(reason(&step, &program).contains("past 3"));
    step.sequences[0].ancestors = Some(vec![0b001, 0b001, 0b101]);
    assert!(reason(&step, &program).contains("leaves itself out"));
    step.sequences[0].ancestors = Some(vec![0b001, 0b011]);
    assert!(reason(&step, &program).contains("2 masks"));
}
