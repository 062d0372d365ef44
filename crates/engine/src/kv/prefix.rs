//! `PrefixIndex`: finds pages that already hold the beginning of a text. Knows nothing of which
//! pages are in use; [`super::KvCache`] keeps index and pool in step.
//!
//! A node stands for one full block after one particular beginning: its tokens and its parent.
//! Nodes are found by a chained, seeded hash and then compared by parent and tokens. As the
//! parent was compared in the same way, equal nodes mean equal texts from position 0 on, whatever
//! the hash does. A node has a page for each KV group, or lacks it where the page was evicted or
//! (in a windowed group) was never needed; it lives as long as it has a page, a child, or a
//! sequence that stands on it.
//!
//! A text also ends within a block. Such a *tail* is a node with fewer tokens; its pages belong
//! to the index alone, so that one later sequence may take them over and write on after the tail
//! without a copy.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};

const NONE: u32 = u32::MAX;
/// Tails of one node at most; the oldest makes room.
const TAILS_MAX: usize = 16;

/// The empty text: parent of every first block.
pub(super) const ROOT: u32 = 0;

#[derive(Debug, Default)]
struct Node {
    parent: u32,
    hash: u64,
    /// A block's tokens, or fewer for a tail; none for the root and for vacant nodes.
    tokens: Box<[u32]>,
    /// By group.
    pages: Box<[u32]>,
    /// Children, tails and sequences that stand here.
    holders: u32,
    /// Nodes of texts that end within the next block, oldest first.
    tails: Vec<u32>,
    /// Next node of the same hash.
    next: u32,
}

/// All texts whose pages are known.
#[derive(Debug)]
pub struct PrefixIndex {
    seed: u64,
    /// All ones but in tests, which want collisions.
    hash_mask: u64,
    block_tokens: usize,
    groups: usize,
    nodes: Vec<Node>,
    vacant: Vec<u32>,
    /// First node of each hash; never iterated, so that the order of a map decides nothing.
    buckets: HashMap<u64, u32>,
    /// The node of each cached page.
    owners: Vec<u32>,
}

impl PrefixIndex {
    /// Knows no text.
    pub fn new(seed: u64, block_tokens: usize, groups: usize, pages: usize) -> Self {
        let root = Node {
            pages: vec![NONE; groups].into(),
            holders: 1,
            parent: NONE,
            next: NONE,
            ..Node::default()
        };
        PrefixIndex {
            seed,
            hash_mask: u64::MAX,
            block_tokens,
            groups,
            nodes: vec![root],
            vacant: Vec::new(),
            buckets: HashMap::new(),
            owners: vec![NONE; pages],
        }
    }

    fn node(&self, node: u32) -> &Node {
        &self.nodes[node as usize]
    }

    fn node_mut(&mut self, node: u32) -> &mut Node {
        &mut self.nodes[node as usize]
    }

    fn hash(&self, parent: u32, tokens: &[u32]) -> u64 {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.seed);
        hasher.write_u64(self.node(parent).hash);
        tokens.iter().for_each(|&token| hasher.write_u32(token));
        hasher.finish() & self.hash_mask
    }

    /// The node of a full block of `tokens` after `parent`.
    pub fn child(&self, parent: u32, tokens: &[u32]) -> Option<u32> {
        self.find(self.hash(parent, tokens), parent, tokens)
    }

    fn find(&self, hash: u64, parent: u32, tokens: &[u32]) -> Option<u32> {
        let mut node = self.buckets.get(&hash).copied().unwrap_or(NONE);
        while node != NONE {
            let Node { parent: found, tokens: block, next, .. } = self.node(node);
            if *found == parent && **block == *tokens {
                return Some(node);
            }
            node = *next;
        }
        None
    }

    /// The page of a node in a group.
    pub fn page(&self, node: u32, group: usize) -> Option<u32> {
        Some(self.node(node).pages[group]).filter(|&page| page != NONE)
    }

    /// Moves a sequence that stands on `parent` to its child of `tokens`, made if need be.
    pub fn advance(&mut self, parent: u32, tokens: &[u32]) -> u32 {
        debug_assert_eq!(tokens.len(), self.block_tokens);
        let hash = self.hash(parent, tokens);
        let node = match self.find(hash, parent, tokens) {
            Some(node) => node,
            None => {
                let node = self.insert(parent, hash, tokens);
                let first = self.buckets.insert(hash, node).unwrap_or(NONE);
                self.node_mut(node).next = first;
                node
            }
        };
        self.stand(node);
        self.leave(parent);
        node
    }

    /// A sequence stands on `node` from now on.
    pub fn stand(&mut self, node: u32) {
        self.node_mut(node).holders += 1;
    }

    /// A sequence that stood on `node` does so no more.
    pub fn leave(&mut self, node: u32) {
        self.node_mut(node).holders -= 1;
        self.collect(node);
    }

    /// Remembers a node's page unless it has one in this group; whether it did.
    pub fn keep(&mut self, node: u32, group: usize, page: u32) -> bool {
        let place = &mut self.node_mut(node).pages[group];
        let kept = *place == NONE;
        if kept {
            *place = page;
            self.owners[page as usize] = node;
        }
        kept
    }

    /// Forgets a cached page that has been given to somebody else. Returns the other pages that
    /// are worthless without it.
    pub fn lose(&mut self, page: u32) -> Vec<u32> {
        let node = std::mem::replace(&mut self.owners[page as usize], NONE);
        let pages = &mut self.node_mut(node).pages;
        *pages.iter_mut().find(|place| **place == page).expect("the owner has the page") = NONE;
        if self.is_tail(node) {
            return self.take_tail(node);
        }
        self.collect(node);
        Vec::new()
    }

    fn is_tail(&self, node: u32) -> bool {
        node != ROOT && self.node(node).tokens.len() < self.block_tokens
    }

    /// The longest tail of `parent` that `tokens` begins with, and how many of its tokens may be
    /// used if that is `limit` at most.
    pub fn tail(&self, parent: u32, tokens: &[u32], limit: usize) -> Option<(u32, usize)> {
        let usable = |&node: &u32| {
            let tail = &self.node(node).tokens;
            let common = tail.len().min(tokens.len());
            (tail[..common] == tokens[..common]).then_some((node, common.min(limit)))
        };
        let tails = self.node(parent).tails.iter().filter_map(usable);
        tails.max_by_key(|&(_, length)| length).filter(|&(_, length)| length > 0)
    }

    /// Remembers a text that ends within the block after `parent`, with a page for each group.
    /// `None` if a known tail makes it worthless. Otherwise pages to forget, of tails that it
    /// replaces.
    pub fn add_tail(&mut self, parent: u32, tokens: &[u32], pages: &[u32]) -> Option<Vec<u32>> {
        debug_assert!(
            !tokens.is_empty() && tokens.len() < self.block_tokens && pages.len() == self.groups
        );
        let tails = &self.node(parent).tails;
        if tails.iter().any(|&tail| self.node(tail).tokens.starts_with(tokens)) {
            return None;
        }
        let shorter =
            tails.iter().copied().find(|&tail| tokens.starts_with(&self.node(tail).tokens));
        let oldest = (tails.len() == TAILS_MAX).then(|| tails[0]);
        let node = self.insert(parent, 0, tokens);
        self.node_mut(parent).tails.push(node);
        for (group, &page) in pages.iter().enumerate() {
            self.keep(node, group, page);
        }
        Some(shorter.or(oldest).map(|tail| self.take_tail(tail)).unwrap_or_default())
    }

    /// Hands out the pages of a tail, by group, and forgets it.
    pub fn take_tail(&mut self, node: u32) -> Vec<u32> {
        debug_assert!(self.is_tail(node));
        let none = vec![NONE; self.groups].into();
        let pages = std::mem::replace(&mut self.node_mut(node).pages, none);
        let pages: Vec<u32> = pages.into_iter().filter(|&page| page != NONE).collect();
        pages.iter().for_each(|&page| self.owners[page as usize] = NONE);
        self.collect(node);
        pages
    }

    fn insert(&mut self, parent: u32, hash: u64, tokens: &[u32]) -> u32 {
        self.node_mut(parent).holders += 1;
        let pages = vec![NONE; self.groups].into();
        let node =
            Node { parent, hash, tokens: tokens.into(), pages, next: NONE, ..Node::default() };
        match self.vacant.pop() {
            Some(vacant) => {
                *self.node_mut(vacant) = node;
                vacant
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() as u32 - 1
            }
        }
    }

    /// Removes a node that nobody needs, and then its parents if they were there for it alone.
    fn collect(&mut self, mut node: u32) {
        while node != ROOT {
            let Node { parent, holders, pages, .. } = self.node(node);
            if *holders > 0 || pages.iter().any(|&page| page != NONE) {
                return;
            }
            let parent = *parent;
            if self.is_tail(node) {
                self.node_mut(parent).tails.retain(|&tail| tail != node);
            } else {
                self.unlink(node);
            }
            *self.node_mut(node) = Node::default();
            self.vacant.push(node);
            self.node_mut(parent).holders -= 1;
            node = parent;
        }
    }

    /// Takes a full node out of its hash's list.
    fn unlink(&mut self, node: u32) {
        let Node { hash, next, .. } = *self.node(node);
        let mut at = self.buckets[&hash];
        if at == node {
            match next {
                NONE => drop(self.buckets.remove(&hash)),
                next => drop(self.buckets.insert(hash, next)),
            }
            return;
        }
        while self.node(at).next != node {
            at = self.node(at).next;
        }
        self.node_mut(at).next = next;
    }

    /// Panics unless nodes, owners and counts agree. `standing` are the nodes that sequences
    /// stand on, `is_cached` and `is_held` tell of pages. For tests.
    pub fn validate(
        &self,
        standing: &[u32],
        is_cached: impl Fn(u32) -> bool,
        is_held: impl Fn(u32) -> bool,
    ) {
        let mut holders = vec![0u32; self.nodes.len()];
        holders[ROOT as usize] = 1;
        standing.iter().for_each(|&node| holders[node as usize] += 1);
        let live = |node: usize| node == ROOT as usize || !self.nodes[node].tokens.is_empty();
        for node in (1..self.nodes.len()).filter(|&node| live(node)) {
            let Node { parent, pages, tails, tokens, .. } = &self.nodes[node];
            assert!(live(*parent as usize), "node {node} has no parent");
            holders[*parent as usize] += 1;
            for &page in pages.iter().filter(|&&page| page != NONE) {
                assert_eq!(self.owners[page as usize], node as u32, "owner of page {page}");
            }
            if self.is_tail(node as u32) {
                assert!(self.node(*parent).tails.contains(&(node as u32)));
                assert!(
                    pages.iter().all(|&page| page != NONE && !is_held(page)),
                    "tail {node} lacks a page"
                );
                assert!(tails.is_empty());
            } else {
                assert_eq!(
                    self.child(*parent, tokens),
                    Some(node as u32),
                    "node {node} cannot be found"
                );
            }
        }
        for (node, &holders) in holders.iter().enumerate() {
            assert_eq!(self.nodes[node].holders, holders, "holders of node {node}");
            let needed = holders > 0 || self.nodes[node].pages.iter().any(|&page| page != NONE);
            assert_eq!(live(node), needed, "node {node} is not collected, or too soon");
        }
        for (page, &owner) in self.owners.iter().enumerate() {
            assert_eq!(
                owner != NONE,
                is_cached(page as u32),
                "page {page} is cached without owner or so"
            );
            assert!(
                owner == NONE || self.node(owner).pages.contains(&(page as u32)),
                "page {page} is not its owner's"
            );
        }
        assert_eq!(
            self.vacant.len() + (0..self.nodes.len()).filter(|&node| live(node)).count(),
            self.nodes.len()
        );
    }

    /// Nodes that exist, the root included.
    pub fn nodes(&self) -> usize {
        self.nodes.len() - self.vacant.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn collisions_do_not_confuse_texts() {
        let mut index = PrefixIndex::new(3, 2, 1, 100);
        index.hash_mask = 1;
        // 27 texts of three blocks over three tokens, all in two hashes.
        let text = |n: u32| [n % 3, 0, n / 3 % 3, 0, n / 9, 0];
        let mut ends = Vec::new();
        for n in 0..27 {
            let mut node = ROOT;
            index.stand(ROOT);
            for block in text(n).chunks(2) {
                node = index.advance(node, block);
            }
            assert!(index.keep(node, 0, n));
            ends.push(node);
        }
        for n in 0..27 {
            let walk = text(n).chunks(2).try_fold(ROOT, |node, block| index.child(node, block));
            assert_eq!(walk, Some(ends[n as usize]));
            assert_eq!(index.page(ends[n as usize], 0), Some(n));
        }
        index.validate(&ends, |page| page < 27, |_| true);
        for n in 0..27 {
            index.leave(ends[n as usize]);
            assert!(index.lose(n).is_empty());
            index.validate(&ends[n as usize + 1..], |page| n < page && page < 27, |_| true);
        }
        assert_eq!(index.nodes(), 1, "only the root is left");
        assert!(index.buckets.is_empty());
    }

    #[test]
    fn tails_are_found_replaced_and_taken() {
        let mut index = PrefixIndex::new(0, 4, 2, 100);
        assert_eq!(index.add_tail(ROOT, &[1, 2], &[0, 1]), Some(vec![]));
        assert_eq!(index.add_tail(ROOT, &[1], &[2, 3]), None, "a longer one is known");
        assert_eq!(
            index.add_tail(ROOT, &[1, 2, 3], &[4, 5]),
            Some(vec![0, 1]),
            "the shorter one goes"
        );
        assert_eq!(index.tail(ROOT, &[1, 2, 9], 2), None, "other tokens");
        assert_eq!(index.tail(ROOT, &[1, 2, 3, 9], 3).map(|tail| tail.1), Some(3));
        let (node, length) = index.tail(ROOT, &[1, 2, 3], 2).unwrap();
        assert_eq!(length, 2, "the last token must be computed");
        assert_eq!(index.take_tail(node), [4, 5]);
        assert_eq!(index.tail(ROOT, &[1, 2, 3], 2), None);
        for n in 0..20 {
            let forgotten = index.add_tail(ROOT, &[n, n], &[2 * n, 2 * n + 1]).unwrap();
            assert_eq!(forgotten.len(), if n < 16 { 0 } else { 2 });
        }
        assert_eq!(index.lose(39), [38], "the other group's page is worthless alone");
        assert_eq!(index.nodes(), 16);
    }
}
