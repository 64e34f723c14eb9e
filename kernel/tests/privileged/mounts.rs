//! Mounts in a namespace of the test's own.

use std::path::Path;

use kernel::mount::{self, Attributes, FileSystem, Tree};
use kernel::namespace::{Kinds, unshare};
use kernel::pty::{Master, Size};

use crate::Outcome;
use crate::child::{self, chain, ensure, ensure_equal};

/// A mount namespace from which nothing gets out.
fn own_namespace() -> kernel::Result<()> {
    unshare(Kinds::MOUNT)?;
    mount::make_private_recursive(Path::new("/"))
}

fn tmpfs(target: &Path) -> kernel::Result<()> {
    FileSystem::new("tmpfs")?.mount(Attributes::NOSUID | Attributes::NODEV)?.attach(target)
}

pub fn errors_carry_the_kernels_words() -> Outcome {
    let mut overlay = FileSystem::new("overlay")?;
    // Linux ≥ 6.5 looks for the layer at once, older ones when they mount.
    let error = match overlay.option("lowerdir", "/does/not/exist") {
        Err(error) => error,
        Ok(_) => overlay.mount(Attributes::empty()).err().ok_or("there is no such layer")?,
    };
    let text = chain(&error);
    ensure(text.contains("/does/not/exist"), text)?;

    let mut tmpfs = FileSystem::new("tmpfs")?;
    let error = tmpfs.option("no_such_option", "1").err().ok_or("there is no such option")?;
    let text = chain(&error);
    ensure(text.contains("tmpfs: Unknown parameter 'no_such_option'"), text)?;
    ensure_equal(
        "unknown kind",
        FileSystem::new("nosuchfs").err().and_then(|error| error.raw_os_error()),
        Some(libc::ENODEV),
    )
}

pub fn attach_and_detach() -> Outcome {
    own_namespace()?;
    let directory = tempfile::tempdir()?;
    let path = directory.path();
    tmpfs(path)?;
    ensure(mount::is_mount_point(path)?, "tmpfs is mounted")?;
    std::fs::create_dir(path.join("sub"))?;
    ensure(!mount::is_mount_point(&path.join("sub"))?, "a directory is no mount point")?;
    mount::bind_private(&path.join("sub"))?;
    ensure(mount::is_mount_point(&path.join("sub"))?, "bound over itself")?;

    std::fs::create_dir(path.join("copy"))?;
    let tree = Tree::clone_of(path)?;
    tree.set_attributes(Attributes::READ_ONLY | Attributes::NOEXEC, false)?;
    tree.attach(&path.join("copy"))?;
    // Kept open, the descriptor would keep the mount busy.
    drop(tree);
    let refused = std::fs::write(path.join("copy/file"), "x").expect_err("the copy is read-only");
    ensure_equal("write to a read-only mount", refused.raw_os_error(), Some(libc::EROFS))?;

    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mounts = mount::parse_mountinfo(&text);
    ensure_equal("lines of mountinfo", mounts.len(), text.lines().count())?;
    let copy = mounts.iter().find(|mount| mount.mount_point == path.join("copy")).ok_or("the copy is not listed")?;
    ensure(copy.options.starts_with("ro,") && copy.kind == "tmpfs", format!("{copy:?}"))?;

    mount::unmount(&path.join("copy"))?;
    mount::detach(path)?;
    mount::detach(path)?;
    mount::detach(&path.join("not-there"))?;
    Ok(())
}

pub fn a_clone_is_private() -> Outcome {
    own_namespace()?;
    let directory = tempfile::tempdir()?;
    let (place, copy) = (directory.path().join("place"), directory.path().join("copy"));
    for path in [&place, &copy] {
        std::fs::create_dir(path)?;
    }
    tmpfs(&place)?;
    std::fs::create_dir(place.join("sub"))?;
    rustix::mount::mount_change(&place, rustix::mount::MountPropagationFlags::SHARED)?;
    Tree::clone_of(&place)?.attach(&copy)?;
    tmpfs(&copy.join("sub"))?;
    ensure(mount::is_mount_point(&copy.join("sub"))?, "mounted on the copy")?;
    ensure(!mount::is_mount_point(&place.join("sub"))?, "what is mounted on the copy shows on the original")
}

pub fn pivot_leaves_the_old_root() -> Outcome {
    let directory = tempfile::tempdir()?;
    // In a child of its own, for after it nobody in there can remove the directory.
    child::run(|| pivot(directory.path())).map(drop).map_err(Into::into)
}

fn pivot(path: &Path) -> Outcome {
    own_namespace()?;
    tmpfs(path)?;
    std::fs::create_dir(path.join("proc"))?;
    FileSystem::new("proc")?.mount(Attributes::NOSUID)?.attach(&path.join("proc"))?;
    mount::pivot_into(path)?;
    let mounts = mount::parse_mountinfo(&std::fs::read_to_string("/proc/self/mountinfo")?);
    let places: Vec<_> = mounts.iter().map(|mount| mount.mount_point.as_path()).collect();
    ensure_equal("what is left", places, vec![Path::new("/"), Path::new("/proc")])?;
    ensure_equal("working directory", std::env::current_dir()?.as_path(), Path::new("/"))
}

pub fn devpts_instance_has_its_own_ptys() -> Outcome {
    own_namespace()?;
    let directory = tempfile::tempdir()?;
    let mut devpts = FileSystem::new("devpts")?;
    devpts.flag("newinstance")?.option("ptmxmode", "0666")?.option("gid", "5")?;
    devpts.mount(Attributes::NOSUID | Attributes::NOEXEC)?.attach(directory.path())?;
    let master = Master::open_in(directory.path())?;
    ensure_equal("first of its instance", master.number()?, 0)?;
    ensure(master.peer_path(directory.path())?.exists(), "it is seen in that instance")?;
    let peer = master.peer()?;
    master.set_size(Size { rows: 3, columns: 7 })?;
    ensure_equal("size", kernel::pty::size(&peer)?, Size { rows: 3, columns: 7 })?;
    drop((master, peer));
    mount::unmount(directory.path())?;
    Ok(())
}
