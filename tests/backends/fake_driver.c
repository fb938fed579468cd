/* A CUDA driver whose GPU is the host: memory is malloc, copies are memcpy, streams do at once what they are given.
   It lets the real bindings check every argument. Each call is a line in the file named by FAKE_DRIVER_LOG. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef unsigned long long Ptr;
static int context_depth, retained;

static int call(const char *name, unsigned long long value) {
    const char *path = getenv("FAKE_DRIVER_LOG");
    if (path) {
        FILE *log = fopen(path, "a");
        fprintf(log, "%s %llu\n", name, value);
        fclose(log);
    }
    return 0;
}

CUresult cuInit(unsigned flags) { return call("cuInit", flags); }
CUresult cuDriverGetVersion(int *v) { *v = 13000; return 0; }
CUresult cuDeviceGetCount(int *n) { const char *s = getenv("FAKE_DRIVER_GPUS"); *n = s ? atoi(s) : 1; return 0; }
CUresult cuDeviceGet(int *d, int i) { *d = i; return 0; }
CUresult cuDeviceGetName(char *s, int n, int d) { (void)d; snprintf(s, n, "Host pretending"); return 0; }
CUresult cuDeviceGetAttribute(int *v, int a, int d) { (void)d; *v = a == 75 ? 8 : a == 76 ? 9 : 1; return 0; }
CUresult cuDeviceTotalMem_v2(size_t *n, int d) { (void)d; *n = 1 << 30; return 0; }
CUresult cuDevicePrimaryCtxRetain(void **c, int d) { (void)d; retained++; *c = (void *)0x1000; return call("retain", retained); }
CUresult cuDevicePrimaryCtxRelease_v2(int d) { (void)d; retained--; return call("release", retained); }
CUresult cuCtxPushCurrent_v2(void *c) { context_depth++; return c == (void *)0x1000 ? call("push", context_depth) : 201; }
CUresult cuCtxPopCurrent_v2(void **c) {
    if (!context_depth) return 201;
    *c = (void *)0x1000;
    return call("pop", --context_depth);
}
CUresult cuCtxGetCurrent(void **c) { *c = context_depth ? (void *)0x1000 : NULL; return 0; }
CUresult cuCtxGetDevice(int *d) { *d = 0; return context_depth ? 0 : 201; }
CUresult cuCtxGetApiVersion(void *c, unsigned *v) { (void)c; *v = 13000; return 0; }
CUresult cuCtxSynchronize(void) { return 0; }
CUresult cuMemAlloc_v2(Ptr *p, size_t n) {
    if (!context_depth) return 201;
    if (n > (1u << 30)) return 2;
    *p = (Ptr)(uintptr_t)aligned_alloc(256, (n + 255) / 256 * 256);
    return call("alloc", *p);
}
CUresult cuMemFree_v2(Ptr p) { call("free", p); free((void *)(uintptr_t)p); return 0; }
CUresult cuMemHostAlloc(void **p, size_t n, unsigned f) { (void)f; *p = aligned_alloc(256, (n + 255) / 256 * 256); return call("host_alloc", (Ptr)(uintptr_t)*p); }
CUresult cuMemFreeHost(void *p) { call("host_free", (Ptr)(uintptr_t)p); free(p); return 0; }
CUresult cuMemcpyHtoDAsync_v2(Ptr d, const void *s, size_t n, void *stream) { memcpy((void *)(uintptr_t)d, s, n); return call("upload", (Ptr)(uintptr_t)stream); }
CUresult cuMemcpyDtoHAsync_v2(void *d, Ptr s, size_t n, void *stream) { memcpy(d, (void *)(uintptr_t)s, n); return call("download", (Ptr)(uintptr_t)stream); }
CUresult cuStreamCreate(void **s, unsigned flags) { *s = malloc(1); return flags == 1 ? call("stream", (Ptr)(uintptr_t)*s) : 1; }
CUresult cuStreamDestroy_v2(void *s) { call("stream_end", (Ptr)(uintptr_t)s); free(s); return 0; }
CUresult cuStreamSynchronize(void *s) { return call("wait", (Ptr)(uintptr_t)s); }
CUresult cuEventCreate(void **e, unsigned f) { (void)f; *e = malloc(1); return call("event", 0); }
CUresult cuEventDestroy_v2(void *e) { free(e); return 0; }
CUresult cuEventRecord(void *e, void *s) { (void)e; return call("record", (Ptr)(uintptr_t)s); }
CUresult cuEventSynchronize(void *e) { (void)e; return call("event_wait", 0); }
CUresult cuEventElapsedTime(float *ms, void *a, void *b) { (void)a; (void)b; *ms = 1.5f; return 0; }
CUresult cuEventElapsedTime_v2(float *ms, void *a, void *b) { return cuEventElapsedTime(ms, a, b); }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = e == 2 ? "out of memory" : "some error"; return 0; }
CUresult cuGetErrorName(CUresult e, const char **s) { return cuGetErrorString(e, s); }

CUresult cuGetProcAddress_v2(const char *name, void **f, int version, uint64_t flags, int *status) {
    char longer[128];
    (void)version;
    (void)flags;
    snprintf(longer, sizeof longer, "%s_v2", name);
    *f = dlsym(RTLD_DEFAULT, longer);
    if (!*f) *f = dlsym(RTLD_DEFAULT, name);
    if (status) *status = *f ? 0 : 1;
    return *f ? 0 : 500;
}
CUresult cuGetProcAddress(const char *n, void **f, int v, uint64_t fl) { return cuGetProcAddress_v2(n, f, v, fl, NULL); }
