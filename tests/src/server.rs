//! Fixtures by stage: template, draft, created server, running server. Dropped, a server is destroyed.
//!
//! Each stage is a type, so that a promise cannot use a server that is not there yet.

use std::{ops::Deref, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    command::{Background, Finished, eventually},
    site::Site,
    terminal::Terminal,
};

/// How long a guest may take for what it does by itself: boot, shut down, start a service.
pub const GUEST_LIMIT: Duration = Duration::from_secs(60);

/// A template in a site.
pub struct Template<'s> {
    site: &'s Site,
    name: String,
}

/// A server that is described and not yet created.
pub struct Draft<'s> {
    site: &'s Site,
    template: String,
    name: String,
    flags: Vec<String>,
}

/// A server that exists.
pub struct Server<'s> {
    site: &'s Site,
    name: String,
}

/// A server that was started. It may have stopped since: that is for the promise to say.
pub struct Running<'s> {
    server: Server<'s>,
}

impl<'s> Template<'s> {
    pub(crate) fn new(site: &'s Site, name: &str) -> Self {
        Self { site, name: name.to_owned() }
    }

    /// Describes a server that is made from it.
    pub fn server(&self, name: &str) -> Draft<'s> {
        Draft { site: self.site, template: self.name.clone(), name: name.to_owned(), flags: Vec::new() }
    }
}

impl<'s> Draft<'s> {
    /// Adds flags of `vsctl create`, separated by blanks.
    pub fn with(mut self, flags: &str) -> Self {
        self.flags.extend(flags.split_whitespace().map(str::to_owned));
        self
    }

    /// The command line that creates it, for those who want to see it fail.
    pub fn command(&self) -> Vec<String> {
        let fixed = ["create", &self.name, "--template", &self.template].map(str::to_owned);
        fixed.into_iter().chain(self.flags.iter().cloned()).collect()
    }

    /// Creates it.
    pub fn create(self) -> Result<Server<'s>> {
        self.site.ok(self.command())?;
        Ok(Server { site: self.site, name: self.name })
    }

    /// Creates and starts it.
    pub fn start(self) -> Result<Running<'s>> {
        self.create()?.start()
    }
}

impl<'s> Server<'s> {
    /// The server `name`, which something else created in `site`; it is destroyed with this.
    pub fn adopt(site: &'s Site, name: &str) -> Self {
        Self { site, name: name.to_owned() }
    }

    /// The installation it belongs to.
    pub fn site(&self) -> &'s Site {
        self.site
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts it.
    pub fn start(self) -> Result<Running<'s>> {
        self.site.ok(["start", &self.name])?;
        Ok(Running { server: self })
    }

    /// Starts it with a variable in the environment.
    pub fn start_with(self, key: &str, value: &str) -> Result<Running<'s>> {
        self.site.keep(self.site.vsctl(["start", &self.name]).env(key, value))?.success()?;
        Ok(Running { server: self })
    }

    /// Its lasting files.
    pub fn directory(&self) -> PathBuf {
        self.site.path("var/lib/vsos/servers").join(&self.name)
    }

    /// What `vsctl status --json` says.
    pub fn status(&self) -> Result<Value> {
        // Asked again and again by those who wait, so not kept for the transcript.
        let status = self.site.vsctl(["status", &self.name, "--json"]).succeed()?.json()?;
        // One name or several: a list has one.
        Ok(match status {
            Value::Array(mut list) if list.len() == 1 => list.remove(0),
            other => other,
        })
    }

    /// Its state in one word.
    pub fn state(&self) -> Result<String> {
        let status = self.status()?;
        Ok(status["state"].as_str().with_context(|| format!("no state in {status}"))?.to_owned())
    }

    /// Its state once nobody works on it: after a killed command the monitor may still take the server back.
    pub fn settled_state(&self) -> Result<String> {
        eventually(&format!("{} to be left alone", self.name), GUEST_LIMIT, || {
            self.state().ok().filter(|state| state != "ready")
        })
    }

    /// Waits for a state.
    pub fn reaches(&self, state: &str) -> Result<()> {
        eventually(&format!("state {state} of {}", self.name), GUEST_LIMIT, || {
            (self.state().ok()? == state).then_some(())
        })
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        // A promise that destroyed or renamed it is not an error; what stays is found by the comparison.
        if self.directory().exists() {
            let _ = self.site.run(["destroy", "--force", &self.name]);
        }
    }
}

impl<'s> Deref for Running<'s> {
    type Target = Server<'s>;

    fn deref(&self) -> &Self::Target {
        &self.server
    }
}

impl<'s> Running<'s> {
    /// The server `name` of `site`, which something else started; it is destroyed with this.
    pub fn adopt(site: &'s Site, name: &str) -> Self {
        Self { server: Server::adopt(site, name) }
    }

    /// Stops it.
    pub fn stop(self) -> Result<Server<'s>> {
        self.site.ok(["stop", &self.name])?;
        Ok(self.server)
    }

    /// Kills it.
    pub fn kill(self) -> Result<Server<'s>> {
        self.site.ok(["stop", "--kill", &self.name])?;
        Ok(self.server)
    }

    /// Waits until a guest with systemd has booted, and returns what it says of itself: `running` or `degraded`.
    pub fn booted(&self) -> Result<String> {
        eventually(&format!("the end of the boot of {}", self.name), GUEST_LIMIT, || {
            let call = self.site.vsctl(["exec", &self.name, "--", "systemctl", "is-system-running"]);
            let said = call.run().ok()?.text();
            ["running", "degraded"].contains(&&*said).then_some(said)
        })
    }

    /// Waits until its own commands for power can be used: systemd's ask the guest's bus.
    pub fn obeys(&self) -> Result<()> {
        self.until("! test -x /bin/systemctl || systemctl list-jobs >/dev/null 2>&1")
    }

    /// Runs a command inside, whatever its exit status.
    pub fn exec(&self, command: &[&str]) -> Result<Finished> {
        self.site.run(["exec", &self.name, "--"].iter().chain(command))
    }

    /// Runs a shell script inside and returns what it printed; it has to succeed.
    pub fn sh(&self, script: &str) -> Result<String> {
        Ok(self.exec(&["sh", "-c", script])?.success()?.text())
    }

    /// Runs a shell script inside, which has to fail, and returns what it said.
    pub fn sh_fails(&self, script: &str) -> Result<String> {
        let done = self.exec(&["sh", "-c", script])?;
        ensure!(done.code != 0, "this should have failed inside:\n{done}");
        Ok(done.text() + &done.errors())
    }

    /// A file's text.
    pub fn file(&self, path: &str) -> Result<String> {
        Ok(self.exec(&["cat", path])?.success()?.text())
    }

    /// Waits until a shell script succeeds inside.
    pub fn until(&self, script: &str) -> Result<()> {
        eventually(&format!("success of {script:?} in {}", self.name), GUEST_LIMIT, || {
            let call = self.site.vsctl(["exec", &self.name, "--", "sh", "-c", script]);
            (call.run().ok()?.code == 0).then_some(())
        })
    }

    /// Starts a `vsctl` command about it in the background.
    pub fn spawn(&self, command: &[&str]) -> Result<Background> {
        self.site.vsctl(command).spawn()
    }

    /// Runs `vsctl` on a terminal of its own.
    pub fn terminal(&self, command: &[&str]) -> Result<Terminal> {
        Terminal::open(self.site, command)
    }

    /// Its init's process id on the host.
    pub fn init_pid(&self) -> Result<i32> {
        let status = self.status()?;
        let pid = status["pid"].as_i64().with_context(|| format!("no pid in {status}"))?;
        Ok(i32::try_from(pid)?)
    }

    /// Waits for another init than `old`, as after a reboot, and returns its process id.
    pub fn next_init(&self, old: i32) -> Result<i32> {
        eventually(&format!("a new init of {}", self.name), GUEST_LIMIT, || {
            (self.state().ok()? == "running").then_some(())?;
            self.init_pid().ok().filter(|pid| *pid != old)
        })
    }

    /// Its addresses, without prefix lengths.
    pub fn addresses(&self) -> Result<Vec<String>> {
        let status = self.status()?;
        let list = status["addresses"].as_array().with_context(|| format!("no addresses in {status}"))?;
        Ok(list
            .iter()
            .filter_map(Value::as_str)
            .map(|text| text.split('/').next().unwrap_or(text).to_owned())
            .collect())
    }

    /// Its first IPv4 address.
    pub fn ipv4(&self) -> Result<String> {
        let addresses = self.addresses()?;
        addresses.iter().find(|text| text.contains('.')).cloned().with_context(|| format!("no IPv4 in {addresses:?}"))
    }

    /// How many bits of its IPv4 addresses are the network's.
    pub fn ipv4_length(&self) -> Result<u8> {
        let status = self.status()?;
        let list = status["addresses"].as_array().with_context(|| format!("no addresses in {status}"))?;
        let four = list.iter().filter_map(Value::as_str).find(|text| text.contains('.'));
        let length = four.and_then(|text| text.split_once('/')).with_context(|| format!("no IPv4 in {status}"))?.1;
        Ok(length.parse()?)
    }

    /// Its first IPv6 address.
    pub fn ipv6(&self) -> Result<String> {
        let addresses = self.addresses()?;
        addresses.iter().find(|text| text.contains(':')).cloned().with_context(|| format!("no IPv6 in {addresses:?}"))
    }

    /// Its default gateway, as the guest sees it.
    pub fn gateway(&self, family: &str) -> Result<String> {
        let routes = self.sh(&format!("ip {family} route show default"))?;
        let mut words = routes.split_whitespace().skip_while(|word| *word != "via").skip(1);
        Ok(words.next().with_context(|| format!("no default route: {routes:?}"))?.to_owned())
    }
}
