/* The guest's one interface, by ioctl: small, and old enough to be everywhere. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "files.h"
#include "setup.h"

static bool control(unsigned long operation, void *argument) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return false;
    bool done = ioctl(fd, operation, argument) == 0;
    int error = errno;
    close(fd);
    errno = error;
    return done;
}

static struct ifreq request_for(const char *interface) {
    struct ifreq request = {0};
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", interface);
    return request;
}

static bool set_up(const char *interface, bool up) {
    struct ifreq request = request_for(interface);
    if (!control(SIOCGIFFLAGS, &request))
        return false;
    request.ifr_flags = (short)(up ? request.ifr_flags | IFF_UP : request.ifr_flags & ~IFF_UP);
    return control(SIOCSIFFLAGS, &request);
}

bool network_up(const char *interface) {
    return set_up(interface, true);
}

bool network_set_mac(const char *interface, const char *mac) {
    struct ifreq request = request_for(interface);
    unsigned bytes[6];
    int used = 0;
    if (sscanf(mac, "%2x:%2x:%2x:%2x:%2x:%2x%n", &bytes[0], &bytes[1], &bytes[2], &bytes[3],
               &bytes[4], &bytes[5], &used) != 6 || mac[used] != 0) {
        errno = EINVAL;
        return false;
    }
    request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    for (int i = 0; i < 6; i++)
        request.ifr_hwaddr.sa_data[i] = (char)bytes[i];
    return set_up(interface, false) && control(SIOCSIFHWADDR, &request);
}

static void set_in(struct sockaddr *address, in_addr_t value) {
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr = {.s_addr = value}};
    memcpy(address, &in, sizeof in);
}

bool network_set_address(const char *interface, const char *address_with_prefix) {
    char text[INET_ADDRSTRLEN];
    struct in_addr address;
    struct ifreq request = request_for(interface), mask = request_for(interface);
    const char *slash = strchr(address_with_prefix, '/');
    size_t length = slash ? (size_t)(slash - address_with_prefix) : sizeof text;
    unsigned long prefix = slash ? strtoul(slash + 1, NULL, 10) : 0;
    if (length >= sizeof text || prefix < 1 || prefix > 32) {
        errno = EINVAL;
        return false;
    }
    memcpy(text, address_with_prefix, length);
    text[length] = 0;
    if (inet_pton(AF_INET, text, &address) != 1) {
        errno = EINVAL;
        return false;
    }
    set_in(&request.ifr_addr, address.s_addr);
    set_in(&mask.ifr_netmask, htonl(0xFFFFFFFFu << (32 - prefix)));
    return control(SIOCSIFADDR, &request) && control(SIOCSIFNETMASK, &mask) &&
           set_up(interface, true);
}

bool network_set_gateway(const char *gateway) {
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
    struct in_addr address;
    if (inet_pton(AF_INET, gateway, &address) != 1) {
        errno = EINVAL;
        return false;
    }
    set_in(&route.rt_dst, 0);
    set_in(&route.rt_genmask, 0);
    set_in(&route.rt_gateway, address.s_addr);
    return control(SIOCADDRT, &route) || errno == EEXIST;
}

bool network_find(const char *mac, char *interface, size_t size) {
    DIR *all = opendir("/sys/class/net");
    bool found = false;
    for (struct dirent *entry; all && (entry = readdir(all)) != NULL;) {
        char path[320], address[32];
        snprintf(path, sizeof path, "/sys/class/net/%s/device", entry->d_name);
        if (entry->d_name[0] == '.' || access(path, F_OK) < 0)
            continue; /* lo, and whatever has no device behind it */
        snprintf(path, sizeof path, "/sys/class/net/%s/address", entry->d_name);
        read_line(path, address, sizeof address);
        bool exact = mac != NULL && strcasecmp(address, mac) == 0;
        if (exact || !found || (mac == NULL && strcmp(entry->d_name, interface) < 0))
            snprintf(interface, size, "%s", entry->d_name);
        found = true;
        if (exact)
            break;
    }
    if (all)
        closedir(all);
    return found;
}
