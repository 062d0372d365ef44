//! Any bytes give a typed error, or a file that can be read whole.
#![no_main]

use std::path::Path;

use lathe_tensor::Bytes;
use lathe_tensor::gguf::GgufFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let path = Path::new("fuzz");
    let Ok(file) = GgufFile::from_bytes(path, Bytes::new(data.to_vec())) else { return };
    for (_, value) in file.metadata.iter() {
        let Some(array) = value.as_array() else { continue };
        let lengths = [
            array.byte_strings().map(Iterator::count),
            array.integers().map(|v| v.len()),
            array.floats().map(|v| v.len()),
            array.booleans().map(|v| v.len()),
            array.arrays().map(|v| v.len()),
        ];
        lengths.into_iter().flatten().for_each(|n| assert_eq!(n, array.len()));
    }
    for info in &file.tensors {
        if let Ok(tensor) = file.tensor(&info.name) {
            assert_eq!(tensor.to_f32().len(), info.shape.iter().product::<usize>());
        }
    }
});
