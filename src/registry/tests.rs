//! The registry's promises, one test each.
