//! Create, start, stop, destroy.
use anyhow::Result;
use system_tests::{promises, site::Site};

promises![a_stopped_server_starts; each of ["busybox"]: x];

fn a_stopped_server_starts(site: &Site) -> Result<()> {
    site.template("busybox")?.server("web1").start()?.stop()?;
    Ok(())
}
fn x(site: &Site, t: &str) -> Result<()> {
    site.template(t)?.server("web1").start()?.stop()?;
    Ok(())
}
