/* The limit: a server that does nothing but write() the same bytes to every connection.
 *
 *   loop [--cpu C]
 *
 * Says {"ready": …, "port": …} on stdout, then obeys "publish RATE SECONDS SESSIONS" on stdin like the other servers:
 * events of 300 bytes of JSON, all that are due at a wake-up in one write() per connection, at most WAKEUPS wake-ups a
 * second. With sessions, each event goes to one connection in turn. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EVENT = 300, WAKEUPS = 200, MOST = 20000, BATCH = 4096 };

struct peer {
    int fd;
    char *rest; /* what the socket did not take */
    size_t left;
};

static struct peer peers[MOST];
static int connected, epoll;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

/* One chunk of HTTP with `n` frames. */
static size_t frames(char *to, long n) {
    static char pad[EVENT];
    char one[EVENT + 16], *start = to;
    memset(pad, 'x', sizeof pad);
    int used = snprintf(one, sizeof one, "data: {\"t\":%lu,\"delta\":\"\"}", now_ns());
    int size = snprintf(one, sizeof one, "data: {\"t\":%lu,\"delta\":\"%.*s\"}\n\n", now_ns(), EVENT + 6 - used, pad);
    to += sprintf(to, "%lx\r\n", (unsigned long)size * (unsigned long)n);
    for (long i = 0; i < n; i++) memcpy(to, one, (size_t)size), to += size;
    memcpy(to, "\r\n", 2);
    return (size_t)(to + 2 - start);
}

/* Returns whether the peer took it, now or later. */
static int give(struct peer *p, const char *from, size_t length) {
    if (p->left) {
        ssize_t took = write(p->fd, p->rest, p->left);
        if (took > 0) memmove(p->rest, p->rest + took, p->left -= (size_t)took);
        if (p->left) return 0;
    }
    ssize_t took = write(p->fd, from, length);
    if (took < 0 && errno != EAGAIN) return 0;
    if (took <= 0) return 0;
    if ((size_t)took < length) {
        p->left = length - (size_t)took;
        if (!(p->rest = realloc(p->rest, p->left))) die("memory");
        memcpy(p->rest, from + took, p->left);
    }
    return 1;
}

static void publish(double rate, double seconds, int sessions) {
    static char out[(EVENT + 16) * BATCH + 32];
    double wakeups = rate < WAKEUPS ? rate : WAKEUPS;
    uint64_t begun = now_ns(), end = begun + (uint64_t)(seconds * 1e9);
    long due = (long)(rate * seconds + 0.5), done = 0, dropped = 0, woken = 0;
    for (long tick = 1; done < due; tick++) {
        uint64_t at = begun + (uint64_t)((double)tick * 1e9 / wakeups);
        struct timespec until = {(time_t)(at / 1000000000u), (long)(at % 1000000000u)};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        uint64_t now = now_ns();
        long target = (long)((double)((now < end ? now : end) - begun) * rate / 1e9 + 1e-6), batch = target - done;
        if (target > due || now >= end) batch = due - done;
        if (batch <= 0) continue;
        if (batch > BATCH) batch = BATCH;
        size_t length = frames(out, sessions ? 1 : batch);
        for (int i = 0; !sessions && i < connected; i++)
            if (!give(&peers[i], out, length)) dropped += batch;
        for (long i = done; sessions && i < done + batch; i++)
            if (!give(&peers[i % connected], out, length)) dropped++;
        done += batch, woken++;
    }
    for (int i = 0; i < connected; i++) /* what is left of a frame must go out, or the count is short */
        for (int tries = 0; peers[i].left && tries < 1000; tries++) {
            struct pollfd wait = {peers[i].fd, POLLOUT, 0};
            poll(&wait, 1, 1);
            ssize_t took = write(peers[i].fd, peers[i].rest, peers[i].left);
            if (took > 0) memmove(peers[i].rest, peers[i].rest + took, peers[i].left -= (size_t)took);
        }
    printf("{\"published\": %ld, \"due\": %ld, \"wakeups\": %ld, \"dropped\": %ld}\n", done, due, woken, dropped);
    fflush(stdout);
}

static void welcome(int listener) {
    int on = 1, fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

static void request(int fd) {
    static const char head[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    char text[4096];
    if (read(fd, text, sizeof text) <= 0) {
        for (int i = 0; i < connected; i++)
            if (peers[i].fd == fd) free(peers[i].rest), peers[i--] = peers[--connected];
        close(fd);
        return;
    }
    if (connected == MOST || write(fd, head, sizeof head - 1) < 0) {
        close(fd);
        return;
    }
    peers[connected++] = (struct peer){fd, NULL, 0};
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "--cpu")) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(atoi(argv[2]), &set);
        if (sched_setaffinity(0, sizeof set, &set)) die("sched_setaffinity");
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)) die("listen");
    getsockname(listener, (struct sockaddr *)&address, &size);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, ready[256];
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    event.data.fd = 0;
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
    printf("{\"ready\": true, \"port\": %d, \"pids\": [%d], \"about\": \"C, one write() per connection and wake-up\"}\n",
           ntohs(address.sin_port), getpid());
    fflush(stdout);
    for (;;) {
        int n = epoll_wait(epoll, ready, 256, -1);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) welcome(listener);
            else if (fd) request(fd);
            else {
                char line[256];
                double rate, seconds;
                int sessions = 0;
                ssize_t got = read(0, line, sizeof line - 1);
                if (got <= 0) return 0;
                line[got] = 0;
                if (sscanf(line, "publish %lf %lf %d", &rate, &seconds, &sessions) >= 2) publish(rate, seconds, sessions);
            }
        }
    }
}
