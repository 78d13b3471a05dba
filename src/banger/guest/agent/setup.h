/* SETUP: the guest's identity, given in one step before its first command. */
#ifndef BANGER_SETUP_H
#define BANGER_SETUP_H

#include <stdbool.h>

#include "request.h"

/* In a child job. Ends by fail() at the first step that fails. */
void job_setup(const struct request *request);

/* network.c: all return false with errno. */
bool network_up(const char *interface);
bool network_set_mac(const char *interface, const char *mac);
bool network_set_address(const char *interface, const char *address_with_prefix);
bool network_set_gateway(const char *gateway);
/* The interface with this MAC, or the first real one; false when there is none. */
bool network_find(const char *mac, char *interface, size_t size);

/* services.c: sshd and /etc/banger/start.d, once for each boot. */
void services_start(void);
/* In a copy of another machine: no key of that one's stays, and a running sshd learns the new. */
void services_renew_keys(void);

#endif
