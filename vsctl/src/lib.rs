//! The manager of virtual servers.
