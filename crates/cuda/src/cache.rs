//! `Cache`: the pages of the KV cache on the device. A page holds, for each layer of its group,
//! for each position, the first vectors (keys, or a latent) and then the second ones (values, or
//! a rotary key), each with its scale before its codes.

use std::sync::Arc;

use lathe_program::{BackendError, BlockTable, KvFormat, KvLayer, KvLayout};

use crate::device::{Device, Memory};
use crate::parameters::CacheView;
use crate::step_data::StepData;

/// The ending of the kernels that read and write a format; `None` where there are none.
pub(crate) fn suffix(format: KvFormat) -> Option<&'static str> {
    match format {
        KvFormat::F32 => Some("f32"),
        KvFormat::F16 => Some("f16"),
        KvFormat::BF16 => Some("bf16"),
        KvFormat::Int16 => Some("int16"),
        KvFormat::F8E4M3 => Some("fp8"),
        KvFormat::Int8 => Some("int8"),
        KvFormat::Int4 => None,
    }
}

/// Pages, and parts of a page, begin at multiples of this: numbers of up to four bytes are read
/// whole.
const PAGE_UNIT: usize = 256;

pub(crate) struct Cache {
    layout: KvLayout,
    format: KvFormat,
    page_bytes: usize,
    pool: Memory,
}

impl Cache {
    pub(crate) fn new(
        device: &Arc<Device>,
        layout: &KvLayout,
        blocks: usize,
        format: KvFormat,
    ) -> Result<Self, BackendError> {
        let page_bytes = page_bytes(layout, format);
        let bytes = page_bytes.saturating_mul(blocks);
        let pool = device.allocate(bytes, "the KV cache")?;
        pool.zero()?;
        Ok(Self { layout: layout.clone(), format, page_bytes, pool })
    }

    pub(crate) fn format(&self) -> KvFormat {
        self.format
    }

    pub(crate) fn bytes(&self) -> usize {
        self.pool.bytes()
    }

    /// What a kernel needs to find the slots of `layer` in the step's tables.
    pub(crate) fn view(&self, layer: KvLayer, step: &StepData) -> CacheView {
        let decl = self.layout.layer(layer);
        CacheView {
            pool: self.pool.address(),
            tables: step.tables(),
            firsts: step.firsts(),
            page_bytes: self.page_bytes as u64,
            layer_offset: layer_offset(&self.layout, layer, self.format) as u64,
            groups: self.layout.groups.len() as u32,
            group: decl.group,
            stride: step.stride() as u32,
            block_tokens: self.layout.block_tokens as u32,
            token_bytes: decl.shape.bytes_per_token(self.format) as u32,
            unused: 0,
        }
    }

    /// Copies what slot `from` holds to `to`, in all layers of a group.
    pub(crate) fn copy_slot(
        &self,
        device: &Device,
        group: usize,
        table: &BlockTable,
        [from, to]: [usize; 2],
    ) -> Result<(), BackendError> {
        for layer in &self.layout.groups[group].layers {
            let layer = KvLayer(*layer);
            let bytes = self.layout.layer(layer).shape.bytes_per_token(self.format);
            let at = |slot| {
                let (page, place) = table.locate(slot, self.layout.block_tokens);
                let offset = layer_offset(&self.layout, layer, self.format);
                self.pool.address() + (page * self.page_bytes + offset + place * bytes) as u64
            };
            device.copy(at(from), at(to), bytes)?;
        }
        Ok(())
    }
}

/// Bytes of `layer`'s part of a page, rounded up to [`PAGE_UNIT`].
fn part_bytes(layout: &KvLayout, layer: KvLayer, format: KvFormat) -> usize {
    layout.slot_bytes(layer, format).next_multiple_of(PAGE_UNIT)
}

fn layer_offset(layout: &KvLayout, layer: KvLayer, format: KvFormat) -> usize {
    let before = &layout.group_of(layer).layers[..layout.layer(layer).slot as usize];
    before.iter().map(|earlier| part_bytes(layout, KvLayer(*earlier), format)).sum()
}

/// Bytes of a page, the same for every group.
pub(crate) fn page_bytes(layout: &KvLayout, format: KvFormat) -> usize {
    let of_group = |layers: &[u32]| {
        layers.iter().map(|layer| part_bytes(layout, KvLayer(*layer), format)).sum::<usize>()
    };
    layout.groups.iter().map(|group| of_group(&group.layers)).max().unwrap_or(0)
}
