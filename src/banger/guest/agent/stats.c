/* STATS: what /proc says, as JSON. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "files.h"

enum { PROC_LIMIT = 1 << 20 };

static uint64_t meminfo(const char *text, const char *key) {
    const char *at = text ? strstr(text, key) : NULL;
    return at ? strtoull(at + strlen(key), NULL, 10) : 0;
}

static void put_cpu(FILE *out) {
    char *text = read_small("/proc/stat", PROC_LIMIT);
    uint64_t total = 0, idle = 0;
    unsigned count = 0;
    char *at = text && strncmp(text, "cpu ", 4) == 0 ? text + 4 : (char *)"";
    for (int i = 0; i < 8; i++) { /* user nice system idle iowait irq softirq steal */
        uint64_t ticks = strtoull(at, &at, 10);
        total += ticks;
        if (i == 3 || i == 4)
            idle += ticks;
    }
    for (char *line = text; line && (line = strstr(line, "\ncpu")) != NULL; line++)
        count++;
    fprintf(out, "\"cpu\":{\"busy_ticks\":%" PRIu64 ",\"total_ticks\":%" PRIu64 ",\"count\":%u}",
            total - idle, total, count);
    free(text);
}

static void put_disks(FILE *out) {
    static const char *const mounts[] = {"/", "/root"};
    fputs("\"disks\":[", out);
    fsblkcnt_t total = 0;
    for (size_t i = 0; i < 2; i++) {
        struct statvfs info;
        if (statvfs(mounts[i], &info) < 0 || (i > 0 && info.f_blocks == total))
            continue; /* /root is no disk of its own */
        total = info.f_blocks;
        fprintf(out, "%s{\"mount\":\"%s\",\"total_kib\":%" PRIu64 ",\"free_kib\":%" PRIu64 "}",
                i ? "," : "", mounts[i], (uint64_t)info.f_blocks * info.f_frsize / 1024,
                (uint64_t)info.f_bavail * info.f_frsize / 1024);
    }
    fputs("]", out);
}

static void put_network(FILE *out) {
    char *text = read_small("/proc/net/dev", PROC_LIMIT);
    uint64_t received = 0, sent = 0;
    for (char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        char *colon = strchr(line, ':');
        char *end = strchr(line, '\n');
        if (colon == NULL || (end && colon > end) || strncmp(line + strspn(line, " "), "lo:", 3) == 0)
            continue;
        char *at = colon + 1;
        received += strtoull(at, &at, 10);
        for (int i = 1; i < 8; i++)
            strtoull(at, &at, 10);
        sent += strtoull(at, &at, 10);
    }
    fprintf(out, "\"network\":{\"rx_bytes\":%" PRIu64 ",\"tx_bytes\":%" PRIu64 "}", received, sent);
    free(text);
}

static unsigned count_processes(void) {
    DIR *proc = opendir("/proc");
    unsigned count = 0;
    for (struct dirent *entry; proc && (entry = readdir(proc)) != NULL;)
        count += isdigit((unsigned char)entry->d_name[0]) != 0;
    if (proc)
        closedir(proc);
    return count;
}

void job_stats(void) {
    char uptime[64], load[64];
    double loads[3] = {0, 0, 0};
    read_line("/proc/uptime", uptime, sizeof uptime);
    if (read_line("/proc/loadavg", load, sizeof load))
        sscanf(load, "%lf %lf %lf", &loads[0], &loads[1], &loads[2]);
    char *memory = read_small("/proc/meminfo", PROC_LIMIT);
    printf("{\"uptime_s\":%.2f,", strtod(uptime, NULL));
    put_cpu(stdout);
    printf(",\"memory\":{\"total_kib\":%" PRIu64 ",\"available_kib\":%" PRIu64 "},",
           meminfo(memory, "MemTotal:"), meminfo(memory, "MemAvailable:"));
    put_disks(stdout);
    putchar(',');
    put_network(stdout);
    printf(",\"processes\":%u,\"load\":[%.2f,%.2f,%.2f]}", count_processes(), loads[0], loads[1],
           loads[2]);
    free(memory);
    if (fflush(stdout) != 0)
        fail_errno("standard output");
}
