# For scripts that run on the virtualisation host of the test bed: the daemon, QEMU guests, a compositor. Source it.
# Wants from its caller: OUT (where logs and pictures go), BIN (the project's programs), IMAGE_6_12 and IMAGE_7_2 (guest images).
# shellcheck shell=bash
set -uo pipefail

S=${S:-/run/bufshare} # sockets and FIFOs
mkdir -p "$S" "$OUT"
export XDG_RUNTIME_DIR=$S BUFSHARE_HOST_SOCKET=$S/host.sock
export PATH=$BIN:$PATH
declare -A PIDS=()

say() { printf '%s %s\n' "[$(date +%H:%M:%S)]" "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    local end=$((SECONDS + $1 + 1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.05
    done
}

# start NAME COMMAND...: in the background, its output in $OUT/NAME.log.
start() {
    local name=$1
    shift
    "$@" >>"$OUT/$name.log" 2>&1 </dev/null &
    PIDS[$name]=$!
}
alive() { kill -0 "${PIDS[$1]}" 2>/dev/null; }
# stop NAME [SIGNAL]: and wait for its end.
stop() {
    kill "-${2:-TERM}" "${PIDS[$1]}" 2>/dev/null
    wait "${PIDS[$1]}" 2>/dev/null
    unset "PIDS[$1]"
}

# daemon VM... [-- OPTION...]: the daemon for VMs of these names, and its host socket.
daemon() {
    local vms=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do vms+=(--vm "name=$1,socket=$S/$1.sock${UNSEALED:-}"); shift; done
    [ $# -eq 0 ] || shift
    RUST_LOG=${RUST_LOG:-info} start daemon vhost-device-bufshare "${vms[@]}" --host-socket "$S/host.sock" "$@"
    wait_for 10 test -S "$S/host.sock" || { cat "$OUT/daemon.log"; die "the daemon does not come up"; }
}

# service_manager: systemd as the manager of services, without being the first process.
service_manager() {
    mkdir -p /run/systemd/system "$S/config/systemd/user"
    mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup
    export XDG_CONFIG_HOME=$S/config
    chmod 700 "$S"
    start systemd /lib/systemd/systemd --user --log-target=console
    wait_for 10 systemctl --user is-system-running --wait || { cat "$OUT/systemd.log"; die "systemd does not come up"; }
}

# vm NAME KERNEL [QEMU OPTION...]: boots a guest with the device and waits until it takes commands.
vm() {
    local name=$1 kernel=$2 image=IMAGE_${2//./_} accel=tcg
    shift 2
    [ ! -w /dev/kvm ] || accel=kvm
    rm -f "$S/$name".{in,out,qmp.in,qmp.out}
    mkfifo "$S/$name".{in,out,qmp.in,qmp.out}
    start "$name" qemu-system-x86_64 -accel $accel -cpu max -nodefaults -display none -no-reboot \
        -machine q35,memory-backend=ram -m 512M -object memory-backend-memfd,id=ram,size=512M,share=on \
        -chardev "socket,id=bufshare,path=$S/$name.sock" \
        -device vhost-user-test-device-pci,virtio-id=37,num_vqs=3,vq_size=256,config_size="${CONFIG_SIZE:-64}",chardev=bufshare \
        -serial "file:$OUT/$name.console" -chardev "pipe,id=cmd,path=$S/$name" -serial chardev:cmd \
        -qmp "pipe:$S/$name.qmp" \
        -kernel "${!image}/vmlinux" -initrd "${!image}/initramfs" \
        -append "console=ttyS0 quiet loglevel=4 panic=-1 no_timer_check tsc=reliable ${APPEND:-}" "$@"
    exec {IN}>"$S/$name.in" {OUTFD}<"$S/$name.out" {QMP_IN}>"$S/$name.qmp.in" {QMP_OUT}<"$S/$name.qmp.out"
    eval "IN_$name=$IN OUT_$name=$OUTFD QMP_IN_$name=$QMP_IN QMP_OUT_$name=$QMP_OUT"
    qmp "$name" qmp_capabilities >/dev/null
    in_guest "$name" 120 '' || { tail -n 20 "$OUT/$name.log" "$OUT/$name.console"; die "guest $name (Linux $kernel) does not come up"; }
}

# in_guest NAME SECONDS COMMAND: runs a line of shell in the guest; its output and status are the guest's.
in_guest() {
    local in=IN_$1 out=OUT_$1 line
    [ -z "$3" ] || printf '%s\n' "$3" >&"${!in}"
    while IFS= read -r -t "$2" line <&"${!out}"; do
        case $line in
            '@@ '*) return "${line#@@ }" ;;
            *) [ -z "$line" ] || printf '%s\n' "$line" ;;
        esac
    done
    echo "guest $1 died or gave no answer within $2 s to: $3"
    return 124
}
guest() { in_guest "$1" 30 "$2"; }

# said_by_qemu NAME SECONDS WHAT: the next line of a guest's QEMU that contains it; others go to $OUT/NAME.qmp.
said_by_qemu() {
    local out=QMP_OUT_$1 line
    while IFS= read -r -t "$2" line <&"${!out}"; do
        printf '%s\n' "$line" >>"$OUT/$1.qmp"
        [[ $line != *"$3"* ]] || { printf '%s\n' "$line"; return; }
    done
    return 124
}
# qmp NAME COMMAND [ARGUMENTS]: asks a guest's QEMU, and prints its answer; the status is 0 if it did it.
qmp() {
    local in=QMP_IN_$1 answer arguments=${3:-}
    printf '{"execute":"%s","arguments":{%s},"id":"answer"}\n' "$2" "$arguments" >&"${!in}"
    answer=$(said_by_qemu "$1" 30 '"id": "answer"') || { echo "QEMU of $1 does not answer to $2"; return 124; }
    printf '%s\n' "$answer"
    [[ $answer == *'"return":'* ]]
}

# compositor WIDTH HEIGHT: weston without a screen, its one output filled by whatever window comes.
compositor() {
    WAYLAND_DISPLAY='' start weston weston --backend=headless --renderer=gl --socket=wl-0 --no-config --idle-time=0 \
        --shell=kiosk --width="$1" --height="$2" --debug
    wait_for 20 test -S "$S/wl-0" || { cat "$OUT/weston.log"; die "weston does not come up"; }
    export WAYLAND_DISPLAY=wl-0
}
screenshot() {
    local dir
    dir=$(mktemp -d)
    (cd "$dir" && weston-screenshooter) >>"$OUT/weston.log" 2>&1 || return 1
    mv "$dir"/*.png "$1"
}

finish() {
    local name
    for name in "${!PIDS[@]}"; do stop "$name" KILL; done
}
trap finish EXIT
