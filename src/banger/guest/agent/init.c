#define _GNU_SOURCE
#include "init.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include "files.h"
#include "session.h"
#include "setup.h"

enum { FILE_LIMIT = 4096 };

#define NEW_ROOT "/newroot"

static bool ours = true;

bool init_is_ours(void) {
    return ours;
}

_Noreturn void init_fatal(const char *format, ...) {
    char message[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    dprintf(STDERR_FILENO, "banger: fatal: %s\n", message);
    power_cut(false);
}

static void mount_at(const char *source, const char *target, const char *type,
                     unsigned long flags, const char *options, bool required) {
    mkdir(target, 0755);
    if (mount(source, target, type, flags, options) < 0 && errno != EBUSY && required)
        init_fatal("cannot mount %s at %s: %s", type, target, strerror(errno));
}

static void open_console(void) {
    int fd = open("/dev/console", O_RDWR | O_NOCTTY);
    if (fd < 0)
        fd = open("/dev/null", O_RDWR);
    for (int target = 0; target <= STDERR_FILENO && fd >= 0; target++)
        if (fd != target)
            dup2(fd, target);
    if (fd > STDERR_FILENO)
        close(fd);
}

static int by_name(const struct dirent **left, const struct dirent **right) {
    return strcmp((*left)->d_name, (*right)->d_name);
}

static int is_module(const struct dirent *entry) {
    size_t length = strlen(entry->d_name);
    return length > 3 && strcmp(entry->d_name + length - 3, ".ko") == 0;
}

bool boot_parameter(const char *name, char *value, size_t size) {
    char line[4096], *state;
    size_t length = strlen(name);
    bool found = false;
    read_line("/proc/cmdline", line, sizeof line);
    for (char *word = strtok_r(line, " ", &state); word; word = strtok_r(NULL, " ", &state))
        if (strncmp(word, name, length) == 0 && word[length] == '=') {
            snprintf(value, size, "%s", word + length + 1);
            found = true;
        }
    return found;
}

/* A module that does not load is only told of: what it is for may not be in this machine. Those of
 * vsock are for machines that are told of one. */
static void load_modules(void) {
    struct dirent **entries;
    char port[32];
    bool vsock = boot_parameter("banger.vsock", port, sizeof port);
    int count = scandir("/modules", &entries, is_module, by_name);
    for (int i = 0; i < count; i++) {
        char path[300];
        snprintf(path, sizeof path, "/modules/%s", entries[i]->d_name);
        bool wanted = vsock || strstr(entries[i]->d_name, "vsock") == NULL;
        int fd = wanted ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        if (wanted && (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)))
            dprintf(STDERR_FILENO, "banger: %s: %s\n", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        unlink(path); /* the initramfs is memory */
        free(entries[i]);
    }
    if (count >= 0)
        free(entries);
}

int open_uevents(void) {
    struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
    int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
    if (fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        close(fd);
        fd = -1;
    }
    return fd;
}

bool wait_event(int uevents, int64_t end) {
    char event[4096];
    int64_t left = end - now_ms();
    if (left <= 0)
        return false;
    struct pollfd wait = {uevents, POLLIN, 0};
    poll(&wait, 1, (int)left);
    while (recv(uevents, event, sizeof event, 0) > 0)
        ;
    return true;
}

/* Firecracker gives disks serials of its own, and their order is that in which they were told of:
 * the parameter banger.disks has their names in that order. */
static bool find_placed(const char *order, const char *name, char *device, size_t size) {
    size_t length = strlen(name);
    for (char letter = 'a'; letter <= 'z' && *order; letter++) {
        size_t word = strcspn(order, ",");
        if (word == length && strncmp(order, name, length) == 0) {
            snprintf(device, size, "/dev/vd%c", letter);
            return access(device, F_OK) == 0;
        }
        order += word + (order[word] == ',');
    }
    return false;
}

/* The device of a disk, by its serial; or by its place when no disk has one. */
static bool find_disk(const char *serial, const char *fallback, char *device, size_t size) {
    char order[256];
    if (boot_parameter("banger.disks", order, sizeof order))
        return find_placed(order, serial, device, size);
    DIR *disks = opendir("/sys/block");
    bool found = false, any_serial = false;
    for (struct dirent *entry; disks && !found && (entry = readdir(disks)) != NULL;) {
        char path[320], have[64];
        if (strncmp(entry->d_name, "vd", 2) != 0)
            continue;
        snprintf(path, sizeof path, "/sys/block/%s/serial", entry->d_name);
        read_line(path, have, sizeof have);
        any_serial |= have[0] != 0;
        found = strcmp(have, serial) == 0;
        if (found)
            snprintf(device, size, "/dev/%.32s", entry->d_name);
    }
    if (disks)
        closedir(disks);
    if (found || any_serial)
        return found;
    snprintf(device, size, "/dev/%s", fallback);
    return access(device, F_OK) == 0;
}

/* noinit_itable: the disks are files that read as zeros where nothing was written, so the kernel
 * need not zero inode tables behind the user's first commands. */
static void mount_disk(const char *device, const char *target, unsigned long flags) {
    mkdir(target, 0755);
    if (mount(device, target, "ext4", flags, "noinit_itable") == 0)
        return;
    int error = errno;
    if ((error == EROFS || error == EACCES) &&
        mount(device, target, "ext4", flags | MS_RDONLY, "noinit_itable") == 0)
        return;
    init_fatal("cannot mount %s at %s: %s", device, target, strerror(error));
}

static void mount_root(int uevents) {
    char device[64];
    int64_t end = now_ms() + DEVICE_MS;
    while (!find_disk("system", "vda", device, sizeof device))
        if (!wait_event(uevents, end))
            init_fatal("there is no disk named \"system\"");
    mount_disk(device, NEW_ROOT, 0);
}

static void switch_root(void) {
    static const char *const moved[] = {"/dev", "/proc", "/sys", "/run"};
    for (size_t i = 0; i < sizeof moved / sizeof moved[0]; i++) {
        char target[32];
        snprintf(target, sizeof target, NEW_ROOT "%s", moved[i]);
        /* A link would lead out of the image as long as we have not switched. */
        if (!provide_directory(target, false) || mount(moved[i], target, NULL, MS_MOVE, NULL) < 0)
            init_fatal("cannot move %s to the root: %s", moved[i], strerror(errno));
    }
    unlink("/init"); /* the memory of its pages stays ours while we run */
    if (chdir(NEW_ROOT) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 ||
        chdir("/") < 0)
        init_fatal("cannot switch to the root: %s", strerror(errno));
}

/* A work disk that has this file begins as what the image has below it: nobody on the host has
 * looked into that file system (see make_empty_seed in images/root.py). */
#define FROM_IMAGE "/root/.banger-from-image"
#define IMAGE_AGAIN "/run/banger-image"

static bool ended_well(pid_t child) {
    int status;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

/* Copy a file or a tree into /root, by the jobs that do it for clients. */
static bool copy_home(const char *path, const char *name) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        return false;
    pid_t packer = fork();
    if (packer == 0) {
        dup2(ends[1], STDOUT_FILENO);
        tar_pack(STDOUT_FILENO, path, name, 0);
        _exit(0);
    }
    close(ends[1]);
    pid_t unpacker = fork();
    if (unpacker == 0) {
        tar_unpack(ends[0], "/root", NULL);
        _exit(0);
    }
    close(ends[0]);
    bool packed = ended_well(packer), unpacked = ended_well(unpacker);
    return packed && unpacked;
}

static void fill_home(void) {
    struct stat info;
    if (access(FROM_IMAGE, F_OK) < 0)
        return;
    mkdir(IMAGE_AGAIN, 0700);
    if (mount("/", IMAGE_AGAIN, NULL, MS_BIND, NULL) < 0)
        init_fatal("cannot look below /root: %s", strerror(errno));
    bool whole = true;
    DIR *home = opendir(IMAGE_AGAIN "/root");
    for (struct dirent *entry; home && (entry = readdir(home)) != NULL;) {
        char path[320];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        snprintf(path, sizeof path, IMAGE_AGAIN "/root/%s", entry->d_name);
        whole &= copy_home(path, entry->d_name);
    }
    if (home && fstat(dirfd(home), &info) == 0)
        whole &= chown("/root", info.st_uid, info.st_gid) == 0 &&
                 chmod("/root", info.st_mode & 07777) == 0;
    if (home)
        closedir(home);
    umount2(IMAGE_AGAIN, MNT_DETACH);
    rmdir(IMAGE_AGAIN);
    if (whole)
        unlink(FROM_IMAGE);
    else
        dprintf(STDERR_FILENO, "banger: not all that the image has in /root was copied\n");
}

static void mount_work(void) {
    char device[64];
    if (!find_disk("work", "vdb", device, sizeof device))
        return;
    provide_directory("/root", false);
    mount_disk(device, "/root", 0);
    fill_home();
}

/* For an image that has none for this kernel. Most programs need none: it is only told of when that
 * cannot be. */
static void mount_modules(void) {
    char device[64], path[128];
    struct utsname kernel;
    uname(&kernel);
    snprintf(path, sizeof path, "/lib/modules/%s", kernel.release);
    if (access(path, F_OK) == 0 || !find_disk("modules", "vdc", device, sizeof device))
        return;
    if (!provide_directory("/lib", true) || !provide_directory("/lib/modules", true) ||
        mount(device, "/lib/modules", "ext4", MS_RDONLY, NULL) < 0)
        dprintf(STDERR_FILENO, "banger: cannot mount %s at /lib/modules: %s\n", device,
                strerror(errno));
}

/* Where a link leads is the image's own affair. */
static void provide_tmp(void) {
    struct stat info;
    if (provide_directory("/tmp", true) && lstat("/tmp", &info) == 0 && S_ISDIR(info.st_mode))
        chmod("/tmp", 01777);
}

static void mount_minimal(void) {
    mount_at("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC,
             "gid=5,mode=620,ptmxmode=666", true);
    mount_at("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777", true);
    mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, false);
    static const char *const links[][2] = {{"/proc/self/fd", "/dev/fd"},
                                           {"/proc/self/fd/0", "/dev/stdin"},
                                           {"/proc/self/fd/1", "/dev/stdout"},
                                           {"/proc/self/fd/2", "/dev/stderr"}};
    for (size_t i = 0; i < sizeof links / sizeof links[0]; i++)
        (void)!symlink(links[i][0], links[i][1]);
    provide_tmp();
    network_up("lo");
}

static bool wants_systemd(void) {
    char mode[32];
    if (!boot_parameter("banger.init", mode, sizeof mode))
        return false;
    bool systemd = strcmp(mode, "systemd") == 0;
    if (!systemd && strcmp(mode, "minimal") != 0)
        init_fatal("banger.init=%s: it is minimal or systemd", mode);
    return systemd;
}

/* Leave a daemon behind and become the image's init. Returns in the daemon. */
static void hand_over(void) {
    static const char *const inits[] = {"/sbin/init", "/lib/systemd/systemd",
                                        "/usr/lib/systemd/systemd"};
    const char *found = NULL;
    for (size_t i = 0; i < sizeof inits / sizeof inits[0] && !found; i++)
        if (access(inits[i], X_OK) == 0)
            found = inits[i];
    if (found == NULL)
        init_fatal("the image has no /sbin/init; start this machine with --init minimal");
    power_prepare_systemd();
    pid_t daemon = fork();
    if (daemon == 0) {
        ours = false;
        setsid();
        int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
        if (score >= 0) {
            (void)!write(score, "-1000", 5);
            close(score);
        }
        return;
    }
    char *arguments[] = {(char *)found, NULL};
    char *environment[] = {"HOME=/", "TERM=linux", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", NULL};
    if (daemon > 0)
        execve(found, arguments, environment);
    init_fatal("cannot run %s: %s", found, strerror(errno));
}

void init_boot(void) {
    struct rlimit files = {FILE_LIMIT, 524288};
    mount_at("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755", true);
    open_console();
    mount_at("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, true);
    mount_at("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, true);
    mount_at("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755", true);
    setrlimit(RLIMIT_NOFILE, &files);
    umask(022);
    int uevents = open_uevents();
    load_modules();
    mount_root(uevents);
    close(uevents);
    switch_root();
    mount_work();
    mount_modules();
    if (wants_systemd())
        hand_over();
    else
        mount_minimal();
}
