//! System-call filters for a whole virtual server (seccomp(2)).
//!
//! A deny list: a server runs every program of a distribution, so what is not known to harm is allowed. Three ABIs:
//! x86_64, x32 and i386; any other gets ENOSYS. Nothing is ever killed: a program that asks for too much is told so.
//!
//! The order is made for the common case: one comparison for the ABI, then a binary search that ends in "allow".
//! Where arguments need not be read, Linux ≥ 5.11 finds that out when the filter is installed and never runs it at all.
//!
//! Two calls that no file system can answer for can be left to a process outside: [`Listener`].

mod assemble;
#[cfg(test)]
mod interpret;
mod listener;
mod profile;

pub use listener::{Abi, Answer, Call, Listener, Notification, Slot};
pub use profile::{Filter, Profile};
