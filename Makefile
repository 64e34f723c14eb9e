# vsos: everything a person or a machine does with this tree. `make help` lists it.

SHELL       := /bin/sh
CARGO       ?= cargo
PREFIX      ?= /usr/local
DESTDIR     ?=
# Tests whose name contains T, e.g. `make system T=reboot`.
T           ?=
# The lab of virtual machines: yes, no, or all (every promise on every host).
LAB         ?= yes
# The Debian releases on which `make fresh` proves the README; `make test` takes Debian 13 only, and none with FRESH=no.
FRESH       ?= trixie bookworm
# How many servers the bench starts at once.
N           ?= 200
# The host of `make lab-shell`.
HOST        ?= debian-13

TARGET      := $(or $(CARGO_TARGET_DIR),target)
PROGRAMS    := $(TARGET)/release
# The programs run inside and beside any guest, so they need no libc, no loader and no fixed-up addresses.
STATIC      := -C target-feature=+crt-static -C relocation-model=static
# Each program is linked by its own cargo call: the flags then bind that link only, and proc macros still build.
LINK        := $(CARGO) rustc --quiet

bindir      := $(PREFIX)/bin
libexecdir  := $(PREFIX)/libexec/vsos
mandir      := $(PREFIX)/share/man
unitdir     := $(PREFIX)/lib/systemd/system
bashdir     := $(PREFIX)/share/bash-completion/completions
zshdir      := $(PREFIX)/share/zsh/site-functions
fishdir     := $(PREFIX)/share/fish/vendor_completions.d

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup programs demo demo-clean check format lint unit docs test system fresh lab lab-shell lab-parts bench bench-lab install clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing to build and test (tests/packages has the list and the reasons)
	@tests/setup.sh run build test

programs: ## build the three programs, static, into target/release
	$(LINK) --release -p vsctl --bin vsctl -- $(STATIC)
	$(LINK) --release -p lxcfs-fuse --bin lxcfs-fuse -- $(STATIC)
	$(LINK) --profile init -p init --bin vsinit -- $(STATIC)
	@# Renamed into place: a server may be running the old one.
	@cp $(TARGET)/init/vsinit $(PROGRAMS)/vsinit.new && mv -f $(PROGRAMS)/vsinit.new $(PROGRAMS)/vsinit

demo: ## boot two virtual servers and show them (root)
	@tests/setup.sh run build
	@$(MAKE) --no-print-directory programs
	@VSOS_PROGRAMS=$(PROGRAMS) tests/demo.sh show

demo-clean: ## take away all that the demo made (root)
	@VSOS_PROGRAMS=$(PROGRAMS) tests/demo.sh clean

check: format lint unit docs ## format, clippy, unit, golden and tidy tests, documentation

format:
	@$(CARGO) fmt --version >/dev/null 2>&1 || { echo "check: cargo fmt is missing (Debian 13: apt-get install rustfmt; rustup: rustup component add rustfmt)" >&2; exit 1; }
	$(CARGO) fmt --all --check

lint:
	@$(CARGO) clippy --version >/dev/null 2>&1 || { echo "check: cargo clippy is missing (Debian 13: apt-get install rust-clippy; rustup: rustup component add clippy)" >&2; exit 1; }
	$(CARGO) clippy --quiet --workspace --all-targets -- -D warnings
	@# `cargo test` leaves them out, and so does --all-targets.
	$(CARGO) clippy --quiet -p system-tests --test system -- -D warnings

unit:
	$(CARGO) test --quiet --workspace
ifeq ($(shell id -u),0)
	@# Those that mount and make device nodes; without root they are listed as ignored above.
	$(CARGO) test --quiet -p vsctl --lib -- --ignored
endif

docs:
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --quiet --workspace --no-deps

test: setup check programs ## everything: set-up, check, the system tests on this host, in a fresh root and in the lab (root); LAB=no FRESH=no leave out
	@$(MAKE) --no-print-directory system
ifeq ($(FRESH),no)
	@echo "fresh: left out, as asked (FRESH=no): the README is not proven on a fresh machine"
else
	@$(MAKE) --no-print-directory fresh FRESH=trixie
endif
ifeq ($(LAB),no)
	@echo "lab: left out, as asked (LAB=no): nothing runs in virtual machines"
else
	@$(MAKE) --no-print-directory lab
endif

system: ## only the system tests (root, programs built); T=part-of-a-name chooses
	VSOS_PROGRAMS=$(abspath $(PROGRAMS)) $(CARGO) test --quiet -p system-tests --test system -- $(T)

fresh: ## prove the README in clean Debian roots: its first command must end with a running server (root); FRESH=trixie
	@tests/setup.sh run test
	@for suite in $(FRESH); do tests/fresh.sh $$suite || exit 1; done

# The system tests as one static program: it runs in hosts with another C library, and goes into servers.
TESTS       = $(TARGET)/lab/system

lab-parts: setup programs
	@mkdir -p $(TARGET)/lab
	@# cargo says where the binary is, and names the programs of the package too; renamed into place, because another lab may be reading the old one.
	@built=$$($(CARGO) rustc --quiet -p system-tests --test system --message-format=json -- $(STATIC) -C strip=debuginfo | \
		sed -n '/"kind":\["test"\]/s/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1) && test -n "$$built" && \
		cp -f "$$built" $(TESTS).new && mv -f $(TESTS).new $(TESTS)

lab: lab-parts ## the system tests in virtual machines with Debian's kernels (root); LAB=all: all on all; T=part-of-a-name
	$(CARGO) run --quiet -p system-tests --bin vsos-lab -- run $(if $(filter all,$(LAB)),--all) --filter '$(T)' --tests $(TESTS)

lab-shell: lab-parts ## a shell in a host of the lab, with this tree's programs: HOST=debian-13
	$(CARGO) run --quiet -p system-tests --bin vsos-lab -- shell $(HOST) --tests $(TESTS)

bench-lab: lab-parts ## measure suspend, resume and migration between two virtual machines; writes into docs/checkpoint.md (root); T=part-of-a-server
	$(LINK) --profile init -p lab-load --bin lab-load -- $(STATIC)
	$(CARGO) run --quiet -p system-tests --bin vsos-lab -- measure --filter '$(T)' --tests $(TESTS) \
		--load $(TARGET)/init/lab-load $(if $(T),,--write docs/checkpoint.md)

bench: ## measure side by side with the installed peers; writes docs/benchmarks.md (root); N=servers
	@tests/setup.sh run build bench
	@# Status 3: it cannot be had here, which it has said.
	@tests/incus.sh || test $$? = 3
	@$(MAKE) --no-print-directory programs
	VSOS_PROGRAMS=$(abspath $(PROGRAMS)) $(CARGO) run --quiet --release -p system-tests --bin vsos-bench -- --servers $(N) --write docs/benchmarks.md

install: ## install programs, man pages, completions and the systemd unit (PREFIX, DESTDIR); run `make programs` first
	@for program in vsctl vsinit lxcfs-fuse; do test -x $(PROGRAMS)/$$program || { echo "install: $(PROGRAMS)/$$program is missing: run make programs" >&2; exit 1; }; done
	install -D -m 0755 $(PROGRAMS)/vsctl $(DESTDIR)$(bindir)/vsctl
	install -D -m 0755 $(PROGRAMS)/vsinit $(DESTDIR)$(libexecdir)/vsinit
	install -D -m 0755 $(PROGRAMS)/lxcfs-fuse $(DESTDIR)$(libexecdir)/lxcfs-fuse
	install -d $(DESTDIR)$(mandir)/man8 $(DESTDIR)$(mandir)/man5
	@# A directory of its own: two may install at once.
	man=$$(mktemp -d) && $(PROGRAMS)/vsctl man $$man && \
	for page in $$man/*.[58] init/man/vsinit.8 lxcfs-fuse/man/lxcfs-fuse.8; do \
		install -m 0644 $$page $(DESTDIR)$(mandir)/man$${page##*.}/ || exit 1; \
	done && rm -rf $$man
	install -d $(DESTDIR)$(bashdir) $(DESTDIR)$(zshdir) $(DESTDIR)$(fishdir) $(DESTDIR)$(unitdir)
	$(PROGRAMS)/vsctl completions bash >$(DESTDIR)$(bashdir)/vsctl
	$(PROGRAMS)/vsctl completions zsh >$(DESTDIR)$(zshdir)/_vsctl
	$(PROGRAMS)/vsctl completions fish >$(DESTDIR)$(fishdir)/vsctl.fish
	sed 's|@bindir@|$(bindir)|g' vsctl/vsos.service.in >$(DESTDIR)$(unitdir)/vsos.service
	chmod 0644 $(DESTDIR)$(unitdir)/vsos.service

clean: ## remove what was built
	$(CARGO) clean
