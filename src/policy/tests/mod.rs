//! One rule of the policy at a time, told as a story.

mod admission;
mod ceilings;
mod explaining;
mod leaving;
mod patience;
mod waking;
