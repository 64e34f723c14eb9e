//! Password hashes for shadow(5).

use anyhow::{Result, anyhow, bail};
use rustix::rand::{GetRandomFlags, getrandom};

use super::During;
use sha_crypt::{PasswordHasher, ShaCrypt};

/// Twelve bytes are sixteen characters, all that crypt(5) allows a salt; the crate's own choice is longer, and
/// hashes with it are refused by every libc.
const SALT_BYTES: usize = 12;

/// A SHA-512 hash of `password` (`$6$…`), which every libc can check, with a salt from the kernel.
pub fn hash(password: &str) -> Result<String> {
    if password.is_empty() {
        bail!("the password is empty");
    }
    if password.contains(['\0', '\n', '\r']) {
        bail!("the password has a line break or a NUL in it");
    }
    let mut salt = [0u8; SALT_BYTES];
    if getrandom(&mut salt, GetRandomFlags::empty()).during("ask for random bytes")? != SALT_BYTES {
        bail!("the kernel gave too few random bytes");
    }
    with_salt(password, &salt)
}

fn with_salt(password: &str, salt: &[u8; SALT_BYTES]) -> Result<String> {
    let hash = ShaCrypt::SHA512.hash_password_with_salt(password.as_bytes(), salt);
    hash.map(|hash| hash.to_string()).map_err(|error| anyhow!("hash the password: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expectation is what crypt(3) of glibc 2.36 answered for the password and the salt.
    #[test]
    fn the_hash_is_what_crypt_computes() {
        let hash = with_salt("pässword 1", b"twelve bytes").unwrap();
        assert_eq!(
            hash,
            "$6$rounds=5000$oRLNgNLNU6KSoJqQ$Tl7S9xYW629TIUX0epoMBWwJVnRTGYQouhACnTwsgTtQ3KlF1LdSkds3xF7MjXDTr4GgRMXsLjFKs9LApG/0r1"
        );
    }

    #[test]
    fn two_hashes_differ_and_nonsense_is_refused() {
        assert_ne!(hash("x").unwrap(), hash("x").unwrap());
        assert!(hash("").is_err() && hash("a\nb").is_err());
    }
}
