//! One change to the host: a sentence, a do and an undo.
//!
//! A step has one effect, so it happens or it does not. Each facility keeps its steps, with their planning, in a
//! file of its own; this file only joins them. The sentences are what `--plan`, the log and errors show.

use std::fmt;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::change::ChangeStep;
use super::facilities::FacilityStep;
use super::files::FilesStep;
use super::group::GroupStep;
use super::network::NetworkStep;
use super::nodes::NodesStep;
use super::process::ProcessStep;
use super::view::ViewStep;
use super::world::World;

/// One change to the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Files and directories.
    Files(FilesStep),
    /// The server's cgroup.
    Group(GroupStep),
    /// What its `/proc` says.
    View(ViewStep),
    /// Its link to the network.
    Network(NetworkStep),
    /// Its device nodes.
    Nodes(NodesStep),
    /// Its namespaces, root and init.
    Process(ProcessStep),
    /// What all servers of the site share.
    Facility(FacilityStep),
    /// A server that exists becomes another.
    Change(ChangeStep),
}

impl Step {
    /// Makes the change.
    ///
    /// # Errors
    /// When the kernel refuses; then nothing of this step is left.
    pub fn apply(&self, world: &mut World) -> Result<()> {
        match self {
            Self::Files(step) => step.apply(),
            Self::Group(step) => step.apply(world),
            Self::View(step) => step.apply(world),
            Self::Network(step) => step.apply(world),
            Self::Nodes(step) => step.apply(),
            Self::Process(step) => step.apply(world),
            Self::Facility(step) => step.apply(world),
            Self::Change(step) => step.apply(world),
        }
    }

    /// Takes the change back; one that is gone already is no error.
    ///
    /// # Errors
    /// When the kernel refuses; trying again later is right.
    pub fn undo(&self, world: &mut World) -> Result<()> {
        match self {
            Self::Files(step) => step.undo(),
            Self::Group(step) => step.undo(world),
            Self::View(step) => step.undo(world),
            Self::Network(step) => step.undo(world),
            Self::Nodes(step) => step.undo(),
            Self::Process(step) => step.undo(world),
            Self::Facility(step) => step.undo(world),
            Self::Change(step) => step.undo(world),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files(step) => step.fmt(out),
            Self::Group(step) => step.fmt(out),
            Self::View(step) => step.fmt(out),
            Self::Network(step) => step.fmt(out),
            Self::Nodes(step) => step.fmt(out),
            Self::Process(step) => step.fmt(out),
            Self::Facility(step) => step.fmt(out),
            Self::Change(step) => step.fmt(out),
        }
    }
}
