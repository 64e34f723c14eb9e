//! System calls that neither rustix nor nix wraps, as small safe functions.
//!
//! The only file of the workspace with `unsafe`. Nothing here decides anything: a function takes plain values,
//! makes one call, and returns what the kernel said. The facility modules give these their meaning.

use std::ffi::{c_char, c_int, c_uint};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// Turns a raw return value into a result, reading errno on -1.
fn check(value: libc::c_long) -> io::Result<libc::c_long> {
    if value == -1 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// What clone3(2) made: `None` in the child, the child's pid and pidfd in the parent.
pub(crate) type Cloned = Option<(i32, OwnedFd)>;

/// clone3(2) with the semantics of fork(2) plus `flags`; `CLONE_PIDFD` is always added.
///
/// The caller must be single-threaded: in the child no other thread exists, so a lock that one of them held
/// (the allocator's, for one) would stay locked for ever. `process::fork` checks that.
/// Flags that share memory or make a thread are refused.
pub(crate) fn clone3(flags: u64, exit_signal: c_int, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    const SHARING: c_int =
        libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND | libc::CLONE_VFORK | libc::CLONE_SETTLS;
    if flags & SHARING as u64 != 0 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut pidfd: c_int = -1;
    // SAFETY: clone_args is plain integers; zero is the documented "not used" of every field.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags | libc::CLONE_PIDFD as u64;
    arguments.pidfd = &raw mut pidfd as u64;
    arguments.exit_signal = exit_signal as u64;
    if let Some(group) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = group.as_raw_fd() as u64;
    }
    // SAFETY: the pointer and size name a live clone_args; without CLONE_VM and with stack 0 the child runs on its
    // own copy of this stack, as after fork(2), so both returns are from valid frames.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) })?;
    if pid == 0 {
        return Ok(None);
    }
    // SAFETY: the kernel stored a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Some((pid as i32, pidfd)))
}

/// fork(2): `None` in the child, the child's pid in the parent. The caller must be single-threaded, as for [`clone3`].
pub(crate) fn fork() -> io::Result<Option<i32>> {
    // SAFETY: the child runs on its own copy of all memory, and `process::fork_plainly` sees to it that there was one thread.
    let pid = check(unsafe { libc::fork() }.into())?;
    Ok((pid != 0).then_some(pid as i32))
}

/// kill(2) with any signal number; rustix and nix take only the named ones.
pub(crate) fn kill(pid: i32, signal: c_int) -> io::Result<()> {
    // SAFETY: no memory is touched.
    check(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// `CLONE_INTO_CGROUP` of linux/sched.h; libc's constant is a c_int, which it does not fit.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// sync_file_range(2) with `SYNC_FILE_RANGE_WRITE`, of `length` bytes from `offset`; 0: to the end.
pub(crate) fn begin_writing(file: BorrowedFd<'_>, offset: i64, length: i64) -> io::Result<()> {
    // SAFETY: no pointers; the descriptor is open as long as it is borrowed.
    check(unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, libc::SYNC_FILE_RANGE_WRITE) }.into())
        .map(drop)
}

/// mount_setattr(2) on the mount that `mount` names, with `AT_EMPTY_PATH` and, if asked, `AT_RECURSIVE`.
pub(crate) fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, attributes: &libc::mount_attr) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH as c_uint;
    if recursive {
        flags |= libc::AT_RECURSIVE as c_uint;
    }
    // SAFETY: an empty C string and a live mount_attr with its true size; the kernel only reads both.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    })?;
    Ok(())
}

/// One instruction of a classic BPF program, as in `struct sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct ClassicInstruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip when the comparison holds.
    pub jump_true: u8,
    /// Instructions to skip when it does not.
    pub jump_false: u8,
    /// The constant operand.
    pub operand: u32,
}

/// seccomp(2) `SECCOMP_SET_MODE_FILTER` for the calling thread.
pub(crate) fn seccomp_set_filter(program: &[ClassicInstruction]) -> io::Result<()> {
    set_filter(program, 0).map(drop)
}

/// The same for a filter that asks; its listener. With `killable` a caller that has been heard waits for the answer whatever
/// signals come, but SIGKILL (`SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`, Linux ≥ 5.19).
pub(crate) fn seccomp_set_listened_filter(program: &[ClassicInstruction], killable: bool) -> io::Result<OwnedFd> {
    const WAIT_KILLABLE_RECV: libc::c_ulong = 1 << 5;
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | if killable { WAIT_KILLABLE_RECV } else { 0 };
    let fd = set_filter(program, flags)?;
    // SAFETY: with NEW_LISTENER success returns a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn set_filter(program: &[ClassicInstruction], flags: libc::c_ulong) -> io::Result<libc::c_long> {
    let length = u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let header = libc::sock_fprog { len: length, filter: program.as_ptr().cast::<libc::sock_filter>().cast_mut() };
    // SAFETY: ClassicInstruction has the layout of sock_filter (both repr(C), same fields); header names `length`
    // live ones; the kernel copies and does not write them.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const header) })
}

/// `struct seccomp_notif` with its `struct seccomp_data` (linux/seccomp.h).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct SeccompNotification {
    pub id: u64,
    pub thread: u32,
    pub flags: u32,
    pub number: i32,
    pub architecture: u32,
    pub instruction: u64,
    pub arguments: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct SeccompAnswer {
    pub id: u64,
    pub value: i64,
    pub error: i32,
    pub flags: u32,
}

/// A page of a file that other processes may have mapped as well; a notification stands at its start.
#[derive(Debug)]
pub(crate) struct SharedPage(ptr::NonNull<SeccompNotification>);

/// What the file of a [`SharedPage`] must have at least, in bytes.
pub(crate) const SHARED_PAGE_BYTES: usize = 4096;

// SAFETY: the memory belongs to no thread, and all access is by copies through the pointer: see `read` and `clear`.
unsafe impl Send for SharedPage {}
// SAFETY: as above; two that access it at once may see a mixed value, which is still a value of plain integers.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    /// mmap(2) of the first page, shared. The file must be that long, else access ends in SIGBUS: the caller checks.
    pub(crate) fn map(file: BorrowedFd<'_>) -> io::Result<SharedPage> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; it replaces nothing.
        let address = unsafe {
            libc::mmap(ptr::null_mut(), SHARED_PAGE_BYTES, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = ptr::NonNull::new(address.cast());
        address.map(SharedPage).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
    }

    /// A copy of what stands there.
    pub(crate) fn read(&self) -> SeccompNotification {
        // SAFETY: the mapping lives as long as self, is page-aligned and longer than the struct, of which every bit
        // pattern is a value; volatile, since another process may write it.
        unsafe { ptr::read_volatile(self.0.as_ptr()) }
    }

    /// Writes zeros over what stands there.
    pub(crate) fn clear(&self) {
        // SAFETY: as in `read`.
        unsafe { ptr::write_volatile(self.0.as_ptr(), SeccompNotification::default()) }
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `map` made; nothing refers to it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), SHARED_PAGE_BYTES) };
    }
}

/// The request number of an ioctl of the `size`d kind (asm-generic/ioctl.h).
const fn ioctl_number(direction: u32, kind: u8, number: u32, size: usize) -> u32 {
    (direction << 30) | ((size as u32) << 16) | ((kind as u32) << 8) | number
}

/// `SECCOMP_IOCTL_NOTIF_RECV` straight into the shared page, which must be all zero. ENOENT: the caller is gone.
pub(crate) fn seccomp_receive(listener: BorrowedFd<'_>, into: &SharedPage) -> io::Result<()> {
    const REQUEST: u32 = ioctl_number(3, b'!', 0, size_of::<SeccompNotification>());
    // SAFETY: the request's size is that of the struct for which the live mapping has room.
    check(unsafe { libc::c_long::from(libc::ioctl(listener.as_raw_fd(), REQUEST as _, into.0.as_ptr())) })?;
    Ok(())
}

/// `SECCOMP_IOCTL_NOTIF_SEND`.
pub(crate) fn seccomp_answer(listener: BorrowedFd<'_>, answer: &SeccompAnswer) -> io::Result<()> {
    const REQUEST: u32 = ioctl_number(3, b'!', 1, size_of::<SeccompAnswer>());
    // SAFETY: the request's size is that of `answer`, which is live; the kernel only reads it.
    check(unsafe { libc::c_long::from(libc::ioctl(listener.as_raw_fd(), REQUEST as _, ptr::from_ref(answer))) })?;
    Ok(())
}

/// `SECCOMP_IOCTL_NOTIF_ID_VALID`. ENOENT: that caller waits no more.
pub(crate) fn seccomp_is_waiting(listener: BorrowedFd<'_>, id: u64) -> io::Result<()> {
    const REQUEST: u32 = ioctl_number(1, b'!', 2, size_of::<u64>());
    // SAFETY: the request's size is that of `id`, which is live; the kernel only reads it.
    check(unsafe { libc::c_long::from(libc::ioctl(listener.as_raw_fd(), REQUEST as _, &raw const id)) })?;
    Ok(())
}

/// `NS_GET_PID_FROM_PIDNS` (linux/nsfs.h, Linux ≥ 6.11): a thread's number in the caller's pid namespace.
pub(crate) fn pid_from_namespace(namespace: BorrowedFd<'_>, thread: i32) -> io::Result<i32> {
    const REQUEST: u32 = ioctl_number(2, 0xb7, 6, size_of::<c_int>());
    // SAFETY: the argument is a plain number; no memory is touched.
    let found = check(unsafe { libc::c_long::from(libc::ioctl(namespace.as_raw_fd(), REQUEST as _, thread)) })?;
    Ok(found as i32)
}

/// sched_getaffinity(2) as the kernel has it: how many bytes of `mask` it filled. libc's wrapper hides that number.
pub(crate) fn sched_getaffinity(thread: i32, mask: &mut [u64]) -> io::Result<usize> {
    // SAFETY: the length in bytes is that of `mask`, which is borrowed exclusively.
    let filled =
        check(unsafe { libc::syscall(libc::SYS_sched_getaffinity, thread, size_of_val(mask), mask.as_mut_ptr()) })?;
    Ok(filled as usize)
}

/// `IOPRIO_WHO_PROCESS` (linux/ioprio.h): one thread, whatever the name says.
const IOPRIO_WHO_PROCESS: c_int = 1;

/// ioprio_get(2) of one thread: class and level, packed.
pub(crate) fn ioprio_get(thread: i32) -> io::Result<c_int> {
    // SAFETY: the arguments are plain numbers; no memory is touched.
    let found = check(unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, thread) })?;
    Ok(found as c_int)
}

/// ioprio_set(2) of one thread.
pub(crate) fn ioprio_set(thread: i32, priority: c_int) -> io::Result<()> {
    // SAFETY: the arguments are plain numbers; no memory is touched.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, thread, priority) })?;
    Ok(())
}

/// `struct procmap_query` of linux/fs.h.
#[derive(Default)]
#[repr(C)]
struct MappingQuery {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    kind: u64,
    page_bytes: u64,
    offset: u64,
    inode: u64,
    device: [u32; 2],
    name_bytes: u32,
    build_id_bytes: u32,
    name: u64,
    build_id: u64,
}

/// `PROCMAP_QUERY` (Linux ≥ 6.11) on an open /proc/PID/maps: the end of the writable mapping that covers `address`.
/// ENOENT: there is none.
pub(crate) fn writable_mapping_end(maps: BorrowedFd<'_>, address: u64) -> io::Result<u64> {
    const REQUEST: u32 = ioctl_number(3, b'f', 17, size_of::<MappingQuery>());
    const WRITABLE: u64 = 2;
    let mut query =
        MappingQuery { size: size_of::<MappingQuery>() as u64, flags: WRITABLE, address, ..MappingQuery::default() };
    // SAFETY: the request's size is that of `query`, which is live and writable; it names no further memory.
    check(unsafe { libc::c_long::from(libc::ioctl(maps.as_raw_fd(), REQUEST as _, &raw mut query)) })?;
    Ok(query.end)
}

/// The part of `union bpf_attr` for `BPF_PROG_LOAD` that is used here; what is left out counts as zero (bpf(2)).
#[repr(C)]
#[derive(Default)]
struct BpfProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface_index: u32,
    expected_attach_type: u32,
}

/// bpf(2) `BPF_PROG_LOAD`. With a log buffer the verifier writes its reasons there.
pub(crate) fn bpf_program_load(
    program_type: u32,
    attach_type: u32,
    name: &str,
    instructions: &[u64],
    log: Option<&mut [u8]>,
) -> io::Result<OwnedFd> {
    let mut attributes = BpfProgramLoad {
        program_type,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        expected_attach_type: attach_type,
        ..Default::default()
    };
    let length = name.len().min(15);
    attributes.name[..length].copy_from_slice(&name.as_bytes()[..length]);
    if let Some(log) = log {
        attributes.log_level = 1;
        attributes.log_size = log.len() as u32;
        attributes.log_buffer = log.as_mut_ptr() as u64;
    }
    // SAFETY: every pointer in `attributes` names live memory of the length given beside it; only the log is written,
    // and it is borrowed exclusively.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attributes, size_of::<BpfProgramLoad>())
    })?;
    // SAFETY: a successful BPF_PROG_LOAD returns a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

const BPF_PROG_LOAD: c_int = 5;
const BPF_PROG_ATTACH: c_int = 8;
const BPF_PROG_DETACH: c_int = 9;
const BPF_PROG_GET_NEXT_ID: c_int = 11;
const BPF_PROG_GET_FD_BY_ID: c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: c_int = 15;
const BPF_PROG_QUERY: c_int = 16;

/// bpf(2) `BPF_PROG_ATTACH`; `replaced` goes with `BPF_F_REPLACE`.
pub(crate) fn bpf_program_attach(
    target: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    attach_type: u32,
    flags: u32,
    replaced: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let attributes: [u32; 5] = [
        target.as_raw_fd() as u32,
        program.as_raw_fd() as u32,
        attach_type,
        flags,
        replaced.map_or(0, |fd| fd.as_raw_fd() as u32),
    ];
    // SAFETY: the five words are target_fd, attach_bpf_fd, attach_type, attach_flags, replace_bpf_fd of bpf_attr;
    // the kernel reads them and no more than the size given.
    check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, attributes.as_ptr(), size_of::<[u32; 5]>()) })?;
    Ok(())
}

/// bpf(2) `BPF_PROG_DETACH` of one program.
pub(crate) fn bpf_program_detach(target: BorrowedFd<'_>, program: BorrowedFd<'_>, attach_type: u32) -> io::Result<()> {
    let attributes: [u32; 3] = [target.as_raw_fd() as u32, program.as_raw_fd() as u32, attach_type];
    // SAFETY: the three words are target_fd, attach_bpf_fd, attach_type of bpf_attr; the kernel only reads them.
    check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_DETACH, attributes.as_ptr(), size_of::<[u32; 3]>()) })?;
    Ok(())
}

/// The `query` part of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct BpfQuery {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    program_count: u32,
    unused: u32,
}

/// bpf(2) `BPF_PROG_QUERY`: the ids of the programs attached to `target` itself, at most 64.
pub(crate) fn bpf_program_query(target: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut ids = vec![0_u32; 64];
    let mut attributes = BpfQuery {
        target: target.as_raw_fd() as u32,
        attach_type,
        program_ids: ids.as_mut_ptr() as u64,
        program_count: ids.len() as u32,
        ..Default::default()
    };
    // SAFETY: `attributes` is live and writable, and names an array of `program_count` writable words.
    check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut attributes, size_of::<BpfQuery>()) })?;
    ids.truncate(attributes.program_count as usize);
    Ok(ids)
}

/// bpf(2) `BPF_PROG_GET_FD_BY_ID`.
pub(crate) fn bpf_program_by_id(id: u32) -> io::Result<OwnedFd> {
    let attributes: [u32; 3] = [id, 0, 0];
    // SAFETY: the words are prog_id, next_id, open_flags of bpf_attr; the kernel only reads them.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_GET_FD_BY_ID, attributes.as_ptr(), size_of::<[u32; 3]>())
    })?;
    // SAFETY: success returns a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// bpf(2) `BPF_PROG_GET_NEXT_ID`: the smallest id above `id` of a loaded program, 0 to begin; none is left: ENOENT.
pub(crate) fn bpf_program_next_id(id: u32) -> io::Result<u32> {
    let mut attributes: [u32; 3] = [id, 0, 0];
    // SAFETY: the words are start_id, next_id, open_flags of bpf_attr; the kernel writes the second.
    check(unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_GET_NEXT_ID, attributes.as_mut_ptr(), size_of::<[u32; 3]>())
    })?;
    Ok(attributes[1])
}

/// The head of `struct bpf_prog_info`, up to the name.
#[repr(C)]
#[derive(Default)]
struct BpfProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_length: u32,
    translated_length: u32,
    jited_instructions: u64,
    translated_instructions: u64,
    load_time: u64,
    created_by: u32,
    map_count: u32,
    map_ids: u64,
    name: [u8; 16],
}

/// bpf(2) `BPF_OBJ_GET_INFO_BY_FD` of a program: its name.
pub(crate) fn bpf_program_name(program: BorrowedFd<'_>) -> io::Result<String> {
    let mut info = BpfProgramInfo::default();
    let pointer = &raw mut info as u64;
    // The `info` part of bpf_attr: bpf_fd, info_len, then the pointer as two words (little-endian).
    let mut attributes: [u32; 4] =
        [program.as_raw_fd() as u32, size_of::<BpfProgramInfo>() as u32, pointer as u32, (pointer >> 32) as u32];
    // SAFETY: attributes name a live, writable `info` of the length given; the kernel writes no more than that to it, and
    // the length it filled in back to the second word.
    check(unsafe {
        libc::syscall(libc::SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, attributes.as_mut_ptr(), size_of::<[u32; 4]>())
    })?;
    let length = info.name.iter().position(|&byte| byte == 0).unwrap_or(info.name.len());
    Ok(String::from_utf8_lossy(&info.name[..length]).into_owned())
}

/// keyctl(2) `KEYCTL_JOIN_SESSION_KEYRING` with no name: a new anonymous session keyring.
pub(crate) fn keyctl_join_anonymous_session() -> io::Result<i32> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
    // SAFETY: a null name is the documented way to ask for an anonymous keyring; no memory is touched.
    let serial = check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, ptr::null::<c_char>()) })?;
    Ok(serial as i32)
}

/// close_range(2) with `flags`; both ends are included.
pub(crate) fn close_range(first: RawFd, last: RawFd, flags: c_uint) -> io::Result<()> {
    // SAFETY: no memory is touched. That the numbers are not owned by a live value is the caller's promise;
    // `process::close_from` passes it on, and is for the moment before exec.
    check(unsafe { libc::syscall(libc::SYS_close_range, first as c_uint, last as c_uint, flags) })?;
    Ok(())
}

/// Takes ownership of an open descriptor that came by its number through exec.
pub(crate) fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD touches no memory; it only says whether the number is open.
    check(unsafe { libc::c_long::from(libc::fcntl(fd, libc::F_GETFD)) })?;
    // SAFETY: the number is open. That nothing else in this process owns it is the documented duty of the caller of
    // `process::adopt_descriptor`: it is called once per number, at the start, before the program opens anything.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// dup3(2) onto a number, replacing what is there.
pub(crate) fn duplicate_to(fd: BorrowedFd<'_>, number: RawFd, flags: c_int) -> io::Result<()> {
    // SAFETY: no memory is touched. Replacing a number that a live value owns would redirect that value; the callers
    // (`process::place_descriptor`, before exec) say so.
    check(unsafe { libc::c_long::from(libc::dup3(fd.as_raw_fd(), number, flags)) })?;
    Ok(())
}

/// `struct pidfd_info` of linux/pidfd.h, its first 64 bytes (`PIDFD_INFO_SIZE_VER0`).
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup_id: u64,
    ids: [u32; 11],
    exit_code: i32,
}

/// ioctl_pidfd(2) `PIDFD_GET_INFO`: the wait status of a process that has ended, `None` while it has not.
pub(crate) fn pidfd_exit_code(pidfd: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    // _IOWR(0xFF, 11, struct pidfd_info) with the size of version 0.
    const PIDFD_GET_INFO: libc::c_ulong =
        (3 << 30) | ((size_of::<PidfdInfo>() as libc::c_ulong) << 16) | (0xFF << 8) | 11;
    let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..Default::default() };
    // SAFETY: the request's size is that of `info`, which is live and writable.
    check(unsafe { libc::c_long::from(libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO as _, &raw mut info)) })?;
    Ok((info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code))
}

/// pidfd_send_signal(2) with any signal number; rustix takes only the named ones, and systemd listens to real-time ones.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: c_int) -> io::Result<()> {
    // SAFETY: a null siginfo asks the kernel to fill in that of kill(2); no memory is touched.
    check(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, ptr::null::<libc::siginfo_t>(), 0)
    })?;
    Ok(())
}

/// [`default_disposition`] of every signal that may have another one.
pub(crate) fn default_dispositions() {
    for number in 1..=libc::SIGRTMAX() {
        // EINVAL for SIGKILL and SIGSTOP is as good.
        let _ = default_disposition(number);
    }
}

/// rt_sigaction(2) with `SIG_DFL`.
///
/// Not signal(3): glibc refuses 32 and 33, which it keeps for itself, and a parent may have left them ignored.
pub(crate) fn default_disposition(number: c_int) -> io::Result<()> {
    // The kernel's struct sigaction: handler, flags, restorer, mask of 64 bits. All zero is SIG_DFL.
    let default = [0_u64; 4];
    // SAFETY: SIG_DFL runs no code of ours; the kernel only reads `default`.
    check(unsafe {
        libc::syscall(libc::SYS_rt_sigaction, number, default.as_ptr(), ptr::null::<u64>(), size_of::<u64>())
    })?;
    Ok(())
}

/// malloc_trim(3) without a reserve: whole free pages of the heap go back to the kernel.
pub(crate) fn trim_heap() {
    // SAFETY: it only touches memory that the allocator owns and nobody uses, under the allocator's own lock.
    unsafe { libc::malloc_trim(0) };
}

/// madvise(2) `MADV_DONTNEED` for what deep calls have left below the stack of the main thread; nothing in any other.
pub(crate) fn trim_stack() {
    // Half of what the kernel makes room for below the arguments when it executes a program (fs/exec.c).
    const LENGTH: usize = 64 * 1024;
    // SAFETY: they touch no memory.
    let (page, is_main) = unsafe { (libc::sysconf(libc::_SC_PAGESIZE) as usize, libc::gettid() == libc::getpid()) };
    // Room for the frames of this call and of the one below.
    const OWN: usize = 1024;
    let here = 0_u8;
    let end = ((&raw const here).addr() - OWN) / page * page;
    if is_main {
        // SAFETY: below the main thread's stack pointer lies only what is left of calls that have returned, and then, for
        // a mebibyte, nothing that mmap(2) has given out (the stack's guard gap). A fresh page is zero, and no frame
        // expects anything of a page that it has not written. ENOMEM for a part that is not mapped is as good.
        unsafe { libc::madvise(std::ptr::without_provenance_mut(end - LENGTH), LENGTH, libc::MADV_DONTNEED) };
    }
}
