//! `vsctl create`

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, Result};
use clap::builder::ValueParser;

use super::output;
use crate::edit;
use crate::lifecycle::batch::Batch;
use crate::lifecycle::create::{self, Creation};
use crate::lifecycle::facilities::Facilities;
use crate::lifecycle::start;
use crate::name::Name;
use crate::site::Site;
use crate::spec::{
    Bind, CapabilityChange, Cpus, Device, Hostname, Memory, NetworkMode, Pids, Spec, Swap, Sysinfo, VolumeKind,
};
use crate::store::Server;
use crate::template::Templates;
use crate::template::password;
use crate::template::personalise::{Identity, parse_authorized_keys};
use crate::template::resolver::Resolver;

/// Create servers from a template.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names of the new servers.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<Name>,
    /// Template of the root.
    #[arg(short, long)]
    template: Name,
    /// Host name inside [default: the server's name].
    #[arg(long)]
    hostname: Option<Hostname>,
    /// Most memory, e.g. 512M.
    #[arg(long, value_name = "SIZE")]
    memory: Option<Memory>,
    /// Most swap besides the memory, e.g. 256M.
    #[arg(long, value_name = "SIZE")]
    swap: Option<Swap>,
    /// CPU time, e.g. 1.5 for one and a half CPUs.
    #[arg(long, value_name = "N")]
    cpus: Option<Cpus>,
    /// CPUs it may run on, e.g. 0-1.
    #[arg(long, value_name = "LIST", value_parser = ValueParser::new(parse_cpuset))]
    cpuset: Option<kernel::cgroup::CpuSet>,
    /// Most processes and threads.
    #[arg(long, value_name = "N")]
    pids: Option<Pids>,
    /// How it is connected: bridge or none.
    #[arg(long, default_value = "bridge")]
    net: NetworkMode,
    /// An address of eth0; may be repeated [default: a free one of each network].
    #[arg(long, value_name = "ADDR/LEN")]
    ip: Vec<ipnet::IpNet>,
    /// A host directory or file inside; may be repeated.
    #[arg(long, value_name = "SRC:DST[:ro]")]
    mount: Vec<Bind>,
    /// A host device inside; may be repeated.
    #[arg(long, value_name = "PATH[:rwm]")]
    device: Vec<Device>,
    /// Changes to the capabilities, e.g. +sys_nice,-net_raw.
    #[arg(long, value_name = "+X,-Y", value_delimiter = ',', allow_hyphen_values = true)]
    cap: Vec<CapabilityChange>,
    /// No user namespace: root inside is root outside.
    #[arg(long)]
    privileged: bool,
    /// Refuse inside what a checkpoint cannot hold.
    #[arg(long)]
    migratable: bool,
    /// What sysinfo(2) and sched_getaffinity(2) say inside: own or host.
    #[arg(long, default_value = "own")]
    sysinfo: Sysinfo,
    /// How the root is kept: overlay or dir.
    #[arg(long, default_value = "overlay")]
    volume: VolumeKind,
    /// Start it with the host.
    #[arg(long)]
    autostart: bool,
    /// Read root's password from standard input.
    #[arg(long)]
    password_stdin: bool,
    /// Public keys that may log in as root; may be repeated.
    #[arg(long, value_name = "FILE")]
    ssh_key: Vec<PathBuf>,
    /// Start it at once.
    #[arg(long)]
    start: bool,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn parse_cpuset(text: &str) -> Result<kernel::cgroup::CpuSet, String> {
    text.parse().map_err(|_| format!("'{text}' is no list of CPUs (an example: 0-1,4)"))
}

/// Runs the command.
///
/// # Errors
/// When a value cannot be used or the host refuses.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let identity = identity(&args)?;
    let held = Templates::below(&site.state()).hold(&args.template)?;
    let spec = spec(&args);
    edit::check_host(&spec, None)?;
    let batch = Rc::<Batch>::default();
    let creation = Creation { spec_text: spec.to_toml(), spec, template: held.template.clone(), identity };
    if args.plan {
        let mut shared = if args.start { Facilities(site).missing()? } else { Vec::new() };
        let mut from = create::FIRST_NUMBER;
        return super::for_each(&args.names, |name| {
            let (record, mut steps) = create::plan(site, name, &creation, from)?;
            // The one before has its number when this one is made.
            from = record.id + 1;
            if args.start {
                steps.append(&mut shared);
                let server = Server { name: name.clone(), spec: creation.spec.clone(), record };
                steps.extend(start::plan_created(site, &batch, &server, false)?.1);
            }
            output::plan(&steps, args.json)
        });
    }
    super::for_each(&args.names, |name| {
        let server = create::create(site, name, &creation).map_err(|error| about(name, error))?;
        if args.json {
            output::json(&server.record)?;
        }
        if args.start {
            start::begin(site, &batch, name, start::Options::default())?.finish(site)?;
        }
        Ok(())
    })
}

/// Whatever goes wrong, its message says with which of the names.
fn about(name: &Name, error: anyhow::Error) -> anyhow::Error {
    let named = error.chain().any(|cause| cause.to_string().contains(&format!("'{name}'")));
    if named { error } else { error.context(format!("cannot create '{name}'")) }
}

fn spec(args: &Args) -> Spec {
    Spec {
        hostname: args.hostname.clone(),
        memory: args.memory,
        swap: args.swap,
        cpus: args.cpus,
        cpuset: args.cpuset.clone(),
        pids: args.pids,
        net: args.net,
        ip: args.ip.clone(),
        mount: args.mount.clone(),
        device: args.device.clone(),
        cap: args.cap.clone(),
        privileged: args.privileged,
        autostart: args.autostart,
        migratable: args.migratable,
        sysinfo: args.sysinfo,
        volume: args.volume,
        ..Spec::of(args.template.clone())
    }
}

fn identity(args: &Args) -> Result<Identity> {
    let mut authorized_keys = Vec::new();
    for file in &args.ssh_key {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        authorized_keys.extend(parse_authorized_keys(&text).with_context(|| format!("--ssh-key {}", file.display()))?);
    }
    let mut password_hash = None;
    if args.password_stdin {
        let mut text = String::new();
        std::io::stdin().take(4096).read_to_string(&mut text).context("read the password")?;
        password_hash = Some(password::hash(text.trim_end_matches(['\r', '\n']))?);
    }
    let resolver = Resolver::of_host()?;
    if let Some(warning) = &resolver.warning {
        log::warn!("{warning}");
    }
    Ok(Identity { resolver: Some(resolver), password_hash, authorized_keys, ..Identity::default() })
}
