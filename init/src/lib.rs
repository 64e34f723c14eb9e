//! The words that vsinit and its manager share.
