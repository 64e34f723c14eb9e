//! Session keyrings (session-keyring(7)).

use crate::error::During;
use crate::{Result, sys};

/// Gives the caller a new, empty, anonymous session keyring, so that it no longer shares the one of who started it.
pub fn join_new_session() -> Result<()> {
    sys::keyctl_join_anonymous_session().during("join", "new session keyring")?;
    Ok(())
}
