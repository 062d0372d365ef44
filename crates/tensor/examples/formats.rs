//! Writes what `tests/peers/tensor_formats.py` compares with the Python readers.
//!
//! usage: `formats DIRECTORY`. Reads `values.safetensors` (f32 tensors) and `blocks.gguf` (random
//! blocks), both written by Python, and writes:
//! - `quantized.gguf`: every value tensor in every GGUF type, `NAME.TYPE`;
//! - `dequantized.safetensors`: those tensors and the blocks, as `f32`;
//! - `sharded/`: the values again, in shards of at most 1 MB.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use lathe_tensor::gguf::{self, GgufFile, MetaArray, MetaType, MetaValue, Metadata};
use lathe_tensor::safetensors::{self, Dtype, SafetensorsFile};
use lathe_tensor::{Bytes, Format, GgmlType, Tensor, codec};

fn main() -> Result<(), Box<dyn Error>> {
    let directory = std::env::args().nth(1).ok_or("usage: formats DIRECTORY")?;
    let directory = Path::new(&directory);
    let values = SafetensorsFile::open(&directory.join("values.safetensors"))?;
    let quantized = quantize_all(&values)?;
    write_gguf(&directory.join("quantized.gguf"), &quantized)?;
    let mut dequantized = quantized;
    let blocks = GgufFile::open(&directory.join("blocks.gguf"))?;
    for info in &blocks.tensors {
        dequantized.push((info.name.clone(), blocks.tensor(&info.name)?));
    }
    write_safetensors(directory, &dequantized)?;
    write_shards(&directory.join("sharded"), &values)
}

fn quantize_all(values: &SafetensorsFile) -> Result<Vec<(String, Tensor)>, Box<dyn Error>> {
    let mut formats = vec![Format::F32, Format::F16, Format::BF16];
    formats.extend(GgmlType::ALL.map(Format::Ggml));
    let mut tensors = Vec::new();
    for name in values.names() {
        let tensor = values.tensor(name)?;
        for format in &formats {
            let codes = codec::quantize(*format, &tensor.to_f32());
            let quantized = Tensor::new(tensor.shape.clone(), *format, Bytes::new(codes))?;
            tensors.push((format!("{name}.{format}"), quantized));
        }
    }
    Ok(tensors)
}

fn write_gguf(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), Box<dyn Error>> {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", MetaValue::String("test".into()));
    metadata.insert("test.float", MetaValue::F32(0.1));
    metadata.insert("test.words", MetaValue::Array(MetaArray::from_strings(["", "ä", "word"])));
    let numbers = (-2..3).map(MetaValue::I32);
    metadata
        .insert("test.numbers", MetaValue::Array(MetaArray::from_values(MetaType::I32, numbers)));
    let declare = |(name, tensor): &(String, Tensor)| gguf::TensorDeclaration {
        name: name.clone(),
        format: tensor.format,
        shape: tensor.shape.clone(),
    };
    let declarations: Vec<_> = tensors.iter().map(declare).collect();
    let mut writer = gguf::Writer::create(path, &metadata, &declarations)?;
    for (name, tensor) in tensors {
        writer.write(name, &tensor.codes)?;
    }
    Ok(writer.finish()?)
}

fn write_safetensors(directory: &Path, tensors: &[(String, Tensor)]) -> Result<(), Box<dyn Error>> {
    let declare = |(name, tensor): &(String, Tensor)| safetensors::TensorDeclaration {
        name: name.clone(),
        dtype: Dtype::F32,
        shape: tensor.shape.clone(),
    };
    let declarations: Vec<_> = tensors.iter().map(declare).collect();
    let path = directory.join("dequantized.safetensors");
    let mut writer = safetensors::Writer::create(&path, &declarations, &BTreeMap::new())?;
    for (name, tensor) in tensors {
        writer.write(name, &codec::quantize(Format::F32, &tensor.to_f32()))?;
    }
    writer.finish()?;
    Ok(())
}

fn write_shards(directory: &Path, values: &SafetensorsFile) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(directory)?;
    let mut declarations = Vec::new();
    for name in values.names() {
        let raw = values.raw(name)?;
        declarations.push(safetensors::TensorDeclaration {
            name: name.to_owned(),
            dtype: raw.dtype,
            shape: raw.shape.clone(),
        });
    }
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut writer =
        safetensors::Writer::create_sharded(directory, &declarations, &metadata, 1 << 20)?;
    for name in values.names() {
        writer.write(name, &values.raw(name)?.bytes)?;
    }
    writer.finish()?;
    Ok(())
}
