//! Checkpoints: a server's processes to the disk, and back.
//!
//! *Suspend* and *resume* are a stop and a start that lose nothing. At every instant either the processes count or the
//! images do:
//!
//! ```text
//! suspend: dump ─► freeze the group ─► images get their name ─► processes end ─► take back
//! resume:  start's steps with CRIU in the place of init ─► frozen ─► images go ─► thaw
//! ```
//!
//! While both are there the processes stand still, so the images are as new as they are; whoever finds it so takes the processes back
//! (`state::of` says `ready`, as of every start or stop that was interrupted).
//!
//! Beside these images, which are spent, a server can have others that are [kept] with its disk of the same instant. Processes that
//! are no server's can be put on the disk as a [tree].

mod ahead;
mod beside;
mod blockers;
mod dump;
mod ids;
mod image;
pub mod kept;
mod places;
mod program;
mod thin;
pub mod tree;
mod watched;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use kernel::file::FileSystem;
use kernel::lock::Flock;

use crate::criu::message::{Features, Options as CriuOptions};
use crate::criu::{Criu, Pages};
use crate::events;
use crate::failure::{Exit, Failure};
use crate::lifecycle::batch::Batch;
use crate::lifecycle::facilities::Facilities;
use crate::lifecycle::restore::{self, Check, Image};
use crate::lifecycle::start::{self, Starting};
use crate::lifecycle::state::{self, State};
use crate::lifecycle::world::World;
use crate::lifecycle::{boot, network};
use crate::name::Name;
use crate::site::Site;
use crate::spec::NetworkMode;
use crate::store::{self, Server};
use crate::template::remove_tree;
use crate::volume;
pub use ahead::{Ahead, directory as memory_directory};
pub use dump::{Subject, Then};
pub use image::Manifest;
pub use thin::holds_pages;

/// What the directory of images is called beside its name until they are whole.
const UNFINISHED: &str = "new";

/// Puts a running server's processes on the disk and ends them. `with_host`: it goes on with the host's next boot.
///
/// # Errors
/// Exit 31 when it does not run, 5 when it cannot be dumped; then it goes on.
pub fn suspend(site: &Site, name: &Name, with_host: bool) -> Result<()> {
    let lock = store::lock(site, name)?;
    let server = store::load(site, name)?;
    store::forget_leaving(site, name)?;
    let subject = Subject::find(site, &server, &lock)?;
    clear(site, name)?;
    put_down(site, &server, &subject, with_host)
}

/// [`suspend`] of a server whose lock the caller holds, and of whose memory some was written `ahead`.
///
/// # Errors
/// As [`suspend`].
pub fn suspend_held(site: &Site, server: &Server, subject: Subject<'_>, ahead: Option<&Ahead>) -> Result<()> {
    match ahead {
        Some(ahead) => put_down(site, server, &subject.after(ahead), false),
        None => clear(site, &server.name).and_then(|()| put_down(site, server, &subject, false)),
    }
}

fn put_down(site: &Site, server: &Server, subject: &Subject<'_>, with_host: bool) -> Result<()> {
    let name = &server.name;
    let directory = state::suspended_directory(site, name).with_extension(UNFINISHED);
    let disk = FileSystem::of(&volume::directory(site, name))?;
    subject.dump(&directory, Then::End, |manifest| {
        commit(site, server, &directory, &Manifest { with_host, ..manifest }, &disk)
    })?;
    events::note(site, name, events::Kind::Suspended);
    Ok(())
}

/// What [`suspend`] would do, in sentences.
///
/// # Errors
/// As [`suspend`], as far as that can be seen before anything is frozen.
pub fn plan_suspend(site: &Site, name: &Name) -> Result<Vec<String>> {
    let lock = store::lock(site, name)?;
    check(site, &store::load(site, name)?, &lock)?;
    let images = state::suspended_directory(site, name);
    Ok(vec![format!("dump the processes of {name} to {}", images.display()), format!("end {name}")])
}

/// Whether a server could be suspended now, as far as that can be seen before anything is frozen.
///
/// # Errors
/// As [`suspend`].
pub fn check(site: &Site, server: &Server, lock: &Flock) -> Result<()> {
    Subject::find(site, server, lock).map(drop)
}

/// Names the images: from now on they count.
fn commit(site: &Site, server: &Server, directory: &Path, manifest: &Manifest, disk: &FileSystem) -> Result<()> {
    manifest.write(directory)?;
    // The images; and the processes remember what they have written: it must be there when they come back, also after a power cut.
    disk.sync()?;
    let named = state::suspended_directory(site, &server.name);
    fs::rename(directory, &named).with_context(|| format!("name {}", named.display()))?;
    Ok(kernel::file::sync_entry(&named)?)
}

/// Brings a suspended server back.
///
/// # Errors
/// When it is not suspended, its images are damaged, or CRIU refuses; then it stays suspended.
pub fn resume(site: &Site, name: &Name) -> Result<()> {
    // Held until it runs: these images, and no later ones, are looked at and restored.
    let lock = store::lock(site, name)?;
    resume_held(site, name, lock)
}

/// What [`resume`] would do, in sentences.
///
/// # Errors
/// As [`resume`], as far as that can be seen before.
pub fn plan_resume(site: &Site, name: &Name) -> Result<Vec<String>> {
    let _lock = store::lock(site, name)?;
    let server = store::load(site, name)?;
    resumable(site, &server)?;
    let (batch, images) = (Batch::default(), state::suspended_directory(site, name));
    let steps = start::plan(site, &batch, &server, false)?.1;
    let mut sentences: Vec<String> = steps.iter().map(ToString::to_string).collect();
    sentences.push(format!("restore the processes of {name} from {}", images.display()));
    Ok(sentences)
}

/// What is written down of a suspended server's images, if they can be restored.
fn resumable(site: &Site, server: &Server) -> Result<Manifest> {
    let manifest = all_here(site, server)?;
    manifest.verify(&state::suspended_directory(site, &server.name), NOTHING_STARTED)?;
    Ok(manifest)
}

/// What can be done about images that are damaged.
const NOTHING_STARTED: &str = "nothing was started; the server can be booted anew: `vsctl start --discard`";

/// The same, without a look at the images themselves: none of its memory is elsewhere, and CRIU is here.
fn all_here(site: &Site, server: &Server) -> Result<Manifest> {
    let manifest = known(site, server)?;
    version(site)?;
    if manifest.is_thin {
        let message = format!("the memory of '{}' has not come from the other host", server.name);
        let hint =
            "`vsctl migrate --continue` there sends it; without it, `vsctl start --discard` boots the server anew";
        return Err(Failure::new(Exit::Failed, message).hint(hint).into());
    }
    Ok(manifest)
}

/// What is written down of a suspended server's images, and that they are its.
fn known(site: &Site, server: &Server) -> Result<Manifest> {
    let name = &server.name;
    let directory = state::suspended_directory(site, name);
    if !directory.exists() {
        let now = state::of(site, name)?;
        return Err(Failure::new(Exit::NotRunning, format!("'{name}' is not suspended, it is {now}")).into());
    }
    let manifest = Manifest::read(&directory)?;
    check_fits(server, &manifest)?;
    Ok(manifest)
}

/// What is written down of a suspended server's images, all of which have been read and are whole. The caller holds its lock.
///
/// # Errors
/// As [`resume`].
pub fn restorable(site: &Site, name: &Name) -> Result<Manifest> {
    resumable(site, &store::load(site, name)?)
}

/// The same of images that the caller has just written, by a checksum of their own, when it had looked whether CRIU is there: a server stands
/// still meanwhile, and all of its memory is in them.
///
/// # Errors
/// As [`resume`], but for images that are damaged.
pub fn just_written(site: &Site, name: &Name) -> Result<Manifest> {
    known(site, &store::load(site, name)?)
}

/// The same of [thin](make_thin) ones that have lain here since; [`restore()`] needs to be told where their memory comes from.
///
/// # Errors
/// As [`resume`].
pub fn thin(site: &Site, name: &Name) -> Result<Manifest> {
    let manifest = known(site, &store::load(site, name)?)?;
    version(site)?;
    let hint = "the host that it came from has it whole: `vsctl migrate --abort` there, or docs/migration.md";
    manifest.verify(&state::suspended_directory(site, name), hint)?;
    Ok(manifest)
}

/// [`resume`] of a server whose lock the caller holds.
///
/// # Errors
/// As [`resume`].
pub fn resume_held(site: &Site, name: &Name, lock: Flock) -> Result<()> {
    let manifest = all_here(site, &store::load(site, name)?)?;
    manifest.verify_but_memory(&state::suspended_directory(site, name), NOTHING_STARTED)?;
    restore(site, name, manifest, Memory::Unread, lock)?.finish(site)
}

/// Where the memory of what is restored is.
#[derive(Debug)]
pub enum Memory {
    /// In its images.
    Here,
    /// The same, and they are compared with what is written down of them while CRIU reads them: nothing of it runs before they are whole.
    Unread,
    /// The same; but it is not this host's yet, so it waits at a gate when it is whole, until [`Starting::open`].
    Waits,
    /// The same, and what is missing in [thin](make_thin) images comes from elsewhere as long as this is open.
    Comes(OwnedFd),
}

/// Begins to bring back a server from [`restorable`] images.
///
/// # Errors
/// As [`resume`].
pub fn restore(site: &Site, name: &Name, manifest: Manifest, memory: Memory, lock: Flock) -> Result<Starting> {
    let server = store::load(site, name)?;
    let (criu, directory) = (criu(site), state::suspended_directory(site, name));
    // After a boot of the host they are not there yet, and CRIU is told where the server's files of /proc are.
    Facilities(site).ensure()?;
    Facilities(site).ensure_view()?;
    let program = program::other_than_here(site, &directory, &manifest)?;
    let unread = matches!(memory, Memory::Unread).then(|| {
        let (manifest, directory) = (manifest.clone(), directory.clone());
        Check(Rc::new(move || manifest.verify_memory(&directory, NOTHING_STARTED)))
    });
    let (waits, pages) = match memory {
        Memory::Here | Memory::Unread => (false, None),
        Memory::Waits => (true, None),
        Memory::Comes(pages) => (true, Some(Rc::new(pages))),
    };
    let lazy_pages = pages.is_some().then_some(true);
    let options = CriuOptions { lazy_pages, ..restore_options(site, &server, program.is_some())? };
    let image = Image {
        criu,
        directory,
        program,
        logs: site.server(name),
        options,
        age_ns: manifest.age_ns,
        cpu: manifest.cpu,
        groups: manifest.groups,
        settings: manifest.settings,
        unread,
        waits,
        pages,
    };
    start::resume(site, name, image, lock)
}

/// Makes images that came with a server this host's own: `server` has its ids here. The caller brings all of it to the disk.
///
/// # Errors
/// When they are damaged, or not the server's.
pub fn adopt(site: &Site, server: &Server) -> Result<()> {
    let directory = state::suspended_directory(site, &server.name);
    if !directory.exists() {
        return Ok(());
    }
    let mut manifest = Manifest::read(&directory)?;
    check_fits(server, &manifest)?;
    if let Some(first) = server.first_id(site) {
        ids::give(&directory, &mut manifest, first)?;
    }
    for name in thin::place(&thin_directory(site, &server.name), &directory)? {
        manifest.is_thin = true;
        // To read the holes of the new one takes as long as the memory in its place; the stream that it came with had a checksum.
        manifest.files.remove(&name);
    }
    give(&directory, server.first_id(site), PASS)?;
    if ahead::directory(site, &server.name).exists() {
        give_to_server(site, server)?;
    }
    manifest.write(&directory)
}

/// The directory of images that lack memory that can come later ([`make_thin`]).
pub fn thin_directory(site: &Site, name: &Name) -> PathBuf {
    state::suspended_directory(site, name).with_extension(state::THIN)
}

/// Makes, beside the images of a suspended server, such of its pages as lack all memory that can come later. Returns how many bytes that is.
///
/// # Errors
/// When the images cannot be understood, or the disk refuses.
pub fn make_thin(site: &Site, name: &Name) -> Result<u64> {
    thin::make(&state::suspended_directory(site, name), &thin_directory(site, name))
}

/// Begins to send the memory that [thin](make_thin) images lack.
///
/// # Errors
/// When CRIU cannot be run.
pub fn send_pages(site: &Site, name: &Name) -> Result<Pages> {
    criu(site).send_pages(&state::suspended_directory(site, name), &site.server(name))
}

/// Gives up thin images: the whole ones are sent.
///
/// # Errors
/// What cannot be removed.
pub fn forget_thin(site: &Site, name: &Name) -> Result<()> {
    remove_tree(&thin_directory(site, name))
}

/// Begins to take it, for a server that is then [restored](restore()).
///
/// # Errors
/// When CRIU cannot.
pub fn take_pages(site: &Site, name: &Name) -> Result<Pages> {
    Facilities(site).ensure()?;
    let pages = criu(site).take_pages(&state::suspended_directory(site, name), &site.server(name))?;
    // Not in the session of who has come by ssh: that may end before the server does.
    World::new(site).group(&site.own_cgroup())?.attach(pages.pid())?;
    Ok(pages)
}

/// Lets a server pass through the volume to what was written ahead of its memory.
fn give_way(site: &Site, server: &Server) -> Result<()> {
    let first = server.first_id(site);
    give(&volume::directory(site, &server.name), first, PASS)?;
    give(&ahead::directory(site, &server.name), first, PASS)
}

/// Lets it also into all that was.
fn give_to_server(site: &Site, server: &Server) -> Result<()> {
    give_way(site, server)?;
    let (first, rounds) = (server.first_id(site), ahead::directory(site, &server.name));
    let read = || format!("read {}", rounds.display());
    for round in fs::read_dir(&rounds).with_context(read)? {
        let round = round.with_context(read)?;
        // Not what a link leads to.
        if !round.file_type().with_context(read)?.is_dir() {
            bail!("{} is no directory", round.path().display());
        }
        give(&round.path(), first, OPEN)?;
    }
    Ok(())
}

/// Lets a server with ids from `first` up pass through a directory ([`PASS`]), or open it ([`OPEN`]). What it has in its memory is
/// nobody's business; but CRIU reads it again as root of the host, and then as the server's.
fn give(directory: &Path, first: Option<u32>, mode: u32) -> Result<()> {
    let given = chown(directory, Some(0), Some(first.unwrap_or(0)))
        .and_then(|()| fs::set_permissions(directory, fs::Permissions::from_mode(mode)));
    given.with_context(|| format!("give {} away", directory.display()))
}

/// Modes of directories that CRIU reads as the server's root. It opens those that it follows a link to.
const PASS: u32 = 0o710;
const OPEN: u32 = 0o750;

/// Whether a suspended server goes on with the host's next boot in any case.
///
/// # Errors
/// When its images cannot be read.
pub fn goes_with_host(site: &Site, name: &Name) -> Result<bool> {
    Ok(Manifest::read(&state::suspended_directory(site, name))?.with_host)
}

/// The version of the CRIU that wrote the images of a suspended server.
///
/// # Errors
/// When they cannot be read.
pub fn written_by(site: &Site, name: &Name) -> Result<Option<String>> {
    let directory = state::suspended_directory(site, name);
    directory.exists().then(|| Manifest::read(&directory)).transpose().map(|found| found.map(|manifest| manifest.criu))
}

/// Whether a server's processes are on the disk.
pub fn is_suspended(site: &Site, name: &Name) -> bool {
    matches!(state::of(site, name), Ok(State::Suspended))
}

/// Whether there are images, whoever has the right to them.
pub fn is_on_disk(site: &Site, name: &Name) -> bool {
    state::suspended_directory(site, name).exists()
}

/// Whether there are [thin](make_thin) ones.
///
/// # Errors
/// When they cannot be read.
pub fn is_thin(site: &Site, name: &Name) -> Result<bool> {
    Ok(is_on_disk(site, name) && Manifest::read(&state::suspended_directory(site, name))?.is_thin)
}

/// Directories of images and disks that nobody will use.
///
/// # Errors
/// When the server's directory cannot be read.
pub fn leftovers(site: &Site, name: &Name) -> Result<Vec<PathBuf>> {
    let images = state::suspended_directory(site, name);
    let mut directories =
        [UNFINISHED, state::USED, state::THIN].map(|extension| images.with_extension(extension)).to_vec();
    directories.push(kept::aside(site, name));
    if !images.exists() {
        directories.push(ahead::directory(site, name));
    }
    directories.retain(|directory| directory.exists());
    directories.extend(kept::unfinished(site, name)?);
    Ok(directories)
}

/// Removes what [`leftovers`] finds. The caller has the server's lock.
///
/// # Errors
/// What cannot be removed.
pub fn clear(site: &Site, name: &Name) -> Result<()> {
    leftovers(site, name)?.iter().try_for_each(|left| remove_tree(left))
}

/// Whether the images are this server's.
fn check_fits(server: &Server, manifest: &Manifest) -> Result<()> {
    let refuse = |why: String| Err(Failure::new(Exit::Failed, why).into());
    let name = &server.name;
    if manifest.uuid != server.record.uuid || manifest.name != name.as_str() {
        return refuse(format!("the images are not of '{name}' but of '{}'", manifest.name));
    }
    if manifest.template_digest != server.record.template_digest {
        return refuse(format!("'{name}' has another template than when it was suspended"));
    }
    Ok(())
}

fn criu(site: &Site) -> Criu {
    Criu::at(site.settings.checkpoint.criu.as_deref().unwrap_or(Path::new("criu")))
}

/// The oldest CRIU that leaves the network to us (`--network-lock skip`).
const OLDEST: (i32, i32) = (3, 18);

/// Which CRIU the site has.
///
/// # Errors
/// Exit 5 when there is none, or it is too old.
pub fn criu_version(site: &Site) -> Result<String> {
    version(site)
}

/// What CRIU can do with this kernel.
///
/// # Errors
/// When it does not answer.
pub fn features(site: &Site) -> Result<Features> {
    criu(site).features()
}

/// The newest CRIU of which no dump succeeds without UDP-Lite in the kernel: it asks for such sockets, and takes the answer that there
/// can be none for a failure (criu issue 3002).
const NEEDS_UDP_LITE: (i32, i32) = (4, 2);

/// What is known to stand in the way of every dump here, so that it can be said: a distribution may have mended it in the same version.
///
/// # Errors
/// When CRIU does not answer, or the kernel's protocols cannot be read.
pub fn doubt(site: &Site) -> Result<Option<String>> {
    let (major, minor, _) = criu(site).version()?;
    let protocols = Path::new("/proc/net/protocols");
    let listed = fs::read_to_string(protocols).with_context(|| format!("read {}", protocols.display()))?;
    let lacks = (major, minor) <= NEEDS_UDP_LITE && !listed.lines().any(|line| line.starts_with("UDP-Lite"));
    let said = "CRIU up to 4.2 dumps nothing on a kernel without UDP-Lite (Linux 7.1 or newer), unless it was mended";
    Ok(lacks.then(|| said.to_owned()))
}

fn version(site: &Site) -> Result<String> {
    let (major, minor, sublevel) = criu(site).version_noted(&site.run().join("criu"))?;
    if (major, minor) < OLDEST {
        let message =
            format!("criu {major}.{minor}.{sublevel} is too old: {}.{} or newer is needed", OLDEST.0, OLDEST.1);
        return Err(Failure::new(Exit::Unsupported, message)
            .hint("name another in vsos.toml: checkpoint.criu = PATH")
            .into());
    }
    Ok(format!("{major}.{minor}.{sublevel}"))
}

/// How CRIU finds on this host what the server had of its own. `brings_program`: vsinit comes with the images.
fn restore_options(site: &Site, server: &Server, brings_program: bool) -> Result<CriuOptions> {
    let init = Batch::default().template(site, &server.spec.template)?.init;
    let program = brings_program.then(|| restore::program(site, &server.name));
    let sources = boot::from_host(site, server, &init, program)?;
    let mount = |(outside, inside): (PathBuf, PathBuf)| format!("mnt[{}]:{}", inside.display(), outside.display());
    let mut external: Vec<String> = sources.into_iter().map(mount).collect();
    if server.spec.net == NetworkMode::Bridge {
        let waiting = network::waiting(&site.link(server.record.id));
        external.push(format!("netdev[{}]:{waiting}", network::GUEST_LINK));
    }
    Ok(restore::common(&site.server_run(&server.name).join("root"), external))
}
