//! The Linux facilities that are not networking, as values.
