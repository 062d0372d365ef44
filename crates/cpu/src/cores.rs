//! The processors that this process may use: one of each physical core, within its affinity mask
//! (which includes the cpuset of its control group) and within the quota of its control group.
//!
//! The standard library reads the quota. It reads the files of both versions of control groups up
//! to the root of the hierarchy: `cpu.max`, and `cpu.cfs_quota_us` over `cpu.cfs_period_us`,
//! rounded down.

/// The cores that this process may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cores {
    /// The useful number of threads: the number of physical cores, or less if a control group's
    /// quota says so.
    pub count: usize,
    /// One logical processor of each physical core that this process may use. It is empty where the
    /// system does not say, or where there is a quota: other processes share the cores then, and
    /// binding threads would do harm.
    pub ids: Vec<usize>,
}

/// Physical cores within this process's affinity mask and control-group quota.
pub fn available_cores() -> Cores {
    let limit = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    choose(&affinity(), limit, |id| {
        let path = format!("/sys/devices/system/cpu/cpu{id}/topology/thread_siblings_list");
        std::fs::read_to_string(path).ok()
    })
}

/// The cores of the logical processors `allowed`, of which at most `limit` may be busy at a time.
/// `siblings` gives the system's list of the hardware threads of a processor's core, its own
/// included.
fn choose(allowed: &[usize], limit: usize, siblings: impl Fn(usize) -> Option<String>) -> Cores {
    let mut ids: Vec<usize> = Vec::new();
    let mut seen = Vec::new();
    for &id in allowed {
        let list = siblings(id).as_deref().and_then(parse_list).unwrap_or_else(|| vec![id]);
        if !seen.contains(&id) {
            ids.push(id);
            seen.extend(list);
        }
    }
    if ids.is_empty() {
        return Cores { count: limit, ids };
    }
    let count = ids.len().min(limit);
    if limit < allowed.len() {
        ids.clear();
    }
    Cores { count, ids }
}

/// The processors of a list in the kernel's notation, such as `0-3,8`. `None` if it is malformed.
fn parse_list(text: &str) -> Option<Vec<usize>> {
    // No machine has more processors. A longer range is a damaged file.
    const PROCESSORS_MAX: usize = 1 << 16;
    let mut ids = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if last < first || last >= PROCESSORS_MAX {
            return None;
        }
        ids.extend(first..=last);
    }
    Some(ids)
}

#[cfg(target_os = "linux")]
fn affinity() -> Vec<usize> {
    // SAFETY: a zeroed cpu_set_t is an empty set, and the call writes at most its size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) != 0 {
            return Vec::new();
        }
        (0..libc::CPU_SETSIZE as usize).filter(|&id| libc::CPU_ISSET(id, &set)).collect()
    }
}

/// Binds the calling thread to one processor. A refusal is harmless.
#[cfg(target_os = "linux")]
pub(crate) fn bind_to(core: usize) {
    // SAFETY: the set is valid and `core` came from the system's own mask.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
    }
}

#[cfg(not(target_os = "linux"))]
fn affinity() -> Vec<usize> {
    Vec::new()
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn bind_to(_core: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_of(text: &'static str) -> impl Fn(usize) -> Option<String> {
        move |id| {
            let lists = text.split_whitespace();
            let own = |list: &&str| parse_list(list).is_some_and(|ids| ids.contains(&id));
            lists.into_iter().find(own).map(|list| format!("{list}\n"))
        }
    }

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_list("0\n"), Some(vec![0]));
        assert_eq!(parse_list("0-1\n"), Some(vec![0, 1]));
        assert_eq!(parse_list("3,67"), Some(vec![3, 67]));
        assert_eq!(parse_list("0-2,8,10-11\n"), Some(vec![0, 1, 2, 8, 10, 11]));
        for bad in ["", "\n", "a", "1-", "-1", "3-1", "0-99999999999", "0-18446744073709551615"] {
            assert_eq!(parse_list(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_core_counts_once() {
        // Hardware threads of a core have neighbouring numbers (Arm, some Xeons), or lie half the
        // processors apart (most x86).
        let beside = choose(&[0, 1, 2, 3], 4, all_of("0-1 2-3"));
        assert_eq!(beside, Cores { count: 2, ids: vec![0, 2] });
        let halves = choose(&[0, 1, 2, 3, 4, 5, 6, 7], 8, all_of("0,4 1,5 2,6 3,7"));
        assert_eq!(halves, Cores { count: 4, ids: vec![0, 1, 2, 3] });
        // One core has four hardware threads, another has one.
        let four = choose(&[0, 1, 2, 3, 4], 5, all_of("0-3 4"));
        assert_eq!(four, Cores { count: 2, ids: vec![0, 4] });
        let untold = choose(&[0, 1, 2], 3, |_| None);
        assert_eq!(untold, Cores { count: 3, ids: vec![0, 1, 2] });
    }

    #[test]
    fn a_cpuset_narrows_the_choice() {
        // Both threads of core 1 are allowed, and only the second thread of cores 2 and 3.
        let cores = choose(&[1, 5, 6, 7], 4, all_of("0,4 1,5 2,6 3,7"));
        assert_eq!(cores, Cores { count: 3, ids: vec![1, 6, 7] });
    }

    #[test]
    fn a_quota_limits_the_count_and_forbids_binding() {
        let siblings = || all_of("0,4 1,5 2,6 3,7");
        let all = [0, 1, 2, 3, 4, 5, 6, 7];
        assert_eq!(choose(&all, 3, siblings()), Cores { count: 3, ids: vec![] });
        // The limit is below the number of allowed processors, so other programs run on these cores
        // too.
        assert_eq!(choose(&all, 4, siblings()), Cores { count: 4, ids: vec![] });
        assert_eq!(choose(&all, 7, siblings()), Cores { count: 4, ids: vec![] });
        assert_eq!(choose(&[2], 1, siblings()), Cores { count: 1, ids: vec![2] });
        // Without an affinity mask only the limit is known.
        assert_eq!(choose(&[], 6, siblings()), Cores { count: 6, ids: vec![] });
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_mask_of_a_thread_is_honoured() {
        let found = std::thread::spawn(|| {
            let last = *affinity().last().expect("a processor");
            bind_to(last);
            (last, affinity(), available_cores())
        });
        let (last, allowed, cores) = found.join().expect("the thread ends");
        assert_eq!(allowed, [last]);
        assert_eq!(cores, Cores { count: 1, ids: vec![last] });
    }
}
