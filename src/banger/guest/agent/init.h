/* PID 1: from the initramfs to a running guest, and down again. */
#ifndef BANGER_INIT_H
#define BANGER_INIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { DEVICE_MS = 20000 };

/* Mount, load modules, switch to the root. In systemd mode returns only in the daemon, after the
 * image's init was started in PID 1; in minimal mode returns in PID 1. Ends the machine with a
 * message on failure. */
void init_boot(void);

/* Whether the agent is this machine's init (minimal), rather than a daemon beside one. */
bool init_is_ours(void);

/* The value of a parameter of the kernel's, the last one of that name; false when there is none. */
bool boot_parameter(const char *name, char *value, size_t size);

/* The kernel's device events: what we wait for, rather than asking again and again. */
int open_uevents(void);
/* False when the time (of now_ms) is over. */
bool wait_event(int uevents, int64_t end);

_Noreturn void init_fatal(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* power.c: end the machine. Where it ends by a reset, have a systemd that is to start do so, too,
 * at the end of poweroff.target. */
void power_prepare_systemd(void);
_Noreturn void power_off(bool reboot_instead);
_Noreturn void power_cut(bool reboot_instead);

#endif
