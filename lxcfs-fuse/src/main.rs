//! The FUSE overlay.
fn main() {}
