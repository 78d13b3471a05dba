#define _GNU_SOURCE
#include "setup.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/random.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "files.h"
#include "init.h"
#include "session.h"

/* From the kernel's fs/ext4/ext4.h; no exported header has it. */
#define EXT4_IOC_RESIZE_FS _IOW('f', 16, uint64_t)
/* linux/random.h before 4.17 lacks it. */
#ifndef RNDRESEEDCRNG
#define RNDRESEEDCRNG _IO('R', 0x07)
#endif

enum {
    EXT4_MAGIC = 0xEF53,
    HOSTS_LIMIT = 64 << 10,
    RESIZE_MS = 10000,
    RESIZE_POLL_US = 2000,
};

static void must(bool done, const char *what) {
    if (!done)
        fail_errno(what);
}

/* The pool first: all that is made after it (host keys) depends on it. */
static void seed_random(const uint8_t *bytes, uint32_t count) {
    struct {
        int entropy_count;
        int buf_size;
        uint8_t bytes[512];
    } pool = {.entropy_count = (int)count * 8, .buf_size = (int)count};
    memcpy(pool.bytes, bytes, count);
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    must(fd >= 0 && ioctl(fd, RNDADDENTROPY, &pool) == 0 && ioctl(fd, RNDRESEEDCRNG) == 0,
         "random pool");
    close(fd);
}

static void set_clock(uint64_t ns) {
    struct timespec now = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
    must(clock_settime(CLOCK_REALTIME, &now) == 0, "clock");
}

/* Keep what the image's /etc/hosts says, but for the line of the name we give. */
static void write_hosts(const char *hostname) {
    char *old = read_small("/etc/hosts", HOSTS_LIMIT);
    size_t room = (old ? strlen(old) : 0) + strlen(hostname) + 160;
    char *hosts = must_alloc(room);
    FILE *out = fmemopen(hosts, room, "w");
    if (out == NULL)
        out_of_memory();
    if (old == NULL || strstr(old, "localhost") == NULL)
        fputs("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n", out);
    fprintf(out, "127.0.1.1\t%s\n", hostname);
    for (char *line = old ? strtok(old, "\n") : NULL; line; line = strtok(NULL, "\n"))
        if (strncmp(line, "127.0.1.1", 9) != 0)
            fprintf(out, "%s\n", line);
    fclose(out);
    must(replace_text("/etc/hosts", hosts, 0644), "/etc/hosts");
    free(hosts);
    free(old);
}

static void set_hostname(const char *hostname) {
    static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-";
    char line[80];
    if (strlen(hostname) > 63 || hostname[strspn(hostname, allowed)] != 0)
        fail(EINVAL, "the host name is not valid");
    must(sethostname(hostname, strlen(hostname)) == 0, "host name");
    snprintf(line, sizeof line, "%s\n", hostname);
    must(replace_text("/etc/hostname", line, 0644), "/etc/hostname");
    write_hosts(hostname);
}

static void set_machine_id(const char *id) {
    char line[40];
    if (strlen(id) != 32 || id[strspn(id, "0123456789abcdef")] != 0)
        fail(EINVAL, "the machine-id is not 32 lower-case hex digits");
    snprintf(line, sizeof line, "%s\n", id);
    must(replace_text("/etc/machine-id", line, 0444), "/etc/machine-id");
    struct stat info;
    if (lstat("/var/lib/dbus/machine-id", &info) == 0 && S_ISREG(info.st_mode))
        must(replace_text("/var/lib/dbus/machine-id", line, 0444), "/var/lib/dbus/machine-id");
}

static void set_network(const struct request *request) {
    char interface[32] = "";
    const char *address = request->text[SETUP_ADDRESS], *mac = request->text[SETUP_MAC];
    if (!network_find(mac, interface, sizeof interface))
        fail(ENODEV, "the guest has no network interface");
    char path[80], current[32];
    snprintf(path, sizeof path, "/sys/class/net/%s/address", interface);
    read_line(path, current, sizeof current);
    if (mac != NULL && strcasecmp(mac, current) != 0)
        must(network_set_mac(interface, mac), "MAC address");
    if (address != NULL)
        must(network_set_address(interface, address), "interface address");
    must(network_up(interface), "network interface");
    if (request->text[SETUP_GATEWAY] != NULL)
        must(network_set_gateway(request->text[SETUP_GATEWAY]), "gateway");
}

static void set_dns(const char *server) {
    char line[80];
    if (strlen(server) > 45 || server[strspn(server, "0123456789abcdefABCDEF.:")] != 0)
        fail(EINVAL, "the DNS server is not an address");
    snprintf(line, sizeof line, "nameserver %s\n", server);
    /* Often a link into /run, of a resolver that a minimal guest does not run. */
    must(replace_text("/etc/resolv.conf", line, 0644), "/etc/resolv.conf");
}

/* Bytes of the device below a path; 0 when that is no block device. */
static uint64_t device_size(const struct stat *info) {
    char path[64], line[32];
    snprintf(path, sizeof path, "/sys/dev/block/%u:%u/size", major(info->st_dev),
             minor(info->st_dev));
    return read_line(path, line, sizeof line) ? strtoull(line, NULL, 10) * 512 : 0;
}

/* Grow a mounted ext4 to its device; nothing happens when it fills it already. A device that was
 * enlarged under a running kernel is waited for: its driver hears of it when it gets to run. */
static void grow(const char *mount, uint64_t least) {
    struct stat info;
    struct statfs fs;
    if (stat(mount, &info) < 0 || statfs(mount, &fs) < 0 || fs.f_type != EXT4_MAGIC)
        return;
    uint64_t size = device_size(&info);
    for (int64_t end = now_ms() + RESIZE_MS; size < least; size = device_size(&info)) {
        if (now_ms() > end)
            fail(ETIMEDOUT, "the disk at %s has not grown to %llu bytes", mount,
                 (unsigned long long)least);
        usleep(RESIZE_POLL_US);
    }
    if (size == 0)
        return;
    uint64_t blocks = size / (uint64_t)fs.f_bsize;
    int fd = open(mount, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        fail_errno(mount);
    /* EROFS: a read-only system stays as it is. EINVAL: the device is smaller, which mount took. */
    if (ioctl(fd, EXT4_IOC_RESIZE_FS, &blocks) < 0 && errno != EROFS && errno != EINVAL) {
        int error = errno;
        fail(error, "growing the file system at %s: %s", mount, strerror(error));
    }
    close(fd);
}

void job_setup(const struct request *request) {
    if (request->bytes != NULL)
        seed_random(request->bytes, request->byte_count);
    if (request->has[SETUP_TIME])
        set_clock(request->number[SETUP_TIME]);
    must(provide_directory("/etc", true), "/etc");
    if (request->text[SETUP_MACHINE_ID])
        set_machine_id(request->text[SETUP_MACHINE_ID]);
    if (request->text[SETUP_HOSTNAME])
        set_hostname(request->text[SETUP_HOSTNAME]);
    if (request->text[SETUP_ADDRESS] || request->text[SETUP_MAC])
        set_network(request);
    if (request->text[SETUP_DNS])
        set_dns(request->text[SETUP_DNS]);
    if (request->number[SETUP_COPIED])
        services_renew_keys();
    grow("/", 0);
    grow("/root", request->number[SETUP_WORK_SIZE]);
    /* Not before the guest has its name: one that waits to be somebody has none yet. */
    if (init_is_ours() && request->text[SETUP_HOSTNAME])
        services_start();
}
