//! The messages of CRIU's RPC, as far as they are used here (criu: images/rpc.proto). Every field has CRIU's number.

/// What is asked for (`criu_req_type`), and what an answer is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Kind {
    /// Nothing; never sent.
    Empty = 0,
    /// Write processes to images.
    Dump = 1,
    /// Bring them back.
    Restore = 2,
    /// Write memory to images, and let the processes go on.
    PreDump = 4,
    /// CRIU asks before it goes on, or is answered.
    Notify = 6,
    /// What CRIU and kernel can do together.
    FeatureCheck = 9,
    /// Which CRIU it is.
    Version = 10,
}

/// `criu_cg_mode` and `criu_network_lock_method` values that are used.
pub const CGROUPS_IGNORE: i32 = 0;
/// What is there is left as it is.
pub const CGROUPS_SOFT: i32 = 3;
/// Nobody but us holds back packets.
pub const NETWORK_LOCK_SKIP: i32 = 3;

/// `criu_opts`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Options {
    /// The directory of the images, as a number among the client's descriptors.
    #[prost(int32, required, tag = "1")]
    pub images_dir_fd: i32,
    /// The root of the tree to dump, in the client's pid namespace.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
    /// Whether the processes go on after a dump.
    #[prost(bool, optional, tag = "3")]
    pub leave_running: Option<bool>,
    /// Keep connected TCP sockets as they are.
    #[prost(bool, optional, tag = "5")]
    pub tcp_established: Option<bool>,
    /// Keep file locks.
    #[prost(bool, optional, tag = "8")]
    pub file_locks: Option<bool>,
    /// 0 (nothing) to 4 (everything).
    #[prost(int32, optional, tag = "9")]
    pub log_level: Option<i32>,
    /// The log's name in the working directory.
    #[prost(string, optional, tag = "10")]
    pub log_file: Option<String>,
    /// Ask the client at each stage.
    #[prost(bool, optional, tag = "12")]
    pub notify_scripts: Option<bool>,
    /// Where the root of the tree's mount namespace is, for CRIU.
    #[prost(string, optional, tag = "13")]
    pub root: Option<String>,
    /// The images that these go on from, as a path from their directory.
    #[prost(string, optional, tag = "14")]
    pub parent_img: Option<String>,
    /// Remember which pages are written from now on.
    #[prost(bool, optional, tag = "15")]
    pub track_mem: Option<bool>,
    /// The directory of the log, as a number among the client's descriptors.
    #[prost(int32, optional, tag = "17")]
    pub work_dir_fd: Option<i32>,
    /// Give names to open files that have none, for the time between.
    #[prost(bool, optional, tag = "18")]
    pub link_remap: Option<bool>,
    /// Look for the names of watched files that cannot be opened by handle.
    #[prost(bool, optional, tag = "21")]
    pub force_irmap: Option<bool>,
    /// Whether groups are restored at all.
    #[prost(bool, optional, tag = "24")]
    pub manage_cgroups: Option<bool>,
    /// Whether the restored root is the caller's child.
    #[prost(bool, optional, tag = "26")]
    pub rst_sibling: Option<bool>,
    /// Mounts that share with others outside are taken as they are.
    #[prost(bool, optional, tag = "29")]
    pub ext_sharing: Option<bool>,
    /// … and those that receive from outside.
    #[prost(bool, optional, tag = "30")]
    pub ext_masters: Option<bool>,
    /// File systems that are mounted anew.
    #[prost(string, repeated, tag = "32")]
    pub enable_fs: Vec<String>,
    /// [`CGROUPS_SOFT`]: what is there is left as it is.
    #[prost(int32, optional, tag = "34")]
    pub manage_cgroups_mode: Option<i32>,
    /// How long a deleted file may be that is put into the images, in bytes.
    #[prost(uint32, optional, tag = "35")]
    pub ghost_limit: Option<u32>,
    /// Where names of watched files are looked for.
    #[prost(string, repeated, tag = "36")]
    pub irmap_scan_paths: Vec<String>,
    /// What comes from outside the tree: `mnt[KEY]:VALUE`, `veth[…]`, `netdev[…]`.
    #[prost(string, repeated, tag = "37")]
    pub external: Vec<String>,
    /// The cgroup by which the tree is frozen.
    #[prost(string, optional, tag = "44")]
    pub freeze_cgroup: Option<String>,
    /// How long a dump may take, in seconds.
    #[prost(uint32, optional, tag = "45")]
    pub timeout: Option<u32>,
    /// Leave out memory that can come later, which another program brings when it is asked for.
    #[prost(bool, optional, tag = "48")]
    pub lazy_pages: Option<bool>,
    /// Hand over masters of terminals that nobody in the tree holds.
    #[prost(bool, optional, tag = "50")]
    pub orphan_pts_master: Option<bool>,
    /// [`NETWORK_LOCK_SKIP`]
    #[prost(int32, optional, tag = "64")]
    pub network_lock: Option<i32>,
}

/// `criu_req`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// What is asked for.
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub kind: i32,
    /// How.
    #[prost(message, optional, tag = "2")]
    pub options: Option<Options>,
    /// The answer to a notification.
    #[prost(bool, optional, tag = "3")]
    pub notify_success: Option<bool>,
    /// Which features are asked for: those that are true.
    #[prost(message, optional, tag = "5")]
    pub features: Option<Features>,
}

/// `criu_features`
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Features {
    /// The kernel notes which pages change (`mem_track`; Documentation/admin-guide/mm/soft-dirty.rst).
    #[prost(bool, optional, tag = "1")]
    pub notes_changes: Option<bool>,
    /// Memory can come when it is asked for (`lazy_pages`; userfaultfd(2)).
    #[prost(bool, optional, tag = "2")]
    pub brings_pages: Option<bool>,
}

/// `criu_notify`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Notify {
    /// The stage's name.
    #[prost(string, optional, tag = "1")]
    pub script: Option<String>,
    /// The root of the tree.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
}

/// `criu_version`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Version {
    /// First number.
    #[prost(int32, required, tag = "1")]
    pub major: i32,
    /// Second number.
    #[prost(int32, required, tag = "2")]
    pub minor: i32,
    /// Third number.
    #[prost(int32, optional, tag = "4")]
    pub sublevel: Option<i32>,
}

/// `criu_resp`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    /// What it is about.
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub kind: i32,
    /// Whether it went well.
    #[prost(bool, required, tag = "2")]
    pub success: bool,
    /// A stage.
    #[prost(message, optional, tag = "5")]
    pub notify: Option<Notify>,
    /// An errno.
    #[prost(int32, optional, tag = "7")]
    pub errno: Option<i32>,
    /// Of a question for them.
    #[prost(message, optional, tag = "8")]
    pub features: Option<Features>,
    /// Why not.
    #[prost(string, optional, tag = "9")]
    pub message: Option<String>,
    /// Of a question for it.
    #[prost(message, optional, tag = "10")]
    pub version: Option<Version>,
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn words_are_criu_s() {
        // Written down from `protoc --encode=criu_req`: type 2, options with descriptor 5 and network_lock 3.
        let options = Options { images_dir_fd: 5, network_lock: Some(NETWORK_LOCK_SKIP), ..Options::default() };
        let request = Request { kind: Kind::Restore as i32, options: Some(options), ..Request::default() };
        assert_eq!(request.encode_to_vec(), [0x08, 2, 0x12, 5, 0x08, 5, 0x80, 0x04, 3]);
    }

    #[test]
    fn fields_of_a_newer_criu_are_passed_over() {
        let mut bytes = Response { kind: 2, success: true, ..Response::default() }.encode_to_vec();
        // Number 99, a varint.
        bytes.extend([0x98, 0x06, 1]);
        assert!(Response::decode(bytes.as_slice()).unwrap().success);
    }
}
