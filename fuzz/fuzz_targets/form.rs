//! The finder of a form's field beside two full parsers.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| residentd::proxy::fuzzing::form(data));
