//! The scanner for a body's model beside serde_json.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| residentd::proxy::fuzzing::scan(data));
