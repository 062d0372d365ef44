//! GGUF files that were written are read back. Malformed files are refused by name.

use std::fs;
use std::path::Path;

use lathe_tensor::gguf::{
    GgufError, GgufFile, GgufProblem as Problem, MetaArray, MetaType, MetaValue, Metadata,
    TensorDeclaration, Writer,
};
use lathe_tensor::{Bytes, Format, GgmlType};
use proptest::prelude::*;

fn open(bytes: Vec<u8>) -> Result<GgufFile, GgufError> {
    GgufFile::from_bytes(Path::new("test.gguf"), Bytes::new(bytes))
}

fn problem(bytes: &[u8]) -> Problem {
    *open(bytes.to_vec()).expect_err("malformed").problem
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

/// A header with these counts, followed by `rest`.
fn file(tensors: u64, entries: u64, rest: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(entries.to_le_bytes());
    bytes.extend(rest.concat());
    bytes
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [string(key), kind.to_le_bytes().to_vec(), value.to_vec()].concat()
}

fn info(name: &str, dimensions: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend((dimensions.len() as u32).to_le_bytes());
    dimensions.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// Pads to the alignment and adds `data` bytes.
fn with_data(mut bytes: Vec<u8>, data: usize) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(32) + data, 1);
    bytes
}

fn sample_metadata() -> Metadata {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", MetaValue::String("llama".into()));
    metadata.insert("u8", MetaValue::U8(200));
    metadata.insert("i8", MetaValue::I8(-3));
    metadata.insert("u16", MetaValue::U16(65_535));
    metadata.insert("i16", MetaValue::I16(-300));
    metadata.insert("u32", MetaValue::U32(1 << 31));
    metadata.insert("i32", MetaValue::I32(-70_000));
    metadata.insert("f32", MetaValue::F32(1e-5));
    metadata.insert("yes", MetaValue::Bool(true));
    metadata.insert("u64", MetaValue::U64(u64::MAX));
    metadata.insert("i64", MetaValue::I64(i64::MIN));
    metadata.insert("f64", MetaValue::F64(0.1));
    let words = MetaArray::from_strings(["a", "", "wörld"]);
    metadata.insert("words", MetaValue::Array(words));
    let numbers = [1, -2].map(MetaValue::I32);
    metadata.insert("numbers", MetaValue::Array(MetaArray::from_values(MetaType::I32, numbers)));
    metadata
}

#[test]
fn what_is_written_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.gguf");
    let metadata = sample_metadata();
    let declare = |name: &str, format, shape: &[usize]| TensorDeclaration {
        name: name.to_owned(),
        format,
        shape: shape.to_vec(),
    };
    let tensors = [
        declare("norm", Format::F32, &[3]),
        declare("codes", Format::Ggml(GgmlType::Q6_K), &[2, 256]),
        declare("stack", Format::BF16, &[2, 3, 4]),
    ];
    let mut writer = Writer::create(&path, &metadata, &tensors).unwrap();
    let data = |t: &TensorDeclaration| {
        (0..t.format.bytes_for(&t.shape).unwrap()).map(|i| (i % 251) as u8).collect::<Vec<_>>()
    };
    for tensor in tensors.iter().rev() {
        let bytes = data(tensor);
        writer.write(&tensor.name, &bytes[..5]).unwrap();
        writer.write(&tensor.name, &bytes[5..]).unwrap();
    }
    assert!(!path.exists(), "nothing before the end");
    writer.finish().unwrap();
    let read = GgufFile::open(&path).unwrap();
    assert!(read.metadata.iter().eq(metadata.iter()));
    for tensor in &tensors {
        let found = read.tensor(&tensor.name).unwrap();
        assert_eq!((found.format, &found.shape), (tensor.format, &tensor.shape));
        assert_eq!(*found.codes, data(tensor));
    }
    assert_eq!(read.metadata.require::<Vec<&str>>("words").unwrap(), ["a", "", "wörld"]);
    assert_eq!(read.metadata.require::<Vec<i64>>("numbers").unwrap(), [1, -2]);
    assert_eq!(read.metadata.require::<u64>("u8").unwrap(), 200);
    assert_eq!(read.metadata.require::<i64>("i32").unwrap(), -70_000);
    assert_eq!(read.metadata.require::<f64>("f64").unwrap(), 0.1);
    assert!(read.metadata.require::<bool>("yes").unwrap());
    assert_eq!(read.metadata.optional::<u32>("none").unwrap(), None);
}

#[test]
fn a_dropped_writer_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.gguf");
    let tensors = [TensorDeclaration { name: "a".into(), format: Format::F32, shape: vec![2] }];
    let mut writer = Writer::create(&path, &Metadata::new(), &tensors).unwrap();
    let error = writer.write("a", &[0; 9]).unwrap_err();
    assert!(matches!(*error.problem, Problem::Written { expected: 8, found: 9, .. }));
    let error = writer.write("b", &[0]).unwrap_err();
    assert!(matches!(*error.problem, Problem::Missing { .. }));
    writer.write("a", &[0; 4]).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(matches!(*error.problem, Problem::Written { expected: 8, found: 4, .. }));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn wrong_types_of_metadata_say_what_was_found() {
    let metadata = sample_metadata();
    let message = |e: GgufError| e.to_string();
    let negative = metadata.require::<u32>("i8").map_err(message).unwrap_err();
    assert_eq!(negative, "metadata \"i8\": found i8 -3, expected an integer from 0 to 2^32 - 1");
    let text = metadata.require::<f32>("general.architecture").map_err(message).unwrap_err();
    assert_eq!(text, "metadata \"general.architecture\": found string, expected a float");
    let array = metadata.require::<Vec<f32>>("words").map_err(message).unwrap_err();
    assert_eq!(array, "metadata \"words\": found array of 3 string, expected an array of floats");
    let missing = metadata.require::<bool>("no").map_err(message).unwrap_err();
    assert_eq!(missing, "there is no metadata \"no\"");
}

#[test]
fn starts_that_are_no_gguf_are_refused() {
    assert!(matches!(problem(b""), Problem::Magic { .. }));
    assert!(matches!(problem(b"GGU"), Problem::Magic { .. }));
    assert!(matches!(problem(b"ggml1234"), Problem::Magic { .. }));
    let version = |bytes: [u8; 4]| problem(&[b"GGUF".as_slice(), &bytes, &[0; 16]].concat());
    assert!(matches!(version(1u32.to_le_bytes()), Problem::Version { found: 1 }));
    assert!(matches!(version(4u32.to_le_bytes()), Problem::Version { found: 4 }));
    assert!(matches!(version(0u32.to_le_bytes()), Problem::Version { found: 0 }));
    assert!(matches!(version(3u32.to_be_bytes()), Problem::BigEndian));
}

#[test]
fn absurd_counts_are_refused_before_anything_is_allocated() {
    for count in [1, 1 << 32, u64::MAX] {
        assert!(matches!(problem(&file(0, count, &[])), Problem::Count { .. }));
        assert!(matches!(problem(&file(count, 0, &[])), Problem::Count { .. }));
        let claim =
            |kind: u32| [kind.to_le_bytes().to_vec(), count.to_le_bytes().to_vec()].concat();
        for kind in [0, 4, 6, 8, 9, 12] {
            let bytes = file(0, 1, &[entry("k", 9, &claim(kind))]);
            assert!(matches!(problem(&bytes), Problem::Count { .. }), "{kind} x {count}");
        }
        let key = [count.to_le_bytes().to_vec(), vec![0; 5]].concat();
        let text = file(0, 1, &[entry("k", 8, &count.to_le_bytes())]);
        assert!(matches!(problem(&text), Problem::Truncated { .. }));
        assert!(open(file(0, 1, &[key])).is_err());
    }
}

#[test]
fn metadata_that_breaks_a_rule_is_refused() {
    let one = |kind: u32, value: &[u8]| problem(&file(0, 1, &[entry("k", kind, value)]));
    assert!(matches!(one(13, &[0; 8]), Problem::MetaType { found: 13, .. }));
    assert!(matches!(one(7, &[2]), Problem::Boolean { found: 2, .. }));
    assert!(matches!(one(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]), Problem::Text { .. }));
    let nest = |depth: usize| {
        let one = 1u64.to_le_bytes().to_vec();
        let mut bytes = [9u32.to_le_bytes().to_vec(), one.clone()].concat().repeat(depth - 1);
        bytes.extend([0u32.to_le_bytes().to_vec(), one, vec![7]].concat());
        entry("k", 9, &bytes)
    };
    assert!(matches!(problem(&file(0, 1, &[nest(5)])), Problem::Nesting { .. }));
    assert!(matches!(problem(&file(0, 1, &[nest(10_000)])), Problem::Nesting { .. }));
    let nested = open(file(0, 1, &[nest(2)])).unwrap();
    let inner = nested.metadata.require::<&MetaArray>("k").unwrap().arrays().unwrap();
    assert_eq!(inner[0].integers().unwrap(), [7]);
    let twice = [entry("k", 0, &[1]), entry("k", 0, &[2])];
    assert!(matches!(problem(&file(0, 2, &twice)), Problem::Duplicate { .. }));
    for alignment in [0u32, 3, 1 << 21] {
        let bytes = file(0, 1, &[entry("general.alignment", 4, &alignment.to_le_bytes())]);
        assert!(matches!(problem(&bytes), Problem::Alignment { .. }));
    }
    let bytes = file(0, 1, &[entry("general.alignment", 8, &string("32"))]);
    assert!(matches!(problem(&bytes), Problem::WrongType { .. }));
}

#[test]
fn tensors_that_break_a_rule_are_refused() {
    let one = |info: Vec<u8>| problem(&with_data(file(1, 0, &[info]), 64));
    let many = 1u64 << 40;
    assert!(matches!(one(info("x", &[1; 5], 0, 0)), Problem::Dimensions { found: 5, .. }));
    assert!(matches!(one(info("x", &[many, many], 0, 0)), Problem::Shape { .. }));
    assert!(matches!(one(info("x", &[u64::MAX], 0, 0)), Problem::Shape { .. }));
    assert!(matches!(one(info("x", &[0, u64::MAX], 0, 0)), Problem::Shape { .. }));
    assert!(matches!(one(info("x", &[33], 2, 0)), Problem::Shape { .. }));
    assert!(matches!(one(info("x", &[8], 0, 4)), Problem::Unaligned { .. }));
    assert!(matches!(one(info("x", &[17], 0, 0)), Problem::Offsets { .. }));
    assert!(matches!(one(info("x", &[8], 0, 64)), Problem::Offsets { .. }));
    assert!(matches!(one(info("x", &[8], 0, u64::MAX - 31)), Problem::Offsets { .. }));
    assert!(matches!(one(info("x", &[8], 77, 1 << 40)), Problem::Offsets { .. }));
    let two = |a, b| problem(&with_data(file(2, 0, &[a, b]), 64));
    let overlap = two(info("x", &[16], 0, 0), info("y", &[8], 0, 32));
    let Problem::Overlap { first, second } = &overlap else { panic!("{overlap:?}") };
    assert_eq!((first.as_str(), second.as_str()), ("x", "y"));
    let twice = two(info("x", &[8], 0, 0), info("x", &[8], 0, 32));
    assert!(matches!(twice, Problem::Duplicate { .. }));
}

#[test]
fn empty_tensors_need_no_data() {
    // The header's end is not aligned, and nothing follows it.
    let read = open(file(1, 0, &[info("x", &[8, 0], 0, 0)])).unwrap();
    let tensor = read.tensor("x").unwrap();
    assert_eq!((tensor.shape.as_slice(), tensor.to_f32().len()), ([0, 8].as_slice(), 0));
}

#[test]
fn types_that_cannot_be_read_are_refused_by_name() {
    let infos = [info("x", &[256], 41, 0), info("y", &[2], 77, 0), info("z", &[1], 28, 96)];
    let read = open(with_data(file(3, 0, &infos), 104)).unwrap();
    let message = |name| read.tensor(name).unwrap_err().to_string();
    assert_eq!(message("x"), "test.gguf: tensor \"x\" is Q1_0, which is not supported");
    assert_eq!(message("y"), "test.gguf: tensor \"y\" is unknown type 77, which is not supported");
    assert_eq!(message("w"), "test.gguf: there is no tensor \"w\"");
    assert_eq!(read.tensor("z").unwrap().format, Format::F32);
}

#[test]
fn a_large_vocabulary_is_borrowed() {
    let words: Vec<String> = (0..250_000).map(|i| format!("token {i}")).collect();
    let mut metadata = Metadata::new();
    metadata.insert("words", MetaValue::Array(MetaArray::from_strings(&words)));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.gguf");
    Writer::create(&path, &metadata, &[]).unwrap().finish().unwrap();
    let read = GgufFile::open(&path).unwrap();
    let found = read.metadata.require::<&MetaArray>("words").unwrap();
    assert!(found.byte_strings().unwrap().eq(words.iter().map(String::as_bytes)));
}

fn valid() -> Vec<u8> {
    let numbers = [4u32.to_le_bytes().to_vec(), 2u64.to_le_bytes().to_vec(), vec![7; 8]].concat();
    let words =
        [8u32.to_le_bytes().to_vec(), 2u64.to_le_bytes().to_vec(), string("ab"), string("c")];
    let entries = [
        entry("general.architecture", 8, &string("llama")),
        entry("numbers", 9, &numbers),
        entry("words", 9, &words.concat()),
        entry("general.alignment", 4, &32u32.to_le_bytes()),
    ];
    let infos = [info("a", &[4, 2], 0, 0), info("b", &[32, 1], 2, 32), info("c", &[256], 14, 64)];
    with_data(file(3, 4, &[entries.concat(), infos.concat()]), 64 + 210)
}

/// Reads everything that a file has according to its header.
fn read_all(bytes: Vec<u8>) -> Result<(), GgufError> {
    let read = open(bytes)?;
    for (_, value) in read.metadata.iter() {
        if let Some(array) = value.as_array() {
            let strings = array.byte_strings().map(Iterator::count);
            let lengths = [
                strings,
                array.integers().map(|v| v.len()),
                array.floats().map(|v| v.len()),
                array.booleans().map(|v| v.len()),
                array.arrays().map(|v| v.len()),
            ];
            for length in lengths.into_iter().flatten() {
                assert_eq!(length, array.len());
            }
        }
    }
    for info in &read.tensors {
        if let Ok(tensor) = read.tensor(&info.name) {
            assert_eq!(tensor.to_f32().len(), info.shape.iter().product::<usize>());
        }
    }
    Ok(())
}

#[test]
fn every_truncation_is_refused() {
    let whole = valid();
    read_all(whole.clone()).unwrap();
    for length in 0..whole.len() {
        assert!(read_all(whole[..length].to_vec()).is_err(), "{length} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Any damage gives a typed error or a file that can be read whole.
    #[test]
    fn damage_never_panics(edits in prop::collection::vec((any::<u16>(), any::<u8>()), 1..6),
                           cut in any::<prop::sample::Index>(), grow in 0usize..4) {
        let mut bytes = valid();
        for (at, value) in edits {
            let at = at as usize % bytes.len();
            bytes[at] = value;
        }
        if grow == 0 {
            bytes.truncate(cut.index(bytes.len()));
        }
        let _ = read_all(bytes);
    }
}
