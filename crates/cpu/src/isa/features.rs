//! The instructions that kernels are compiled for, listed once.
//!
//! Each list makes two things. One is the attribute that compiles a function for those instructions
//! ([`with_features`]). The other is a function that says whether this machine has them. Both
//! vector vocabularies ([`super::Simd`] and [`crate::lanes::Lanes`]) use them. A function that is
//! too long for a macro writes its list out, and a test compares it with the lists of this file.

/// Makes `with_features` and the detecting functions. `$d` must be a dollar sign: a macro that
/// makes a macro cannot write one itself.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! feature_lists {
    ($d:tt $detected:ident: $($(#[$doc:meta])* $name:ident = [$($feature:tt)+];)*) => {
        /// Compiles a function for a list of this file: `with_features! { avx2 => fn ... }`.
        macro_rules! with_features {
            $(($name => $d($d item:tt)*) => {
                #[target_feature($(enable = $feature),+)]
                $d($d item)*
            };)*
        }
        pub(crate) use with_features;

        $($(#[$doc])* pub(crate) fn $name() -> bool {
            $(std::arch::$detected!($feature))&&+
        })*

        /// The lists as attributes write them, each feature with a comma after it.
        #[cfg(all(test, target_arch = "x86_64"))]
        const LISTS: &[&str] = &[$(concat!($($feature, ","),+)),*];
    };
}

#[cfg(target_arch = "x86_64")]
feature_lists! {
    $ is_x86_feature_detected:
    /// Haswell, Zen 1 and later.
    avx2 = ["avx2" "fma" "f16c"];
    /// Alder Lake, Zen 5 and later.
    avx_vnni = ["avx2" "fma" "f16c" "avxvnni"];
    /// Cascade Lake, Zen 4 and later.
    avx512 = ["avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512vnni"];
    /// Cooper Lake, Sapphire Rapids, Zen 4 and later.
    avx512_bf16 = ["avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512vnni"
        "avx512bf16"];
}

#[cfg(target_arch = "aarch64")]
feature_lists! {
    $ is_aarch64_feature_detected:
    /// Every 64-bit Arm processor.
    neon = ["neon"];
    /// Arm v8.2 with the dot product of signed bytes.
    neon_dot = ["neon" "dotprod"];
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use std::path::Path;

    use super::LISTS;

    /// The lists of all attributes in the files under `folder`.
    fn written_lists(folder: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).expect("the crate's sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                written_lists(&path, found);
            } else {
                let text = std::fs::read_to_string(&path).expect("a source file");
                let lists = text.split(concat!("#[target_feature(", "enable = \"")).skip(1);
                found.extend(lists.filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())));
            }
        }
    }

    #[test]
    fn every_function_is_compiled_for_a_list_that_is_detected() {
        let mut found = Vec::new();
        written_lists(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
        assert!(found.len() > 5, "the attributes were found: {found:?}");
        for list in found {
            assert!(LISTS.contains(&format!("{list},").as_str()), "{list} is not in {LISTS:?}");
        }
    }
}
