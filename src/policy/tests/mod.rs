//! One rule of the policy at a time, told as a story.

mod admission;
mod ceilings;
mod configuring;
mod explaining;
mod health;
mod leaving;
mod parked;
mod parking;
mod patience;
mod prefetching;
mod waking;
