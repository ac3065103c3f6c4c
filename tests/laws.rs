//! Laws of the policy.
