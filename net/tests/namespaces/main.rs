//! Tests in network namespaces of their own; need root.
fn main() {}
