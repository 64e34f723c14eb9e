//! The harness of the system tests: promises to a user, kept on a real kernel.
//!
//! A [`Promise`](promise::Promise) is a function with a sentence for a name. Each gets a [`Site`](site::Site) of its
//! own: an installation under a temporary `VSOS_ROOT`, so that it shares nothing with the host's installation. The
//! host is listed before and after ([`host::HostState`]) and a difference fails the promise.
//!
//! The harness drives the programs from outside, through their command line, and knows none of their types: what a
//! script cannot see, it does not test. [`lab`] makes hosts in virtual machines, and runs the same promises in them.

#![forbid(unsafe_code)]

pub mod ability;
pub mod command;
pub mod dialogue;
pub mod host;
pub mod lab;
pub mod outside;
pub mod promise;
pub mod sample;
pub mod server;
pub mod site;
pub mod stranger;
pub mod survivor;
pub mod tarball;
pub mod terminal;
