//! `DraftTree`: tokens that may follow a text, each after another one.

/// A tree of tokens under the last token of a text. A node comes after its parent, so that the
/// first nodes of a tree are a tree too.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DraftTree {
    tokens: Vec<u32>,
    /// By node: its parent; `None` follows the text itself.
    parents: Vec<Option<u32>>,
    /// By node: nodes on the path to it, itself included.
    depths: Vec<u32>,
}

impl DraftTree {
    /// Nodes of a tree at most: a step's tree has a row for the text's last token too.
    pub const NODES_MAX: usize = lathe_program::TREE_ROWS_MAX - 1;

    /// Nodes.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Removes all nodes and keeps the memory.
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Keeps the first `nodes`.
    pub fn truncate(&mut self, nodes: usize) {
        self.tokens.truncate(nodes);
        self.parents.truncate(nodes);
        self.depths.truncate(nodes);
    }

    /// Adds `token` after node `parent`, or after the text itself, and returns its node. Where
    /// that node exists already, it stays the only one.
    ///
    /// # Panics
    /// If `parent` is no node, or the tree is full.
    pub fn push(&mut self, parent: Option<usize>, token: u32) -> usize {
        if let Some(node) = self.child(parent, token) {
            return node;
        }
        assert!(self.len() < Self::NODES_MAX, "a tree has at most {} nodes", Self::NODES_MAX);
        assert!(parent.is_none_or(|parent| parent < self.len()), "a parent comes first");
        self.depths.push(parent.map_or(0, |parent| self.depths[parent]) + 1);
        self.parents.push(parent.map(|parent| parent as u32));
        self.tokens.push(token);
        self.len() - 1
    }

    /// The token of a node.
    pub fn token(&self, node: usize) -> u32 {
        self.tokens[node]
    }

    /// The parent of a node; `None` if it follows the text itself.
    pub fn parent(&self, node: usize) -> Option<usize> {
        self.parents[node].map(|parent| parent as usize)
    }

    /// Nodes on the path to a node, itself included.
    pub fn depth(&self, node: usize) -> usize {
        self.depths[node] as usize
    }

    /// The node of `token` after `parent`.
    pub fn child(&self, parent: Option<usize>, token: u32) -> Option<usize> {
        let parent = parent.map(|parent| parent as u32);
        let nodes = self.parents.iter().zip(&self.tokens);
        nodes.into_iter().position(|node| node == (&parent, &token))
    }

    /// Whether each node follows the one before it.
    pub fn is_chain(&self) -> bool {
        let mut nodes = (0..self.len()).map(|node| (node, self.parent(node)));
        nodes.all(|(node, parent)| parent == node.checked_sub(1))
    }

    /// The masks of a step's rows: row 0 is the text's last token, row `i + 1` is node `i`.
    pub(crate) fn ancestors(&self) -> Vec<u64> {
        let mut masks = vec![1];
        for node in 0..self.len() {
            let above = masks[self.parent(node).map_or(0, |parent| parent + 1)];
            masks.push(above | 1 << (node + 1));
        }
        masks
    }

    /// Calls `f` with the tokens on the path to `node`, the last one first.
    pub(crate) fn for_each_above(&self, node: usize, mut f: impl FnMut(u32)) {
        let mut at = Some(node);
        while let Some(node) = at {
            f(self.tokens[node]);
            at = self.parent(node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_name_the_path() {
        let mut tree = DraftTree::default();
        let a = tree.push(None, 5);
        let b = tree.push(Some(a), 6);
        assert!(tree.is_chain());
        let c = tree.push(None, 7);
        let d = tree.push(Some(b), 6);
        assert_eq!((tree.push(Some(a), 6), tree.len()), (b, 4), "a node is there once");
        assert!(!tree.is_chain());
        assert_eq!(tree.ancestors(), [0b1, 0b11, 0b111, 0b1001, 0b10111]);
        assert_eq!([a, b, c, d].map(|node| tree.depth(node)), [1, 2, 1, 3]);
        assert_eq!(tree.child(None, 7), Some(c));
        assert_eq!(tree.child(Some(c), 7), None);
        let mut path = Vec::new();
        tree.for_each_above(d, |token| path.push(token));
        assert_eq!(path, [6, 6, 5]);
        tree.truncate(3);
        assert_eq!(tree.child(Some(b), 6), None);
    }
}
