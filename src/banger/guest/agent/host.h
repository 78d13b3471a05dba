/* How the host is reached. */
#ifndef BANGER_HOST_H
#define BANGER_HOST_H

struct session;

/* Give the session its port, once that is there, or what it listens on. */
void host_open(struct session *session);

#endif
