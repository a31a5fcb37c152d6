# Shared by the scripts of the test bed: where things are, how they speak, how they fail. Source it, don't run it.
# shellcheck shell=bash
set -euo pipefail

VM_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd "$VM_DIR/../.." && pwd)
CACHE=${BUFSHARE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bufshare}
ROOTFS=$CACHE/rootfs
export LC_ALL=C.UTF-8

say() { printf '%s %s\n' "[$(date +%H:%M:%S)]" "$*" >&2; }
# cannot REASON: this machine lacks something that the test bed needs; whoever counts tests counts a skipped one.
cannot() { printf '%s\n' "$*" >&2; exit 77; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# quiet LOG WHAT COMMAND...: runs a command with its output in a log and shows the log's end if it fails.
quiet() {
    local log=$1 what=$2
    shift 2
    "$@" >"$log" 2>&1 </dev/null && return
    tail -n 25 "$log" >&2
    die "$what failed; the whole log is $log"
}

LINUX=7.2 # the version that User-mode Linux is built from, and the newer of the two guest kernels
uml_tree() { echo "$CACHE/linux-$LINUX-$1"; }
debian_kernel() { basename "$(ls -d "$ROOTFS/lib/modules/$1".*)"; }

# timelines_module: builds the DRM device without a GPU that has timelines, for the plain UML kernel; prints where it is.
timelines_module() {
    local src=$VM_DIR/timelines dir ko
    ko=$CACHE/modules/timelines-$(cat "$src"/* "$CACHE/uml.ready" | sha256sum | cut -c1-16)/timelines.ko
    if [ ! -e "$ko" ]; then
        mkdir -p "${ko%/*}"
        dir=$(mktemp -d)
        cp "$src"/* "$dir"
        quiet "$CACHE/module-timelines.log" "building the module timelines" \
            make -C "$CACHE/linux" "O=$(uml_tree uml)" ARCH=um "M=$dir" W=1 KCFLAGS=-Werror modules
        cp "$dir/timelines.ko" "$ko.$$"
        mv "$ko.$$" "$ko"
        rm -rf "$dir"
    fi
    echo "$ko"
}

# guest_image KERNEL PROGRAM: an uncompressed kernel and initramfs (the fastest to boot under emulation) with the module, the
# guest's program and the test bed's importer; prints the directory that holds them.
guest_image() {
    local kernel=$1 program=$2 ko dir work importer
    ko=$("$VM_DIR/module" "$kernel")
    importer=(${ko%/*}/{bufshare_importer.ko,importer})
    dir=$CACHE/images/$kernel-$(cat "$ko" "${importer[@]}" "$program" "$VM_DIR/guest-init" | sha256sum | cut -c1-16)
    if [ ! -e "$dir/initramfs" ]; then
        mkdir -p "$dir"
        work=$(mktemp -d)
        mkdir -p "$work"/{bin,proc,sys,dev,tmp}
        cp "$ROOTFS/usr/bin/busybox" "$work/bin/"
        ln -s busybox "$work/bin/sh"
        cp "$ko" "${importer[0]}" "$work/"
        cp "$program" "${importer[1]}" "$work/bin/"
        strip "$work/bin/${program##*/}"
        install -m 755 "$VM_DIR/guest-init" "$work/init"
        bash "$CACHE/linux/scripts/extract-vmlinux" "$ROOTFS/boot/vmlinuz-$(debian_kernel "$kernel")" >"$dir/vmlinux" 2>"$dir/log" ||
            die "no kernel found in vmlinuz of $kernel; see $dir/log"
        (cd "$work" && find . | cpio --quiet -o -H newc) >"$dir/initramfs.$$"
        mv "$dir/initramfs.$$" "$dir/initramfs"
        rm -rf "$work"
    fi
    # A kernel that was not started through its boot sector cannot wake up from a suspend.
    [ -e "$dir/vmlinuz" ] || cp "$ROOTFS/boot/vmlinuz-$(debian_kernel "$kernel")" "$dir/vmlinuz"
    echo "$dir"
}

TARGET=${CARGO_TARGET_DIR:-$REPO/target}
# One static build for all of the test bed: the same file runs here, on its host and in its guests.
BIN=$TARGET/x86_64-unknown-linux-gnu/release
static_cargo() {
    local command=$1
    shift
    RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" cargo "$command" --target x86_64-unknown-linux-gnu "$@"
}

# prepare_end_to_end: builds what end_to_end needs.
prepare_end_to_end() {
    static_cargo build --release --bins
    IMAGE_6_12=$(guest_image 6.12 "$BIN/bufshare-guest")
    IMAGE_7_2=$(guest_image 7.2 "$BIN/bufshare-guest")
    export BIN IMAGE_6_12 IMAGE_7_2
}

# end_to_end TEST OUT [OPTION OF uml...]: one test of the whole chain on a virtualisation host. FRAMES: see tests/vm/end-to-end.
end_to_end() {
    local name=$1 out=$2
    shift 2
    # The frame that has to fit what a kernel allows that nobody has told otherwise.
    [ "$name" != large_frame ] || set -- --kernel-limits "$@"
    set -- --timeout $((300 + ${FRAMES:-0} / 2)) "$@"
    rm -rf "$out"
    "$VM_DIR/uml" --real --out "$out" --share "$BIN" --share "$CACHE/images" "$@" \
        env "BIN=$BIN" "IMAGE_6_12=$IMAGE_6_12" "IMAGE_7_2=$IMAGE_7_2" ${FRAMES:+"FRAMES=$FRAMES"} "$VM_DIR/end-to-end" "$name"
}

# need_rust: a Rust that is new enough, by rustup where there is none.
need_rust() {
    local wanted have
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$REPO/Cargo.toml")
    [ ! -e "$HOME/.cargo/env" ] || . "$HOME/.cargo/env"
    have=$(rustc --version 2>/dev/null | cut -d' ' -f2)
    if [ -z "$have" ]; then
        say "no Rust: installing it with rustup"
        install_packages ca-certificates curl gcc libc6-dev
        curl --proto '=https' -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal --component clippy,rustfmt ||
            die "rustup failed; install Rust $wanted or later (https://rustup.rs)"
        . "$HOME/.cargo/env"
    elif [ "$(printf '%s\n' "$wanted" "$have" | sort -V | head -n 1)" != "$wanted" ]; then
        die "Rust $have is too old, $wanted is needed: rustup update (https://rustup.rs)"
    fi
}

# install_packages PACKAGE...: those of these Debian packages that are missing.
install_packages() {
    local missing=() p
    for p; do
        [ "$(dpkg-query -Wf '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || cannot "these Debian packages are missing: ${missing[*]}; install them, or run this as root once"
    mkdir -p "$CACHE"
    say "installing ${missing[*]}"
    apt-get update >"$CACHE/apt.log" 2>&1 || say "apt-get update failed (see $CACHE/apt.log); trying with the lists that are there"
    DEBIAN_FRONTEND=noninteractive quiet "$CACHE/apt.log" "apt-get install ${missing[*]}" \
        apt-get install -y --no-install-recommends "${missing[@]}"
}
