//! The example serves two streams and cancels one.

#[path = "../examples/two_streams.rs"]
mod example;

#[test]
fn two_streams_of_which_one_is_cancelled() {
    example::main().expect("both are served");
}
