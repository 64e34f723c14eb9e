//! PID 1 of a virtual server.
fn main() {}
