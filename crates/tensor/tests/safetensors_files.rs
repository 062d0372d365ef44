//! Safetensors files: written ones are read back, malformed ones are refused by name.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lathe_tensor::Bytes;
use lathe_tensor::safetensors::{
    Checkpoint, Dtype, SafetensorsError, SafetensorsFile, SafetensorsProblem as Problem,
    TensorDeclaration, Writer,
};
use proptest::prelude::*;

fn declaration(name: &str, dtype: Dtype, shape: &[usize]) -> TensorDeclaration {
    TensorDeclaration { name: name.to_owned(), dtype, shape: shape.to_vec() }
}

/// A file of `header` and `data` as they are.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

fn open(bytes: Vec<u8>) -> Result<SafetensorsFile, SafetensorsError> {
    SafetensorsFile::from_bytes(Path::new("test.safetensors"), Bytes::new(bytes))
}

fn problem(header: &str, data: &[u8]) -> Problem {
    *open(file(header, data)).expect_err(header).problem
}

#[test]
fn every_dtype_is_written_and_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("all.safetensors");
    let tensors: Vec<_> =
        Dtype::ALL.iter().map(|t| declaration(&format!("t.{t}"), *t, &[3, 1])).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut writer = Writer::create(&path, &tensors, &metadata).unwrap();
    let data = |t: Dtype| (0..3 * t.bytes()).map(|i| (i * 7 + t.bytes()) as u8).collect::<Vec<_>>();
    for tensor in &tensors {
        let bytes = data(tensor.dtype);
        let (head, tail) = bytes.split_at(2);
        writer.write(&tensor.name, head).unwrap();
        writer.write(&tensor.name, tail).unwrap();
    }
    assert!(!path.exists(), "nothing before the end");
    assert_eq!(writer.finish().unwrap(), std::slice::from_ref(&path));
    let read = SafetensorsFile::open(&path).unwrap();
    assert_eq!(read.metadata(), &metadata);
    assert_eq!(read.names().len(), tensors.len());
    for tensor in &tensors {
        let raw = read.raw(&tensor.name).unwrap();
        assert_eq!((raw.dtype, &raw.shape), (tensor.dtype, &tensor.shape));
        assert_eq!(*raw.bytes, data(tensor.dtype));
        assert_eq!(raw.bytes.as_ptr().align_offset(tensor.dtype.bytes()), 0, "{tensor:?}");
        let float = matches!(tensor.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64);
        match read.tensor(&tensor.name) {
            Ok(tensor) => assert_eq!((float, tensor.to_f32().len()), (true, 3)),
            Err(e) => assert!(!float && matches!(*e.problem, Problem::NotFloat { .. }), "{e}"),
        }
    }
}

#[test]
fn doubles_become_singles() {
    let data: Vec<u8> = [1.5f64, -2.25].iter().flat_map(|v| v.to_le_bytes()).collect();
    let read = open(file(r#"{"x":{"dtype":"F64","shape":[2],"data_offsets":[0,16]}}"#, &data));
    assert_eq!(read.unwrap().tensor("x").unwrap().to_f32(), [1.5, -2.25]);
}

#[test]
fn a_dropped_writer_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let tensors = [declaration("a", Dtype::U8, &[4])];
    let path = directory.path().join("x.safetensors");
    let none = BTreeMap::new();
    let mut writer = Writer::create(&path, &tensors, &none).unwrap();
    writer.write("a", &[1, 2]).unwrap();
    drop(writer);
    let mut writer = Writer::create(&path, &tensors, &none).unwrap();
    writer.write("a", &[1, 2]).unwrap();
    let error = writer.write("a", &[3, 4, 5]).unwrap_err();
    assert!(matches!(*error.problem, Problem::Written { expected: 4, found: 5, .. }));
    let error = writer.write("b", &[0]).unwrap_err();
    assert!(matches!(*error.problem, Problem::Missing { .. }));
    let error = writer.finish().unwrap_err();
    assert!(matches!(*error.problem, Problem::Written { expected: 4, found: 2, .. }));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_file_that_cannot_be_written_is_named() {
    let missing = Path::new("/nonexistent/x.safetensors");
    let error = Writer::create(missing, &[], &BTreeMap::new()).unwrap_err();
    assert!(matches!(*error.problem, Problem::Io(_)));
    assert_eq!(error.path, missing);
}

#[test]
fn shards_are_written_and_read() {
    let directory = tempfile::tempdir().unwrap();
    let names = ["a", "b", "c", "d"];
    let tensors: Vec<_> = names.iter().map(|n| declaration(n, Dtype::F32, &[2])).collect();
    let writer = Writer::create_sharded(directory.path(), &tensors, &BTreeMap::new(), 16);
    let mut writer = writer.unwrap();
    for (i, name) in names.iter().enumerate().rev() {
        let bytes: Vec<u8> = [i as f32, 0.5].iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.write(name, &bytes).unwrap();
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
    assert_eq!(writer.finish().unwrap().len(), 3);
    let read = Checkpoint::open(directory.path()).unwrap();
    assert_eq!(read.files().len(), 2);
    for (i, name) in names.iter().enumerate() {
        assert_eq!(read.tensor(name).unwrap().to_f32(), [i as f32, 0.5]);
    }
    let error = read.tensor("e").unwrap_err();
    assert!(matches!(*error.problem, Problem::Missing { .. }));
    // All in one file if it fits.
    let single = tempfile::tempdir().unwrap();
    let one = [declaration("a", Dtype::U8, &[0])];
    Writer::create_sharded(single.path(), &one, &BTreeMap::new(), 16).unwrap().finish().unwrap();
    assert!(Checkpoint::open(single.path()).unwrap().contains("a"));
}

#[test]
fn broken_checkpoints_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let refused = || *Checkpoint::open(directory.path()).unwrap_err().problem;
    assert!(matches!(refused(), Problem::NoWeights));
    let index = |map: &str| {
        let text = format!(r#"{{"metadata":{{}},"weight_map":{map}}}"#);
        fs::write(at("model.safetensors.index.json"), text).unwrap();
    };
    fs::write(at("one"), file(r#"{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, &[1]))
        .unwrap();
    for name in ["../one", "/etc/passwd", "a/one", "..", ".", "", "./one", "a\\\\one", "one/"] {
        index(&format!(r#"{{"x":"{name}"}}"#));
        assert!(matches!(refused(), Problem::ShardName { .. }), "{name}: {:?}", refused());
    }
    index(r#"{"x":"two"}"#);
    assert!(matches!(refused(), Problem::MissingShard { .. }));
    index(r#"{"x":"one","y":"one"}"#);
    assert!(matches!(refused(), Problem::NotInShard { name, .. } if name == "y"));
    index(r#"["x"]"#);
    assert!(matches!(refused(), Problem::Index { .. }));
    fs::write(at("model.safetensors.index.json"), "{").unwrap();
    assert!(matches!(refused(), Problem::Index { .. }));
    index(r#"{"x":"one"}"#);
    assert_eq!(Checkpoint::open(directory.path()).unwrap().names().collect::<Vec<_>>(), ["x"]);
}

#[test]
fn headers_that_break_a_rule_are_refused() {
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let one = |dtype: &str, shape: &str, offsets: &str| {
        problem(&format!(r#"{{"x":{}}}"#, entry(dtype, shape, offsets)), &[0; 8])
    };
    assert!(matches!(one("F7", "[8]", "[0,8]"), Problem::UnknownDtype { .. }));
    assert!(matches!(one("F32", "[3]", "[0,8]"), Problem::Size { .. }));
    assert!(matches!(one("U8", "[4294967296,4294967296,8]", "[0,8]"), Problem::Size { .. }));
    assert!(matches!(one("U8", "[0,18446744073709551615]", "[0,0]"), Problem::Size { .. }));
    assert!(matches!(one("U8", "[8]", "[8,0]"), Problem::Offsets { .. }));
    assert!(matches!(one("U8", "[9]", "[0,9]"), Problem::Offsets { .. }));
    assert!(matches!(one("U8", "[8]", "[18446744073709551608,0]"), Problem::Offsets { .. }));
    assert!(matches!(one("U8", "[4]", "[4,8]"), Problem::NotContiguous { kind: "hole", .. }));
    assert!(matches!(one("U8", "[4]", "[0,4]"), Problem::Trailing { .. }));
    assert!(matches!(one("U8", "[-8]", "[0,8]"), Problem::Json { .. }));
    assert!(matches!(one("U8", "[8.5]", "[0,8]"), Problem::Json { .. }));
    assert!(matches!(one("U8", "[8]", "[0]"), Problem::Json { .. }));
    let (a, b) = (entry("U8", "[5]", "[0,5]"), entry("U8", "[4]", "[4,8]"));
    let overlap = problem(&format!(r#"{{"a":{a},"b":{b}}}"#), &[0; 8]);
    assert!(matches!(overlap, Problem::NotContiguous { kind: "overlap", .. }));
    let twice = problem(&format!(r#"{{"a":{b},"a":{b}}}"#), &[0; 8]);
    assert!(matches!(twice, Problem::DuplicateName { .. }));
    assert!(matches!(problem(" {}", &[]), Problem::Json { .. }));
    assert!(matches!(problem("{}x", &[]), Problem::Json { .. }));
    assert!(matches!(problem(r#"{"__metadata__":{"a":1}}"#, &[]), Problem::Json { .. }));
    assert!(matches!(problem("{}", &[0]), Problem::Trailing { expected: 0, found: 1 }));
    let deep = format!(r#"{{"x":{}"#, "[".repeat(1 << 20));
    assert!(matches!(problem(&deep, &[]), Problem::Json { .. }));
    let deep = format!(r#"{{"x":{}"#, r#"{"a":"#.repeat(1 << 18));
    assert!(matches!(problem(&deep, &[]), Problem::Json { .. }));
    assert!(open(file("{}   ", &[])).is_ok(), "padding");
}

#[test]
fn sizes_of_the_header_are_checked() {
    for found in [3, 100_000_001, u64::MAX, 1 << 63] {
        let mut bytes = found.to_le_bytes().to_vec();
        bytes.extend(b"{}");
        let error = open(bytes).unwrap_err();
        assert!(matches!(*error.problem, Problem::HeaderSize { limit: 2, .. }), "{error}");
    }
    for length in 0..8 {
        let error = open(vec![0; length]).unwrap_err();
        assert!(matches!(*error.problem, Problem::TooShort { .. }));
    }
}

fn valid() -> Vec<u8> {
    let header = concat!(
        r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"#,
        r#""b":{"dtype":"I8","shape":[3],"data_offsets":[16,19]},"#,
        r#""c":{"dtype":"BF16","shape":[],"data_offsets":[19,21]}}   "#
    );
    file(header, &(0..21).collect::<Vec<u8>>())
}

/// Reads everything that a file promises.
fn read_all(bytes: Vec<u8>) -> Result<(), SafetensorsError> {
    let read = open(bytes)?;
    for name in read.names() {
        let raw = read.raw(name)?;
        let elements: usize = raw.shape.iter().product();
        assert_eq!(elements * raw.dtype.bytes(), raw.bytes.len());
        if let Ok(tensor) = read.tensor(name) {
            assert_eq!(tensor.to_f32().len(), elements);
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
