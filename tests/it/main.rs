//! Integration tests: the app with real stub workers.

mod stub;
