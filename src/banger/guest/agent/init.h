/* PID 1: from the initramfs to a running guest, and down again. */
#ifndef BANGER_INIT_H
#define BANGER_INIT_H

#include <stdbool.h>

/* Mount, load modules, switch to the root. In systemd mode returns only in the daemon, after the
 * image's init was started in PID 1; in minimal mode returns in PID 1. Ends the machine with a
 * message on failure. */
void init_boot(void);

/* Whether the agent is this machine's init (minimal), rather than a daemon beside one. */
bool init_is_ours(void);

/* The agent's port, once it is there. */
int init_open_port(void);

_Noreturn void init_fatal(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* power.c: end the machine. */
_Noreturn void power_off(bool reboot_instead);
_Noreturn void power_cut(bool reboot_instead);

#endif
