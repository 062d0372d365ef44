//! `KvCache`: block tables of sequences over one pool, and the texts whose blocks are kept. Knows
//! nothing of requests or of steps.

use lathe_program::{BlockTable, KvLayout, SequenceId, TableChange};

use super::pool::BlockPool;
use super::prefix::{PrefixIndex, ROOT};

/// The blocks that one sequence holds, a table for each KV group. All tables end at the same
/// block; those of windowed groups begin later.
#[derive(Debug, Default)]
pub struct SequenceBlocks {
    /// The executor's name for the sequence; `None` while it holds nothing.
    id: Option<SequenceId>,
    /// By group; as long as there is an id.
    tables: Vec<BlockTable>,
    /// Full blocks that the prefix index knows.
    indexed: usize,
    /// The prefix index's node of the last of them.
    node: u32,
}

impl SequenceBlocks {
    /// The executor's name for the sequence.
    ///
    /// # Panics
    /// If it holds nothing.
    pub fn id(&self) -> SequenceId {
        self.id.expect("a sequence with blocks has an id")
    }

    /// Blocks from position 0 to the end of the tables, slid-out ones included.
    pub fn end(&self) -> usize {
        self.tables.first().map_or(0, |table| table.end() as usize)
    }
}

/// The longest known beginning of a text: what [`KvCache::acquire`] would give.
#[derive(Debug, Default)]
pub struct PrefixHit {
    /// Positions that need not be computed.
    pub length: usize,
    /// Pages of the hit that other sequences hold; the others count as available until acquired.
    pub shared: usize,
    /// Node of each full block.
    path: Vec<u32>,
    tail: Option<u32>,
}

/// The pool and the shape of the tables over it, and what an executor has still to be told of them.
#[derive(Debug)]
pub struct KvCache {
    block_tokens: usize,
    /// By group; `None` keeps every position.
    windows: Vec<Option<usize>>,
    pool: BlockPool,
    index: Option<PrefixIndex>,
    /// Ids that no sequence has, the lowest last.
    free_ids: Vec<u32>,
    /// Changes of tables since [`KvCache::take_changes`].
    changes: Vec<TableChange>,
}

impl KvCache {
    /// An empty cache of `pages` pages for `sequences_max` sequences at a time. With `prefix_seed`
    /// it keeps the blocks of texts for those that begin alike; the seed goes into the hashes and
    /// changes nothing that can be observed.
    pub fn new(
        layout: &KvLayout,
        pages: usize,
        sequences_max: usize,
        prefix_seed: Option<u64>,
    ) -> Self {
        let windows: Vec<_> = layout.groups.iter().map(|group| group.window).collect();
        let block_tokens = layout.block_tokens;
        let index = |seed| PrefixIndex::new(seed, block_tokens, windows.len(), pages);
        // Without groups there is nothing to keep.
        let index = prefix_seed.filter(|_| !windows.is_empty()).map(index);
        let free_ids = (0..sequences_max as u32).rev().collect();
        let (pool, changes) = (BlockPool::new(pages), Vec::new());
        KvCache { block_tokens, windows, pool, index, free_ids, changes }
    }

    /// Moves all changes of tables since the last call to the end of `changes`, in order: the next
    /// step that an executor gets must have them.
    pub fn take_changes(&mut self, changes: &mut Vec<TableChange>) {
        changes.append(&mut self.changes);
    }

    /// Takes back changes that no executor has applied.
    pub fn restore_changes(&mut self, mut changes: Vec<TableChange>) {
        changes.append(&mut self.changes);
        self.changes = changes;
    }

    /// The pool.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Pages that a sequence needs, alone and computed row by row, to reach `length` positions.
    /// Windowed groups need no more than the blocks that a window can touch.
    pub fn pages_for(&self, length: usize) -> usize {
        let all = length.div_ceil(self.block_tokens);
        let group = |window: &Option<usize>| match window {
            Some(window) => all.min((window.max(&1) - 1).div_ceil(self.block_tokens) + 1),
            None => all,
        };
        self.windows.iter().map(group).sum()
    }

    /// The longest sequence that fits alone, at most `limit` positions.
    pub fn length_max(&self, limit: usize) -> usize {
        let (mut fits, mut exceeds) = (0, limit + 1);
        while exceeds - fits > 1 {
            let middle = fits + (exceeds - fits) / 2;
            if self.pages_for(middle) <= self.pool.pages() {
                fits = middle
            } else {
                exceeds = middle
            }
        }
        fits
    }

    /// Positions that `held` can reach with the pages that are available now, if a block of each
    /// group is left for `others` more sequences.
    pub fn length_affordable(&self, held: &SequenceBlocks, others: usize) -> usize {
        match self.windows.len() {
            0 => usize::MAX,
            groups => {
                let blocks = (self.pool.available() / groups).saturating_sub(others);
                (held.end() + blocks).saturating_mul(self.block_tokens)
            }
        }
    }

    /// The longest beginning of `tokens`, short of the last one (whose logits are wanted), whose
    /// blocks are known in every group as far as the group's window reaches back from its end.
    pub fn find(&self, tokens: &[u32]) -> PrefixHit {
        let Some(index) = &self.index else { return PrefixHit::default() };
        let limit = tokens.len() - 1;
        let mut path = Vec::new();
        for block in tokens[..limit].chunks_exact(self.block_tokens) {
            let parent = path.last().copied().unwrap_or(ROOT);
            let Some(node) = index.child(parent, block) else { break };
            path.push(node);
        }
        let runs: Vec<Vec<usize>> =
            (0..self.windows.len()).map(|group| runs(index, &path, group)).collect();
        let complete = |blocks: usize, length| {
            let mut groups = self.windows.iter().zip(&runs);
            groups.all(|(window, runs)| {
                runs[blocks] <= first_block(*window, length, self.block_tokens)
            })
        };
        for blocks in (0..=path.len()).rev() {
            let (node, start) =
                (path[..blocks].last().copied().unwrap_or(ROOT), blocks * self.block_tokens);
            let tail = index.tail(node, &tokens[start..], limit - start);
            let tail = tail.filter(|(_, length)| complete(blocks, start + length));
            if tail.is_some() || complete(blocks, start) {
                path.truncate(blocks);
                let length = start + tail.map_or(0, |(_, length)| length);
                return self.hit(path, tail.map(|(node, _)| node), length);
            }
        }
        PrefixHit::default()
    }

    fn hit(&self, path: Vec<u32>, tail: Option<u32>, length: usize) -> PrefixHit {
        let mut hit = PrefixHit { length, shared: 0, path, tail };
        let held = |page: &u32| self.pool.references(*page) > 0;
        hit.shared = (0..self.windows.len())
            .map(|group| self.pages_of(&hit, group).1.filter(held).count())
            .sum();
        hit
    }

    /// The first block that a hit needs in a group, and the pages from there to its last full
    /// block.
    fn pages_of<'a>(
        &'a self,
        hit: &'a PrefixHit,
        group: usize,
    ) -> (usize, impl Iterator<Item = u32> + 'a) {
        let index = self.index.as_ref();
        let first = first_block(self.windows[group], hit.length, self.block_tokens);
        let page = move |&node: &u32| {
            index.and_then(|index| index.page(node, group)).expect("a hit is complete")
        };
        (first, hit.path[first.min(hit.path.len())..].iter().map(page))
    }

    /// Takes the pages of a hit, which is as [`KvCache::find`] just returned it. Nothing is copied:
    /// full blocks are shared, and a tail's pages change owner.
    pub fn acquire(&mut self, hit: PrefixHit) -> SequenceBlocks {
        let mut held = self.open();
        for group in 0..self.windows.len() {
            let (first, blocks) = self.pages_of(&hit, group);
            held.tables[group] = BlockTable { first: first as u32, blocks: blocks.collect() };
        }
        let pages = held.tables.iter().flat_map(|table| &table.blocks);
        pages.for_each(|&page| self.pool.retain(page));
        let node = hit.path.last().copied().unwrap_or(ROOT);
        if let Some(index) = &mut self.index {
            index.leave(ROOT);
            index.stand(node);
            let tail = hit.tail.map(|tail| index.take_tail(tail)).unwrap_or_default();
            for (table, page) in held.tables.iter_mut().zip(tail) {
                self.pool.retain(page);
                self.pool.forget(page);
                table.blocks.push(page);
            }
        }
        (held.indexed, held.node) = (hit.path.len(), node);
        let sequence = held.id();
        for (group, table) in (0..).zip(&held.tables) {
            if table.first > 0 {
                self.changes.push(TableChange::Slide { sequence, group, first: table.first });
            }
            if !table.blocks.is_empty() {
                let pages = table.blocks.clone();
                self.changes.push(TableChange::Extend { sequence, group, pages });
            }
        }
        held
    }

    /// Empty tables for a sequence that begins.
    fn open(&mut self) -> SequenceBlocks {
        let id = SequenceId(self.free_ids.pop().expect("no more sequences than the cache has ids"));
        self.changes.push(TableChange::Clear { sequence: id });
        if let Some(index) = &mut self.index {
            index.stand(ROOT);
        }
        let tables = vec![BlockTable::default(); self.windows.len()];
        SequenceBlocks { id: Some(id), tables, indexed: 0, node: ROOT }
    }

    /// Gives every table of `held` blocks for `length` positions, which are affordable.
    pub fn grow(&mut self, held: &mut SequenceBlocks, length: usize) {
        if held.id.is_none() {
            *held = self.open();
        }
        let before = held.end();
        for _ in held.end()..length.div_ceil(self.block_tokens) {
            for table in &mut held.tables {
                let (page, evicted) = self.pool.allocate().expect("the length is affordable");
                if let Some(index) = self.index.as_mut().filter(|_| evicted) {
                    index.lose(page).into_iter().for_each(|page| self.pool.forget(page));
                }
                table.blocks.push(page);
            }
        }
        let (sequence, end) = (held.id(), held.end());
        if end > before {
            for (group, table) in (0..).zip(&held.tables) {
                let pages = table.blocks[before - table.first as usize..].to_vec();
                self.changes.push(TableChange::Extend { sequence, group, pages });
            }
        }
    }

    /// Tells that `tokens`, all of a sequence from position 0, are computed: full blocks become
    /// known, and blocks that slid out of their group's window return to the pool.
    pub fn commit(&mut self, held: &mut SequenceBlocks, tokens: &[u32]) {
        let Some(sequence) = held.id else { return };
        if let Some(index) = self.index.as_mut() {
            for block in tokens.chunks_exact(self.block_tokens).skip(held.indexed) {
                held.node = index.advance(held.node, block);
                for (group, table) in held.tables.iter().enumerate() {
                    let page = table.blocks[held.indexed - table.first as usize];
                    if index.keep(held.node, group, page) {
                        self.pool.set_cached(page);
                    }
                }
                held.indexed += 1;
            }
        }
        for (group, (table, window)) in (0..).zip(held.tables.iter_mut().zip(&self.windows)) {
            let first = first_block(*window, tokens.len(), self.block_tokens);
            let gone = first.saturating_sub(table.first as usize).min(table.blocks.len());
            if gone == 0 {
                continue;
            }
            for page in table.blocks.drain(..gone) {
                self.pool.release(page);
            }
            table.first += gone as u32;
            self.changes.push(TableChange::Slide { sequence, group, first: table.first });
        }
    }

    /// Gives back the blocks past `length` positions, which are all that are computed.
    pub fn truncate(&mut self, held: &mut SequenceBlocks, length: usize) {
        let Some(sequence) = held.id else { return };
        let end = length.div_ceil(self.block_tokens);
        if held.end() <= end {
            return;
        }
        for (group, table) in (0..).zip(&mut held.tables) {
            for page in table.blocks.drain(end - table.first as usize..).rev() {
                self.pool.release(page);
            }
            self.changes.push(TableChange::Truncate { sequence, group, end: end as u32 });
        }
    }

    /// Gives all blocks back; `tokens` are those computed, as last told to [`KvCache::commit`]. The
    /// last blocks go first, so that of known texts the ends are evicted before the beginnings.
    pub fn release(&mut self, held: &mut SequenceBlocks, tokens: &[u32]) {
        let Some(SequenceId(id)) = held.id else { return };
        self.free_ids.push(id);
        self.keep_tail(held, tokens);
        for block in (0..held.end()).rev() {
            for table in held.tables.iter_mut().filter(|table| block >= table.first as usize) {
                self.pool.release(table.blocks.pop().expect("tables end together"));
            }
        }
        if let Some(index) = &mut self.index {
            index.leave(held.node);
        }
        *held = SequenceBlocks::default();
    }

    /// Makes the computed part of a block that is not full known. Nobody else holds its pages.
    fn keep_tail(&mut self, held: &SequenceBlocks, tokens: &[u32]) {
        let Some(index) = &mut self.index else { return };
        let tail = &tokens[held.indexed * self.block_tokens..];
        if tail.is_empty() {
            return;
        }
        let page = |table: &BlockTable| table.blocks[held.indexed - table.first as usize];
        let pages: Vec<u32> = held.tables.iter().map(page).collect();
        if let Some(replaced) = index.add_tail(held.node, tail, &pages) {
            pages.into_iter().for_each(|page| self.pool.set_cached(page));
            replaced.into_iter().for_each(|page| self.pool.forget(page));
        }
    }

    /// Panics unless pool and index agree with these tables. For tests.
    pub fn validate<'a>(&self, sequences: impl Iterator<Item = &'a SequenceBlocks>) {
        let mut references = vec![0; self.pool.pages()];
        let mut standing = Vec::new();
        let mut ids = self.free_ids.clone();
        for held in sequences.filter(|held| held.id.is_some()) {
            ids.push(held.id().0);
            assert_eq!(held.tables.len(), self.windows.len(), "a table for each group");
            for table in &held.tables {
                assert_eq!(
                    table.first as usize + table.blocks.len(),
                    held.end(),
                    "tables end together"
                );
                table.blocks.iter().for_each(|&page| references[page as usize] += 1);
            }
            standing.push(held.node);
        }
        ids.sort_unstable();
        assert!(ids.iter().zip(0..).all(|(id, n)| *id == n), "each id is free or one sequence's");
        self.pool.validate(&references);
        if let Some(index) = &self.index {
            index.validate(
                &standing,
                |page| self.pool.is_cached(page),
                |page| references[page as usize] > 0,
            );
        }
    }
}

/// For each number of blocks of `path`, where the run of pages that ends there begins.
fn runs(index: &PrefixIndex, path: &[u32], group: usize) -> Vec<usize> {
    let mut runs = vec![0];
    for (block, &node) in path.iter().enumerate() {
        let run = if index.page(node, group).is_some() { runs[block] } else { block + 1 };
        runs.push(run);
    }
    runs
}

/// The first block that the next row, at position `length`, can see: it sees positions
/// `> length - window`.
fn first_block(window: Option<usize>, length: usize, block_tokens: usize) -> usize {
    window.map_or(0, |window| (length + 1).saturating_sub(window.max(1)) / block_tokens)
}
