//! A shell in a host of the lab, with the working tree's programs in it.

use std::process::ExitCode;

use anyhow::{Context, Result};
use system_tests::lab::{Host, Image, Payload, Workshop, definition};

use crate::Options;

/// Boots the host and gives the terminal to a shell in it; the host ends with the shell.
pub fn open(workshop: &Workshop, payload: &Payload, options: &Options) -> Result<ExitCode> {
    let definition = definition::named(options.host.as_deref().unwrap_or_default())?;
    let image = Image::of(workshop, &definition, &payload.vsctl())?;
    eprintln!("lab: {} boots; it ends with the shell", definition.name);
    let host = Host::boot(workshop, &definition, &image, payload, &definition.name)?;
    eprintln!("lab: kernel {}; vsctl is installed; templates are in /var/lib/vsos-lab/templates", host.kernel());
    let (arguments, directory) = host.shell();
    let status =
        std::process::Command::new("ssh").args(arguments).current_dir(directory).status().context("run ssh")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
