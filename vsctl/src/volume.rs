//! Volumes: where a server's root is kept.
//!
//! ```text
//! servers/NAME/volume/upper/ work/   overlay: the server's changes over the template, owners plain
//! servers/NAME/volume/root/          dir: a full copy
//! servers/NAME/volume/suspended/     either: the images of its processes, while it is suspended
//! servers/NAME/volume/memory/N/      … and what of its memory was written before that, round by round
//! ```

use std::path::PathBuf;

use crate::lifecycle::files::FilesStep;
use crate::name::Name;
use crate::site::Site;
use crate::spec::VolumeKind;

/// The server's volume directory.
pub fn directory(site: &Site, name: &Name) -> PathBuf {
    site.server(name).join("volume")
}

/// The shared root of a template.
pub fn template_root(site: &Site, template: &Name) -> PathBuf {
    site.state().join("templates").join(template.as_str()).join("root")
}

/// Where the server's own files are: the layer that is written.
pub fn writable(site: &Site, name: &Name, kind: VolumeKind) -> PathBuf {
    directory(site, name).join(layer(kind))
}

/// The images of a suspended server's processes, in its volume.
pub const IMAGES: &str = "suspended";

/// What of their memory was written while they still ran.
pub const MEMORY: &str = "memory";

/// The part of a volume that is written.
pub fn layer(kind: VolumeKind) -> &'static str {
    match kind {
        VolumeKind::Overlay => "upper",
        VolumeKind::Dir => "root",
    }
}

/// The steps that make a volume from a template.
pub fn plan(site: &Site, name: &Name, template: &Name, kind: VolumeKind) -> Vec<FilesStep> {
    let volume = directory(site, name);
    let make = |path: PathBuf, mode| FilesStep::MakeDirectory { path, mode };
    // The layers are roots of a guest: 0755. The directory above keeps other users of the host out.
    let mut steps = vec![make(volume.clone(), 0o700)];
    match kind {
        VolumeKind::Overlay => {
            steps.push(make(volume.join("upper"), 0o755));
            steps.push(make(volume.join("work"), 0o755));
        }
        VolumeKind::Dir => {
            steps.push(FilesStep::CopyTree { from: template_root(site, template), to: volume.join("root") });
        }
    }
    steps
}

/// The steps that make the place of a volume whose files come from elsewhere, with their own directory.
pub fn plan_empty(site: &Site, name: &Name, kind: VolumeKind) -> Vec<FilesStep> {
    let volume = directory(site, name);
    let mut steps = vec![FilesStep::MakeDirectory { path: volume.clone(), mode: 0o700 }];
    if kind == VolumeKind::Overlay {
        steps.push(FilesStep::MakeDirectory { path: volume.join("work"), mode: 0o755 });
    }
    steps
}
