//! What steps act upon: the site, kernel objects opened once, and the processes that a start has made so far.
//!
//! A world for taking back (stop, recovery) has no processes: undos find everything by name.

use std::cell::{OnceCell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kernel::cgroup::Group;
use net::Netlink;
use net::firewall::{Firewall, Ruleset};

use super::batch::Batch;
use super::boot::BootPlan;
use super::execute::Host;
use super::inside::Inside;
use super::restore::Image;
use super::step::Step;
use crate::aside::Errand;
use crate::monitor::Running;
use crate::site::Site;

/// How long it may take to compare memory with its checksums: longer than any disk needs that is not broken.
const COMPARE_LIMIT: Duration = Duration::from_secs(3600);

/// The host as one command sees it.
#[derive(Debug)]
pub struct World<'a> {
    /// The installation.
    pub site: &'a Site,
    /// What it shares with the other servers of a command.
    pub batch: Rc<Batch>,
    netlink: OnceCell<Netlink>,
    firewall: Option<Firewall>,
    /// What to boot; present in a start only.
    pub boot: Option<BootPlan>,
    /// What to restore instead of booting.
    pub image: Option<Image>,
    /// Who looks whether all of that is whole, until it is known.
    pub reading: RefCell<Option<Errand>>,
    /// The process in the new namespaces, between its step and the boot.
    pub inside: Option<Inside>,
    /// The root as the host sees it.
    pub root: Option<PathBuf>,
    /// The server's init, once it runs.
    pub running: Option<Running>,
}

impl<'a> World<'a> {
    /// A world of which nothing has been opened yet.
    pub fn new(site: &'a Site) -> Self {
        Self::sharing(site, Rc::default())
    }

    /// The same, with what has been found out for other servers.
    pub fn sharing(site: &'a Site, batch: Rc<Batch>) -> Self {
        Self {
            site,
            batch,
            netlink: OnceCell::new(),
            firewall: None,
            boot: None,
            image: None,
            reading: RefCell::new(None),
            inside: None,
            root: None,
            running: None,
        }
    }

    /// The cgroup at `path` below the hierarchies' roots.
    ///
    /// # Errors
    /// When the host's hierarchies cannot be read.
    pub fn group(&self, path: &str) -> Result<Group> {
        Ok(Group::new(self.batch.hierarchies()?, path))
    }

    /// The netlink socket of the host's network.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn netlink(&self) -> Result<&Netlink> {
        if self.netlink.get().is_none() {
            let _ = self.netlink.set(Netlink::open()?);
        }
        self.netlink.get().ok_or_else(|| anyhow!("no netlink socket"))
    }

    /// The site's firewall rules.
    ///
    /// # Errors
    /// When the site's networks cannot be read.
    pub fn ruleset(&self) -> Result<Ruleset> {
        let networks = self.batch.networks(self.site)?;
        Ok(Ruleset {
            table: self.site.table(),
            bridge: self.site.bridge(),
            port_prefix: self.site.link_prefix(),
            v4: Some(networks.ipv4),
            v6: Some(networks.ipv6),
        })
    }

    /// The site's nft tables. Kept open: closing after a removal waits for the kernel, and at the end nobody minds.
    ///
    /// # Errors
    /// When the socket cannot be opened.
    pub fn firewall(&mut self) -> Result<&mut Firewall> {
        let opened = match self.firewall.take() {
            Some(opened) => opened,
            None => Firewall::open(self.site.table())?,
        };
        Ok(self.firewall.insert(opened))
    }

    /// Waits until what is restored is known to be whole.
    ///
    /// # Errors
    /// When it is not.
    pub fn compared(&self) -> Result<()> {
        let Some(reading) = self.reading.borrow_mut().take() else { return Ok(()) };
        reading.end(COMPARE_LIMIT).map(drop).context("compare its memory with the checksums")
    }

    /// The process in the new namespaces.
    ///
    /// # Errors
    /// When there is none: the plan is out of order.
    pub fn inside(&self) -> Result<&Inside> {
        self.inside.as_ref().ok_or_else(|| anyhow!("the server's namespaces are not there yet"))
    }
}

impl Host for World<'_> {
    fn apply(&mut self, step: &Step) -> Result<()> {
        step.apply(self)
    }

    fn undo(&mut self, step: &Step) -> Result<()> {
        step.undo(self)
    }
}
