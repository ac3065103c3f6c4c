//! The reader of workers' answers beside hyper's client.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| residentd::proxy::fuzzing::answer(data));
