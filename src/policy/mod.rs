//! The pure core: which workers run.

mod words;

pub use words::{
    EvictReason, Expected, ExpectedSource, Phase, PressureLevel, Protection, Refusal, Skip,
};
