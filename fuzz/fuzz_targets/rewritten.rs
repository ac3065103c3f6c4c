//! The rewriting of JSON beside parsing, changing and writing.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| residentd::proxy::fuzzing::rewritten(data));
