/* Stands in for Firecracker in a jail: says on its standard output what it is and what it can reach,
 * a line for each, the last of which is "done"; then it waits to be killed. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

static const char *outcome(int result) { return result < 0 ? strerror(errno) : "yes"; }

/* Whether a file can be opened so. */
static void try_open(const char *what, const char *path, int flags) {
    int fd = open(path, flags, 0600);
    printf("%s %s: %s\n", what, path, outcome(fd));
    if (fd >= 0) close(fd);
}

static void identity(void) {
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct caps[2];
    uid_t r, e, s;
    char host[65];
    getresuid(&r, &e, &s);
    printf("uid: %u %u %u\n", r, e, s);
    getresgid(&r, &e, &s);
    printf("gid: %u %u %u\n", r, e, s);
    printf("groups: %d\n", getgroups(0, NULL));
    memset(caps, 0, sizeof caps);
    syscall(SYS_capget, &head, caps);
    printf("capabilities: %u\n", caps[0].effective | caps[0].permitted | caps[0].inheritable |
                                     caps[1].effective | caps[1].permitted | caps[1].inheritable);
    printf("no new privileges: %d\n", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
    printf("pid: %d\n", getpid());
    printf("environment: %s\n", environ[0] ? environ[0] : "");
    gethostname(host, sizeof host);
    printf("become root: %s\n", outcome(setuid(0)));
    printf("kill everybody: %s\n", outcome(kill(-1, 0)));
}

static void limits(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    printf("open files: %lu\n", (unsigned long)limit.rlim_max);
    getrlimit(RLIMIT_CORE, &limit);
    printf("core: %lu\n", (unsigned long)limit.rlim_max);
    for (int fd = 3; fd < 1024; fd++)
        if (fcntl(fd, F_GETFD) >= 0) printf("inherited: %d\n", fd);
}

static void list(const char *path) {
    DIR *directory = opendir(path);
    struct dirent *entry;
    while (directory && (entry = readdir(directory)))
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
            printf("in %s: %s\n", path, entry->d_name);
    if (directory) closedir(directory);
}

static void network(void) {
    struct if_nameindex *all = if_nameindex();
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    int tun = open("/dev/net/tun", O_RDWR);
    for (struct if_nameindex *each = all; each && each->if_index; each++)
        printf("interface: %s\n", each->if_name);
    strcpy(request.ifr_name, "tap0");
    printf("tap: %s\n", outcome(ioctl(tun, TUNSETIFF, &request)));
    strcpy(request.ifr_name, "tap1");
    printf("another tap: %s\n", outcome(ioctl(open("/dev/net/tun", O_RDWR), TUNSETIFF, &request)));
}

static void files(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "out/api.sock"};
    int fd;
    try_open("read", "kernel", O_RDONLY);
    try_open("write", "kernel", O_RDWR);
    try_open("write", "disks/system", O_RDWR);
    try_open("write", "disks/mapped", O_RDWR);
    try_open("write", "log", O_RDWR);
    try_open("make", "out/made", O_RDWR | O_CREAT | O_EXCL);
    try_open("kvm", "/dev/kvm", O_RDWR);
    try_open("read", "/etc/passwd", O_RDONLY);
    try_open("read", "/proc/1/maps", O_RDONLY);
    try_open("read", "out/../../../../etc/passwd", O_RDONLY);
    printf("link: %s\n", outcome(symlink("/kernel", "out/link")));
    try_open("read", "out/link", O_RDONLY);
    printf("device: %s\n", outcome(mknod("out/device", S_IFBLK | 0600, 0x100)));
    printf("fill: ");
    fd = open("/filler", O_RDWR | O_CREAT, 0600);
    printf("%s\n", ftruncate(fd, 1 << 30) || posix_fallocate(fd, 0, 64 << 20) ? "no" : "yes");
    unlink("/filler");
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    printf("socket: %s\n", outcome(bind(fd, (struct sockaddr *)&address, sizeof address)));
}

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "--version")) {
        puts("Firecracker v1.16.1");
        return 0;
    }
    printf("arguments:");
    for (int n = 1; n < argc; n++) printf(" %s", argv[n]);
    puts("");
    identity();
    limits();
    list("/");
    list("/disks");
    network();
    files();
    puts("done");
    fflush(stdout);
    for (;;) pause();
}
