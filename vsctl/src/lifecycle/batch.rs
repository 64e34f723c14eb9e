//! What is the same for all servers that one command starts: found out once, and inherited by the process that is forked
//! for each. What is read here may change while the command goes on; the servers of one command then still start alike.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use kernel::bpf::LoadedDeviceProgram;
use kernel::cgroup::Hierarchies;

use super::group;
use crate::name::Name;
use crate::network::Networks;
use crate::site::Site;
use crate::template::Templates;

/// Filled as it is asked for.
#[derive(Debug, Default)]
pub struct Batch {
    hierarchies: OnceCell<Hierarchies>,
    networks: OnceCell<Networks>,
    templates: RefCell<BTreeMap<Name, TemplateInit>>,
    programs: RefCell<Vec<(Vec<String>, LoadedDeviceProgram)>>,
}

/// What a start has to know of a template.
#[derive(Debug, Clone)]
pub struct TemplateInit {
    /// `vsinit`, or a program of the guest.
    pub init: String,
    /// The signal that asks it to power off.
    pub stop_signal: i32,
}

impl Batch {
    /// The host's cgroup hierarchies. Their list stands among all mounts of the host, several for each running server.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn hierarchies(&self) -> Result<&Hierarchies> {
        if self.hierarchies.get().is_none() {
            let _ = self.hierarchies.set(Hierarchies::detect()?);
        }
        self.hierarchies.get().ok_or_else(|| anyhow!("no cgroup hierarchies"))
    }

    /// The site's networks.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn networks(&self, site: &Site) -> Result<&Networks> {
        if self.networks.get().is_none() {
            let _ = self.networks.set(Networks::of(site)?);
        }
        self.networks.get().ok_or_else(|| anyhow!("no networks"))
    }

    /// The init of a template.
    ///
    /// # Errors
    /// When the template is gone or cannot be used.
    pub fn template(&self, site: &Site, name: &Name) -> Result<TemplateInit> {
        if let Some(found) = self.templates.borrow().get(name) {
            return Ok(found.clone());
        }
        let definition = Templates::below(&site.state()).open(name)?.definition;
        let found = TemplateInit { stop_signal: definition.stop_signal_number()?, init: definition.init.into() };
        self.templates.borrow_mut().insert(name.clone(), found.clone());
        Ok(found)
    }

    /// Hands the program that allows the harmless devices and `devices` to `attach`. Checking one takes the kernel longer
    /// than most steps of a start, and any number of groups can share it.
    ///
    /// # Errors
    /// When a device is none, or the kernel refuses.
    pub fn with_device_program<T>(
        &self,
        devices: &[String],
        attach: impl FnOnce(&LoadedDeviceProgram) -> Result<T>,
    ) -> Result<T> {
        let mut programs = self.programs.borrow_mut();
        let known = programs.iter().position(|(of, _)| of == devices);
        let index = match known {
            Some(index) => index,
            None => {
                programs.push((devices.to_vec(), group::device_program(devices)?.load()?));
                programs.len() - 1
            }
        };
        attach(&programs[index].1)
    }

    /// Finds out before the fork what the child would find out again for each server.
    ///
    /// # Errors
    /// As the step that needs it.
    pub fn prepare(&self, devices: &[String]) -> Result<()> {
        self.hierarchies()?;
        self.with_device_program(devices, |_| Ok(()))
    }
}
