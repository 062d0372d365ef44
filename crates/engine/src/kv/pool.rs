//! `BlockPool`: pages with reference counts. Knows nothing of sequences or of what a page holds.
//!
//! A page is in one of three places: referenced by block tables; idle, that is unreferenced but
//! cached (its contents may be asked for again), in the order in which it became idle; or free.
//! Allocation takes free pages first and then the page that has been idle longest.

const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Page {
    references: u32,
    cached: bool,
    /// Neighbours in the list of idle pages.
    older: u32,
    newer: u32,
}

/// All pages of one KV cache.
#[derive(Debug)]
pub struct BlockPool {
    pages: Vec<Page>,
    free: Vec<u32>,
    oldest: u32,
    newest: u32,
    idle: usize,
}

impl BlockPool {
    /// `pages` free pages; low numbers are handed out first.
    pub fn new(pages: usize) -> Self {
        let page = Page { references: 0, cached: false, older: NONE, newer: NONE };
        let count = u32::try_from(pages).ok().filter(|&count| count < NONE);
        let count = count.expect("page numbers are u32");
        BlockPool {
            pages: vec![page; pages],
            free: (0..count).rev().collect(),
            oldest: NONE,
            newest: NONE,
            idle: 0,
        }
    }

    /// All pages.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Pages that [`BlockPool::allocate`] can give: free and idle ones.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle
    }

    /// Unreferenced pages whose contents are kept.
    pub fn idle(&self) -> usize {
        self.idle
    }

    /// Tables that hold a page.
    pub fn references(&self, page: u32) -> u32 {
        self.pages[page as usize].references
    }

    /// Whether a page's contents are kept when nobody holds it.
    pub fn is_cached(&self, page: u32) -> bool {
        self.pages[page as usize].cached
    }

    /// A page with one reference, not cached, and whether it was idle until now: then its contents
    /// are lost, and whoever remembered them must forget them.
    pub fn allocate(&mut self) -> Option<(u32, bool)> {
        let (page, evicted) = match self.free.pop() {
            Some(page) => (page, false),
            None if self.oldest != NONE => (self.oldest, true),
            None => return None,
        };
        if evicted {
            self.unlink(page);
        }
        let state = &mut self.pages[page as usize];
        state.references = 1;
        state.cached = false;
        Some((page, evicted))
    }

    /// One more table holds this referenced or idle page.
    pub fn retain(&mut self, page: u32) {
        let Page { references, cached, .. } = self.pages[page as usize];
        assert!(references > 0 || cached, "page {page} is free");
        if references == 0 {
            self.unlink(page);
        }
        self.pages[page as usize].references += 1;
    }

    /// One table less holds it; the last one makes it idle if it is cached and free otherwise.
    pub fn release(&mut self, page: u32) {
        let state = &mut self.pages[page as usize];
        assert!(state.references > 0, "page {page} is not held");
        state.references -= 1;
        if state.references > 0 {
            return;
        }
        if state.cached { self.link(page) } else { self.free.push(page) }
    }

    /// Keeps a held page's contents from now on.
    pub fn set_cached(&mut self, page: u32) {
        let state = &mut self.pages[page as usize];
        assert!(state.references > 0 && !state.cached, "page {page} cannot become cached");
        state.cached = true;
    }

    /// Stops keeping a cached page's contents; an idle page becomes free.
    pub fn forget(&mut self, page: u32) {
        assert!(self.pages[page as usize].cached, "page {page} is not cached");
        self.pages[page as usize].cached = false;
        if self.pages[page as usize].references == 0 {
            self.unlink(page);
            self.free.push(page);
        }
    }

    fn link(&mut self, page: u32) {
        let state = &mut self.pages[page as usize];
        (state.older, state.newer) = (self.newest, NONE);
        match self.newest {
            NONE => self.oldest = page,
            newest => self.pages[newest as usize].newer = page,
        }
        self.newest = page;
        self.idle += 1;
    }

    fn unlink(&mut self, page: u32) {
        let Page { older, newer, .. } = self.pages[page as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.pages[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.pages[newer as usize].older = older,
        }
        self.idle -= 1;
    }

    /// Panics unless every page is where its counts say; `references` are the counts that the
    /// block tables imply. For tests: linear in the pages.
    pub fn validate(&self, references: &[u32]) {
        let mut place = vec![0u8; self.pages.len()];
        for &page in &self.free {
            let state = &self.pages[page as usize];
            assert!(state.references == 0 && !state.cached, "free page {page} is in use");
            place[page as usize] += 1;
        }
        let (mut page, mut before, mut idle) = (self.oldest, NONE, 0);
        while page != NONE {
            let state = &self.pages[page as usize];
            assert!(
                state.references == 0 && state.cached,
                "idle page {page} is in use or not cached"
            );
            assert_eq!(state.older, before, "the idle list is torn at page {page}");
            place[page as usize] += 1;
            idle += 1;
            (before, page) = (page, state.newer);
        }
        assert_eq!(
            (self.newest, self.idle),
            (before, idle),
            "the idle list's end or length is wrong"
        );
        for (page, state) in self.pages.iter().enumerate() {
            assert_eq!(state.references, references[page], "references of page {page}");
            let expected = if state.references > 0 { 0 } else { 1 };
            assert_eq!(place[page], expected, "page {page} is in the wrong number of places");
        }
    }
}
