/* A load client for SSE endpoints whose lines end in LF: opens N streams, reads everything at once, counts events,
 * measures latency, looks for gaps.
 *
 *   load --port P [--host H] [--path /event] [--connections N] [--seconds S] [--cpu C] [--sample K] [--ids MODE]
 *        [--nap US] [--stall 1]
 *
 * An event is a block whose data holds "t":NANOSECONDS (CLOCK_MONOTONIC of its publishing); latency is from there to
 * its receipt. %d in the path becomes the number of the connection. Every K-th connection is parsed, the others are
 * only counted (blocks ending in an empty line), so that the client keeps up with millions of events a second.
 * MODE: none, ordered (EPOCH:SEQ only grows), contiguous (no number is left out).
 *
 * It sleeps for US microseconds between two looks at the sockets (200): a reader on the same machine that waits for each
 * single write lets the writer pay for waking it up, which no reader at the other end of a network does.
 *
 * With --stall it reads nothing behind the head of a response, and offers little room.
 *
 * Says one JSON line once all are connected. Commands on stdin, a line each: mark (count from here), count, stop.
 * Ends with one JSON line on stop, SIGTERM, SIGINT, or after S seconds. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { READ = 256 * 1024, REST = 2 * 1024 * 1024, IN_FLIGHT = 128, SUB = 32, BUCKETS = 64 * SUB };
enum phase { HEAD, SIZE, DATA, AFTER, PLAIN };
enum { NONE, ORDERED, CONTIGUOUS };

struct connection {
    int fd, parsed, sent;
    enum phase phase;
    int skip_size; /* inside a chunk extension */
    char last;     /* last byte seen, for an empty line across two reads */
    uint64_t left; /* bytes left of the chunk; while SIZE, the size so far */
    int64_t seq;   /* newest sequence number; -1 before the first */
    char *rest;    /* an incomplete head or block */
    size_t rest_len;
};

static struct connection *all;
static long nap = 200, stall = 0, count = 1, opened, answered, failed, closed, sample = 1;
static int ids = NONE, epoll, in_flight;
static const char *host = "127.0.0.1", *path = "/event";
static struct sockaddr_in address;
static uint64_t events, blocks, parsed_events, reads, bytes, missing, repeated, told, histogram[BUCKETS], slowest;
static char raw[READ + 1], body[REST + READ + 1];

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* 32 steps for each power of two: percentiles are right within 3 %. */
static int bucket(uint64_t v) {
    if (v < SUB) return (int)v;
    int shift = 63 - __builtin_clzll(v) - 5;
    return (shift + 1) * SUB + (int)((v >> shift) - SUB);
}

static double bucket_ms(int b) {
    double low = b < SUB ? b : (double)((uint64_t)(SUB + b % SUB) << (b / SUB - 1));
    return low * (b < SUB ? 1 : 1 + 0.5 / (SUB + b % SUB)) / 1e6;
}

static double percentile(double p) {
    uint64_t rank = (uint64_t)(p * (double)parsed_events), seen = 0;
    double most = (double)slowest / 1e6;
    for (int b = 0; b < BUCKETS; b++)
        if ((seen += histogram[b]) > rank) return bucket_ms(b) < most ? bucket_ms(b) : most;
    return most;
}

static void block(struct connection *c, const char *at, const char *end, uint64_t now) {
    int64_t seq = -1;
    const char *data = NULL, *data_end = NULL;
    blocks++;
    while (at < end) {
        const char *line_end = memchr(at, '\n', (size_t)(end - at));
        if (!line_end) line_end = end;
        if (line_end - at > 4 && !memcmp(at, "id: ", 4)) {
            const char *colon = memrchr(at, ':', (size_t)(line_end - at));
            if (colon > at + 2) seq = strtoll(colon + 1, NULL, 10);
        } else if (line_end - at > 5 && !memcmp(at, "data:", 5)) {
            data = at + 5, data_end = line_end;
        }
        at = line_end + 1;
    }
    if (!data) return;
    size_t length = (size_t)(data_end - data);
    const char *stamp = memmem(data, length, "\"t\":", 4);
    if (!stamp) {
        if (memmem(data, length, "\"server.stream.", 15)) told++;
        if (seq >= 0) c->seq = seq;
        return;
    }
    events++, parsed_events++;
    uint64_t sent = strtoull(stamp + 4, NULL, 10), took = now > sent ? now - sent : 0;
    histogram[bucket(took)]++;
    if (took > slowest) slowest = took;
    if (ids != NONE && seq >= 0) {
        if (c->seq >= 0 && seq <= c->seq) repeated++;
        else if (ids == CONTIGUOUS && c->seq >= 0) missing += (uint64_t)(seq - c->seq - 1);
        c->seq = seq;
    }
}

static void keep(struct connection *c, const char *from, size_t length) {
    if (length > REST) errno = EMSGSIZE, die("one block");
    if (length && !(c->rest = realloc(c->rest, length))) die("memory");
    if (length) memmove(c->rest, from, length);
    c->rest_len = length;
    if (!length) free(c->rest), c->rest = NULL;
}

/* Give the decoded body, behind what was left of it, to block(). */
static void feed(struct connection *c, char *end, uint64_t now) {
    char *at = body;
    while (at < end) {
        char *stop = at;
        while ((stop = memchr(stop, '\n', (size_t)(end - stop))) && stop + 1 < end && stop[1] != '\n') stop++;
        if (!stop || stop + 1 >= end) break;
        block(c, at, stop, now);
        at = stop + 2;
    }
    keep(c, at, (size_t)(end - at));
}

static void parse(struct connection *c, const char *at, const char *end, uint64_t now) {
    char *to = body;
    memcpy(to, c->rest, c->rest_len);
    to += c->rest_len;
    while (at < end) {
        size_t take;
        switch (c->phase) {
        case SIZE:
            for (; at < end && *at != '\n'; at++) {
                int d = *at >= '0' && *at <= '9' ? *at - '0' : (*at | 32) >= 'a' && (*at | 32) <= 'f' ? (*at | 32) - 'a' + 10 : -1;
                if (d < 0) c->skip_size = 1;
                else if (!c->skip_size) c->left = c->left * 16 + (uint64_t)d;
            }
            if (at < end) at++, c->phase = DATA, c->skip_size = 0;
            break;
        case AFTER: /* the CR LF behind a chunk */
            if (*at++ == '\n') c->phase = SIZE, c->left = 0;
            break;
        default:
            take = (size_t)(end - at);
            if (c->phase == DATA && take > c->left) take = c->left;
            memcpy(to, at, take);
            to += take, at += take;
            if (c->phase == DATA && !(c->left -= take)) c->phase = AFTER;
        }
    }
    feed(c, to, now);
}

/* Empty lines in the raw bytes: chunk sizes end in CR LF and add none. */
static void count_only(struct connection *c, const char *at, size_t length) {
    uint64_t found = c->last == '\n' && at[0] == '\n';
    for (size_t i = 0; i + 1 < length; i++) found += (at[i] == '\n') & (at[i + 1] == '\n');
    c->last = at[length - 1];
    blocks += found, events += found;
}

static void finish(struct connection *c) {
    if (c->phase == HEAD) failed++;
    close(c->fd); /* takes it out of the epoll set */
    c->fd = -1;
    closed++;
}

static void head(struct connection *c, size_t got, uint64_t now) {
    memcpy(body, c->rest, c->rest_len);
    memcpy(body + c->rest_len, raw, got);
    size_t length = c->rest_len + got;
    char *end = memmem(body, length, "\r\n\r\n", 4);
    if (!end) return keep(c, body, length);
    in_flight--, answered++;
    if (length < 12 || memcmp(body + 9, "200", 3)) {
        if (!failed) fprintf(stderr, "load: the server says %.*s\n", (int)((char *)memchr(body, '\r', length) - body), body);
        finish(c);
        return;
    }
    *end = 0;
    c->phase = strcasestr(body, "\r\ntransfer-encoding: chunked") ? SIZE : PLAIN;
    size_t rest = length - (size_t)(end + 4 - body);
    memcpy(raw, end + 4, rest);
    keep(c, body, 0);
    if (rest && c->parsed) parse(c, raw, raw + rest, now);
    else if (rest) count_only(c, raw, rest);
}

/* Edge-triggered, so that an event costs one look: read until there is less than was asked for. */
static void readable(struct connection *c) {
    ssize_t got = READ;
    if (stall && c->phase != HEAD) return;
    while (got == READ && c->fd >= 0) {
        got = recv(c->fd, raw, READ, 0);
        if (got < 0 && errno == EINTR) got = READ;
        else if (got < 0 && errno == EAGAIN) return;
        else if (got <= 0) {
            if (c->phase == HEAD) in_flight--, answered++;
            finish(c);
        } else {
            uint64_t now = now_ns();
            bytes += (uint64_t)got;
            if (c->phase == HEAD) head(c, (size_t)got, now);
            else if (c->parsed) reads++, parse(c, raw, raw + got, now);
            else count_only(c, raw, (size_t)got);
            /* The end of a body: servers keep the connection for seconds. No event ends in a nought. */
            if (c->fd >= 0 && got >= 5 && !memcmp(raw + got - 5, "0\r\n\r\n", 5)) finish(c);
        }
    }
}

static void open_one(void) {
    struct connection *c = &all[opened];
    struct linger abortive = {1, 0}; /* closing leaves no TIME_WAIT behind: rounds must not use up the ports */
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("socket");
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &abortive, sizeof abortive);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    int little = 4096;
    if (stall) setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &little, sizeof little);
    c->parsed = opened % sample == 0;
    c->seq = -1;
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) die("connect");
    struct epoll_event event = {.events = EPOLLOUT, .data.u32 = (uint32_t)opened};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event)) die("epoll_ctl");
    opened++, in_flight++;
}

static void ask(struct connection *c) {
    char where[1024], request[2048];
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) errno = error, die("connect");
    const char *hole = strstr(path, "%d");
    if (hole) snprintf(where, sizeof where, "%.*s%ld%s", (int)(hole - path), path, (long)(c - all), hole + 2);
    else snprintf(where, sizeof where, "%s", path);
    int length = snprintf(request, sizeof request,
                          "GET %s HTTP/1.1\r\nHost: %s:%d\r\nAccept: text/event-stream\r\n\r\n", where, host,
                          ntohs(address.sin_port));
    if (send(c->fd, request, (size_t)length, MSG_NOSIGNAL) != length) die("send");
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u32 = (uint32_t)(c - all)};
    epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event);
    c->sent = 1;
}

static void mark(void) {
    events = blocks = parsed_events = reads = bytes = missing = repeated = told = slowest = 0;
    memset(histogram, 0, sizeof histogram);
}

static void result(double seconds) {
    printf("{\"connections\": %ld, \"failed\": %ld, \"closed\": %ld, \"seconds\": %.3f, \"events\": %lu, \"blocks\": %lu, "
           "\"bytes\": %lu, \"parsed\": %lu, \"reads\": %lu, \"missing\": %lu, \"repeated\": %lu, \"lagged\": %lu, "
           "\"p50_ms\": %.3f, \"p99_ms\": %.3f, \"max_ms\": %.3f}\n",
           opened, failed, closed, seconds, events, blocks, bytes, parsed_events, reads, missing, repeated, told,
           parsed_events ? percentile(0.5) : 0.0, parsed_events ? percentile(0.99) : 0.0, (double)slowest / 1e6);
    fflush(stdout);
}

static void arguments(int argc, char **argv, double *seconds) {
    int port = 0;
    for (int i = 1; i + 1 < argc; i += 2) {
        const char *name = argv[i], *value = argv[i + 1];
        if (!strcmp(name, "--host")) host = value;
        else if (!strcmp(name, "--port")) port = atoi(value);
        else if (!strcmp(name, "--path")) path = value;
        else if (!strcmp(name, "--connections")) count = atol(value);
        else if (!strcmp(name, "--seconds")) *seconds = atof(value);
        else if (!strcmp(name, "--nap")) nap = atol(value);
        else if (!strcmp(name, "--stall")) stall = atol(value);
        else if (!strcmp(name, "--sample")) sample = atol(value);
        else if (!strcmp(name, "--ids")) ids = value[0] == 'c' ? CONTIGUOUS : value[0] == 'o' ? ORDERED : NONE;
        else if (!strcmp(name, "--cpu")) {
            cpu_set_t set;
            CPU_ZERO(&set);
            CPU_SET(atoi(value), &set);
            if (sched_setaffinity(0, sizeof set, &set)) die("sched_setaffinity");
        } else errno = EINVAL, die(name);
    }
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)port);
    if (!port || count < 1 || sample < 1 || !inet_aton(host, &address.sin_addr)) errno = EINVAL, die("arguments");
}

/* Returns 0 when it is time to end. */
static int command(void) {
    char text[256];
    ssize_t got = read(0, text, sizeof text - 1);
    if (got <= 0) return 0;
    text[got] = 0;
    if (strstr(text, "stop")) return 0;
    if (strstr(text, "mark")) mark();
    printf("{\"events\": %lu, \"blocks\": %lu, \"bytes\": %lu, \"closed\": %ld}\n", events, blocks, bytes, closed);
    fflush(stdout);
    return 1;
}

int main(int argc, char **argv) {
    double seconds = 0;
    arguments(argc, argv, &seconds);
    all = calloc((size_t)count, sizeof *all);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    prctl(PR_SET_TIMERSLACK, 1UL);
    sigset_t ends;
    sigemptyset(&ends), sigaddset(&ends, SIGTERM), sigaddset(&ends, SIGINT);
    sigprocmask(SIG_BLOCK, &ends, NULL);
    const uint32_t SIGNAL = UINT32_MAX, STDIN = UINT32_MAX - 1;
    struct epoll_event control = {.events = EPOLLIN, .data.u32 = SIGNAL}, ready[512];
    epoll_ctl(epoll, EPOLL_CTL_ADD, signalfd(-1, &ends, SFD_CLOEXEC), &control);
    control.data.u32 = STDIN;
    if (seconds == 0) epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &control);
    uint64_t begun = now_ns(), until = 0;
    int running = 1, said = 0;
    while (running) {
        while (opened < count && in_flight < IN_FLIGHT) open_one();
        if (!said && answered == count) {
            said = 1;
            printf("{\"connected\": %ld, \"failed\": %ld}\n", count - failed, failed);
            fflush(stdout);
            if (seconds > 0) begun = now_ns(), until = begun + (uint64_t)(seconds * 1e9);
        }
        int n = epoll_wait(epoll, ready, 512, until ? 20 : -1);
        for (int i = 0; i < n; i++) {
            uint32_t which = ready[i].data.u32;
            if (which == SIGNAL) running = 0;
            else if (which == STDIN) running = command() && running;
            else if (!all[which].sent) ask(&all[which]);
            else readable(&all[which]);
        }
        if (until && now_ns() >= until) running = 0;
        if (said && nap) usleep((useconds_t)nap);
    }
    result((double)(now_ns() - begun) / 1e9);
    return failed != 0;
}
