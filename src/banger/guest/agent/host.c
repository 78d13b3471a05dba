/* How the host is reached: a virtio-serial port (QEMU), or connections to a vsock (Firecracker, which
 * has no virtio-serial; the kernel's parameter banger.vsock names the port). */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "files.h"
#include "host.h"
#include "init.h"
#include "session.h"

enum { BACKLOG = 8 };

#define PORT_NAME "banger.agent"

/* virtio-serial ports are numbered by the bus: ours is known by its name only. */
static bool find_port(char *device, size_t size) {
    DIR *ports = opendir("/sys/class/virtio-ports");
    bool found = false;
    for (struct dirent *entry; ports && !found && (entry = readdir(ports)) != NULL;) {
        char path[320], name[64];
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        if (entry->d_name[0] == '.')
            continue;
        read_line(path, name, sizeof name);
        found = strcmp(name, PORT_NAME) == 0;
        if (found)
            snprintf(device, size, "/dev/%.32s", entry->d_name);
    }
    if (ports)
        closedir(ports);
    return found;
}

static int open_serial(void) {
    char device[64];
    int64_t end = now_ms() + DEVICE_MS;
    int uevents = open_uevents();
    while (!find_port(device, sizeof device))
        if (!wait_event(uevents, end))
            init_fatal("there is no virtio-serial port named " PORT_NAME);
    close(uevents);
    int port = open(device, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (port < 0)
        init_fatal("cannot open %s: %s", device, strerror(errno));
    return port;
}

/* The socket can be made as soon as the protocol is there, whatever becomes of its transport. */
static int listen_vsock(const char *text) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY};
    char *end;
    unsigned long number = strtoul(text, &end, 10);
    if (*text == 0 || *end != 0 || number == 0 || number > UINT32_MAX)
        init_fatal("banger.vsock=%s is not a port", text);
    address.svm_port = (unsigned)number;
    int listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0 ||
        listen(listener, BACKLOG) < 0)
        init_fatal("cannot listen on the vsock port %s: %s", text, strerror(errno));
    return listener;
}

void host_open(struct session *session) {
    char port[32];
    if (boot_parameter("banger.vsock", port, sizeof port))
        session->listener = listen_vsock(port);
    else
        session->port = open_serial();
}
