//! Any bytes give a typed error, or a file that can be read whole.
#![no_main]

use std::path::Path;

use lathe_tensor::Bytes;
use lathe_tensor::safetensors::SafetensorsFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let path = Path::new("fuzz");
    let Ok(file) = SafetensorsFile::from_bytes(path, Bytes::new(data.to_vec())) else { return };
    for name in file.names() {
        let raw = file.raw(name).expect("a listed name");
        let elements: usize = raw.shape.iter().product();
        assert_eq!(elements * raw.dtype.bytes(), raw.bytes.len());
        if let Ok(tensor) = file.tensor(name) {
            assert_eq!(tensor.to_f32().len(), elements);
        }
    }
});
