//! Built with the modules it runs; see ARCHITECTURE.md.
fn main() {}
