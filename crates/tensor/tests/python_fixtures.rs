//! The codecs against results of the Python package `gguf`, checked in
//! (`tests/peers/tensor_formats.py --fixtures` made them).

use std::path::{Path, PathBuf};

use lathe_tensor::gguf::GgufFile;
use lathe_tensor::safetensors::SafetensorsFile;
use lathe_tensor::{Format, GgmlType, codec};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tensor").join(name)
}

/// Every tensor of `NAME.gguf` has the bits of the same in `NAME.safetensors`, whose names end in
/// `ending`. How many there are.
fn agree(name: &str, ending: &str) -> usize {
    let blocks = GgufFile::open(&fixture(&format!("{name}.gguf"))).unwrap();
    let expected = SafetensorsFile::open(&fixture(&format!("{name}.safetensors"))).unwrap();
    for info in &blocks.tensors {
        let tensor = blocks.tensor(&info.name).unwrap();
        assert_eq!(Some(tensor.format), info.kind.format(), "{}", info.name);
        let found = tensor.to_f32();
        let expected = expected.tensor(&format!("{}{ending}", info.name)).unwrap().to_f32();
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.to_bits(), expected.to_bits(), "{} element {i}", info.name);
        }
    }
    blocks.tensors.len()
}

#[test]
fn dequantized_blocks_agree_bit_for_bit() {
    assert_eq!(agree("blocks", ".f32"), GgmlType::ALL.len());
}

/// `tests/fixtures/make_compact_blocks.py` made them.
#[test]
fn types_that_are_unpacked_agree_bit_for_bit() {
    assert_eq!(agree("compact", ""), 13);
}

#[test]
fn quantized_values_agree_bit_for_bit() {
    let file = SafetensorsFile::open(&fixture("quantized.safetensors")).unwrap();
    let values = file.tensor("values").unwrap().to_f32();
    for name in ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"] {
        let format = Format::parse(name).unwrap();
        let expected = &file.raw(name).unwrap().bytes;
        assert_eq!(codec::quantize(format, &values), **expected, "{name}");
    }
}
