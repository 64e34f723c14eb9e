//! Tests on the real kernel, as root: each runs in a child process of its own and leaves the host as it was.
//!
//! Not root: every test is counted as ignored and says why. One thread only, because forking asks for it.
#![forbid(unsafe_code)]

mod cgroups;
mod child;
mod devices;
mod filters;
mod mounts;
mod processes;
mod server;

use libtest_mimic::{Arguments, Trial};

/// What a test returns: the chain of what went wrong.
type Outcome = Result<(), Box<dyn std::error::Error>>;

/// A test of one of the modules.
type Test = fn() -> Outcome;

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let is_root = rustix::process::geteuid().is_root();
    let tests: &[(&'static str, Test)] = &[
        ("cgroup_is_made_in_every_hierarchy_or_none", cgroups::is_made_in_every_hierarchy_or_none),
        ("cgroup_limits_are_read_back", cgroups::limits_are_read_back),
        ("cgroup_takes_processes_both_ways", cgroups::takes_processes_both_ways),
        ("cgroup_freezes_thaws_and_kills", cgroups::freezes_thaws_and_kills),
        ("cgroup_freezes_thaws_and_kills_without_cgroup2", cgroups::freezes_thaws_and_kills_without_cgroup2),
        ("cgroup_is_removed_with_those_below", cgroups::is_removed_with_those_below),
        ("device_program_refuses_and_is_replaced_live", devices::program_refuses_and_is_replaced_live),
        ("seccomp_answers_as_the_profile_says", filters::answers_as_the_profile_says),
        ("seccomp_migratable_nests_no_namespaces", filters::migratable_nests_no_namespaces),
        (
            "seccomp_calls_are_answered_by_who_finds_them_in_the_slot",
            filters::calls_are_answered_by_who_finds_them_in_the_slot,
        ),
        ("mount_errors_carry_the_kernels_words", mounts::errors_carry_the_kernels_words),
        ("mount_attach_and_detach", mounts::attach_and_detach),
        ("mount_a_clone_is_private", mounts::a_clone_is_private),
        ("mount_pivot_leaves_the_old_root", mounts::pivot_leaves_the_old_root),
        ("mount_devpts_instance_has_its_own_ptys", mounts::devpts_instance_has_its_own_ptys),
        ("process_exec_by_descriptor_with_placed_descriptors", processes::exec_by_descriptor),
        ("process_status_is_known_to_parent_and_others", processes::status_is_known),
        ("process_bounding_set_only_shrinks", processes::bounding_set_only_shrinks),
        ("process_becomes_a_user", processes::becomes_a_user),
        ("process_keyring_is_new", processes::keyring_is_new),
        ("process_in_vfork_is_seen", processes::in_vfork_is_seen),
        ("server_of_namespaces_from_birth_to_end", server::from_birth_to_end),
    ];
    let trial = |&(name, test): &(&'static str, Test)| {
        let trial = Trial::ignorable_test(name, move || child::run(test).map_err(Into::into));
        if is_root { trial } else { trial.with_kind("skipped: needs root").with_ignored_flag(true) }
    };
    libtest_mimic::run(&arguments, tests.iter().map(trial).collect()).exit();
}
