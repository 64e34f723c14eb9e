//! Templates as a user meets them. What needs root says so.
use super::*;
