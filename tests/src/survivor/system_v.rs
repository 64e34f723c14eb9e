//! System V's shared memory, semaphores and messages (sysvipc(7)), with their identifiers. No safe library has them; Perl does, and
//! lies in each Debian.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use super::{Check, Kind, same};
use crate::promise::skip;

pub const KINDS: &[Kind] = &[("system-v-ipc", system_v)];

/// Makes one of each, by a key and without one, behind others that are removed so that the identifiers are not the first; then says
/// what is in them for each line that it reads, and puts back what it took out to see it. Numbers: sys/ipc.h, sys/sem.h; 30 is shmat.
const SCRIPT: &str = r#"
$| = 1;
for my $round (1 .. 3) {
    shmctl(shmget(0, 4096, 01600), 0, 0); semctl(semget(0, 1, 01600), 0, 0, 0); msgctl(msgget(0, 01600), 0, 0);
}
my ($shm, $anonymous) = (shmget(0x51, 8192, 01640) // die("shmget: $!"), shmget(0, 4096, 01600) // die("shmget: $!"));
shmwrite($shm, "kept in a segment", 5000, 17) && shmwrite($anonymous, "attached", 0, 8) or die "shmwrite: $!";
my $at = syscall(30, $anonymous, 0, 0); die "shmat: $!" if $at == -1;
my $sem = semget(0x52, 3, 01600) // die("semget: $!");
semctl($sem, $_, 16, 7 + $_) // die("semctl: $!") for 0 .. 2;
my $msg = msgget(0x53, 01600) // die("msgget: $!");
msgsnd($msg, pack("l! a*", 3, "three"), 0) && msgsnd($msg, pack("l! a*", 4, "four"), 0) or die "msgsnd: $!";
while (<STDIN>) {
    my ($text, @messages) = ("");
    shmread($shm, $text, 5000, 17) or print "shmread: $!; ";
    for my $kind (3, 4) {
        my $message = "";
        msgrcv($msg, $message, 100, $kind, 04000) or print "msgrcv: $!; ";
        push @messages, unpack("l! a*", $message);
        msgsnd($msg, $message, 0);
    }
    open(my $list, "<", "/proc/sysvipc/shm"); my @attached = map { (split)[6] } grep { (split)[1] == $anonymous } <$list>;
    print join("; ", $text, unpack("P8", pack("J", $at)), "attached @attached times", "values " . join(" ", map { semctl($sem, $_, 12, 0) } 0 .. 2),
        "messages @messages", "identifiers $shm $anonymous $sem $msg, by key " . join(" ", shmget(0x51, 0, 0) // "?", semget(0x52, 0, 0) // "?", msgget(0x53, 0) // "?")), "\n";
}
"#;

fn system_v(_: &Path) -> Result<Check> {
    if !Path::new("/usr/bin/perl").exists() {
        return Err(skip("no perl"));
    }
    let mut perl = Command::new("perl");
    let mut child =
        perl.args(["-e", SCRIPT]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("run perl")?;
    let (mut input, output) = (child.stdin.take().context("no input")?, child.stdout.take().context("no output")?);
    let mut output = BufReader::new(output);
    let mut say = move || -> Result<String> {
        writeln!(input, "say").context("ask perl")?;
        let mut line = String::new();
        output.read_line(&mut line).context("listen to perl")?;
        Ok(line)
    };
    let before = say()?;
    let expected = "kept in a segment; attached; attached 1 times; values 7 8 9; messages 3 three 4 four; identifiers";
    ensure!(before.starts_with(expected), "perl says {before:?}");
    Ok(Box::new(move || same("what is in them", say()?, before.clone())))
}
