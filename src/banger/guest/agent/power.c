/* Taking the machine down in good order. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "files.h"
#include "init.h"
#include "session.h"

enum {
    GRACE_MS = 2000,
    INIT_MS = 60000,
    ASK_AGAIN_MS = 1000,
    /* What systemd calls SIGRTMIN, as it is built with glibc; musl's own is 35. */
    SYSTEMD_RTMIN = 34,
};

/* Firecracker's machines cannot power off: they would halt for ever. It ends when they reset. */
static bool ends_by_reset(void) {
    char how[16];
    return boot_parameter("banger.end", how, sizeof how) && strcmp(how, "reset") == 0;
}

void power_prepare_systemd(void) {
    static const char *const parts[] = {"/run/systemd", "/run/systemd/system",
                                        "/run/systemd/system/systemd-poweroff.service.d"};
    static const char text[] = "[Unit]\nSuccessAction=reboot-force\n";
    if (!ends_by_reset())
        return;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        mkdir(parts[i], 0755);
    int file = open("/run/systemd/system/systemd-poweroff.service.d/banger.conf",
                    O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (file < 0 || write(file, text, sizeof text - 1) < 0)
        dprintf(STDERR_FILENO, "banger: a poweroff will not end this machine: %s\n",
                strerror(errno));
    if (file >= 0)
        close(file);
}

_Noreturn void power_cut(bool reboot_instead) {
    reboot_instead |= ends_by_reset();
    sync();
    reboot(reboot_instead ? RB_AUTOBOOT : RB_POWER_OFF);
    reboot(RB_AUTOBOOT); /* a machine that cannot power off: its hypervisor exits on reset */
    for (;;)
        pause();
}

/* Reap until nobody is left, or the time is over. For PID 1, to have no children means that there
 * are no processes: orphans become its children. (Asking kill(-1, 0) would count kernel threads.)
 * Beside another init it means nothing, and the whole time is given. */
static void wait_for_all(int64_t limit_ms) {
    int64_t end = now_ms() + limit_ms;
    sigset_t children;
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD); /* blocked since the session began */
    for (;;) {
        pid_t pid;
        while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
            ;
        int64_t left = end - now_ms();
        if ((pid < 0 && init_is_ours()) || left <= 0)
            return;
        struct timespec wait = {.tv_sec = left / 1000, .tv_nsec = left % 1000 * 1000000};
        sigtimedwait(&children, NULL, &wait);
    }
}

static void go_down(bool reboot_instead) {
    kill(-1, SIGTERM);
    kill(-1, SIGCONT);
    wait_for_all(GRACE_MS);
    kill(-1, SIGKILL);
    wait_for_all(GRACE_MS);
    sync();
    umount2("/root", 0);
    /* The root is busy with us: read-only is as good as unmounted. */
    mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
    power_cut(reboot_instead);
}

_Noreturn void power_off(bool reboot_instead) {
    char init[32];
    reboot_instead |= ends_by_reset();
    /* systemd's own signals for poweroff.target and reboot.target: systemd(1), "Signals". */
    int number = SYSTEMD_RTMIN + (reboot_instead ? 5 : 4);
    if (!init_is_ours() && read_line("/proc/1/comm", init, sizeof init) &&
        strcmp(init, "systemd") == 0) {
        /* Its last step ends us by SIGTERM: to hold out would only make it wait. Asked again, as a
         * systemd that has only just started does not hear the signal yet. */
        for (int64_t end = now_ms() + INIT_MS; now_ms() < end && kill(1, number) == 0;)
            poll(NULL, 0, ASK_AGAIN_MS);
    }
    go_down(reboot_instead);
    power_cut(reboot_instead);
}
