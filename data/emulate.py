"""Run the kernel where its machine is not: CUDA on an interpreter that finds races, NEON by qemu.

    python data/emulate.py                     a few steps of a small model on an emulated sm_80, against numpy
    python data/emulate.py --machine sm_75     without tensor cores; or armv8-a, or armv8.2-a+dotprod

For whoever changes the kernel and has no such machine. The interpreter needs Linux on x86-64 and g++ (12 or later), ARM
aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu and qemu-user).
"""

import argparse
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nano_eggroll as E

MACHINES = "sm_80", "sm_75", "armv8-a", "armv8.2-a+dotprod"
_temporary = tempfile.TemporaryDirectory()
FOLDER = Path(_temporary.name)  # where kernels are built

SIMT = r"""
// Runs CUDA kernels on the CPU. A thread is a fiber, which runs until it waits for others, at __syncthreads or at a
// collective of its warp. All blocks live at once and take turns, so what they share by mistake goes wrong.
// With __CUDA_ARCH__, this is what a kernel sees of the GPU; g++ -fsanitize makes it call a hook before every access to
// memory. Without, it is the machine, which runs the fibers and defines the hooks.
#include <math.h>
#include <string.h>
struct Index { unsigned x; };
extern Index threadIdx, blockIdx, blockDim, gridDim;
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += (signed char)(a >> i) * (signed char)(b >> i);
  return c;
}
#ifdef __CUDA_ARCH__
#define __CUDACC__
#define __device__
#define __global__
#define __shared__                                // the driver makes the array a pointer to the block's memory
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __noinline__ __attribute__((noinline))
#if __CUDA_ARCH__ >= 800
#define MMA simt_mma
#endif
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) int2 { int x, y; };
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
int atomicAdd(int *p, int x);
void __syncthreads();
void __syncwarp(unsigned mask = ~0u);
void simt_mma(int *c, int a0, int a1, int a2, int a3, int b0, int b1);
int __all_sync(unsigned mask, int x);

#else
#include <deque>
#include <set>
#include <setjmp.h>
#include <string>
#include <ucontext.h>
#include <vector>
using std::string, std::to_string, std::vector;

enum Kind { READ, WRITE, ATOMIC };
struct Record {                                   // the last access of one kind to a grain of memory
  unsigned time, site;                            // time 0: there was none; site: where in the code
  unsigned short thread : 13;                     // counted over all blocks
  unsigned short lanes : 1, warps : 1, blocks : 1;  // so did another thread of its warp since that last met, another
};                                                // warp of its block since that last met, another block
struct Grain { Record last[3]; };                 // by kind
struct Region { string name; char *start; size_t size; bool writable; int block, grain; vector<Grain> grains; };
typedef int Given[32][6];                         // what the lanes of a warp show each other
struct Group {                                    // a warp or a block, whose threads wait for each other
  vector<struct Fiber *> threads;
  const char *where;
  unsigned arrived, rounds, met;                  // met: the time when all last were there
  Given given[2];                                 // in turn, as a lane may give again before others have read
};
struct Fiber { unsigned id, block, site; const char *where; Group *warp, *all; char *stack; jmp_buf context; };

Index threadIdx, blockIdx, blockDim, gridDim;
char *simt_shared;
__attribute__((visibility("hidden"))) extern char __ehdr_start[], _end[];  // from the linker: this library
static const size_t STACK = 1 << 17;
static void (*kernel)(void **), **arguments;
static vector<Region> regions;                    // first the shared memory of each block
static vector<Fiber> fibers;
static std::deque<Fiber *> ready;
static Fiber *self;
static unsigned now;                              // counts the meetings, as nothing else orders accesses
static ucontext_t starting;
static jmp_buf host;
static string findings;
static std::set<unsigned> found;                  // their sites

#define SITE ((unsigned)((char *)__builtin_return_address(0) - __ehdr_start - 1))
static string who(unsigned id, unsigned site) {   // the driver turns @site into a line of the source
  return "block " + to_string(id / blockDim.x) + " thread " + to_string(id % blockDim.x) + " @" + to_string(site);
}
static void report(const string &text, unsigned site, bool fatal) {
  if (found.insert(site).second) findings += text + "\n";
  if (fatal || found.size() == 3) _longjmp(host, 1);
}

// ---- accesses to memory

static Region &nearest(const char *p) {           // the region that holds p, if any does
  Region *best = nullptr;
  size_t least = -1;
  for (Region &r : regions) if (least && (r.block < 0 || r.block == (int)self->block)) {
    size_t off = p < r.start ? r.start - p : p < r.start + r.size ? 0 : p - r.start - r.size + 1;
    if (off < least) least = off, best = &r;
  }
  return *best;
}

static void report(const char *what, char *p, size_t n, Kind kind, unsigned site, bool fatal, const string &more = "") {
  static const char *const verbs[] = {" reads ", " writes ", " atomically updates "};
  const Region &r = nearest(p);
  report(what + who(self->id, site) + verbs[kind] + to_string(n) + " bytes at byte " + to_string(p - r.start) +
         " of " + r.name + " (" + to_string(r.size) + " bytes)" + more, site, fatal);
}

static void report_race(char *p, size_t n, Kind kind, unsigned site, const Record &r) {
  string others = r.lanes || r.warps || r.blocks ? ", as others" : "";
  report("race: ", p, n, kind, site, false, ", not ordered with " + who(r.thread, r.site) + others);
}

// Whether the access, or one that its flags stand for, was another thread's with nothing since then to order it.
static bool unordered(const Record &r) {
  if (!r.time) return false;
  const Fiber &other = fibers[r.thread];
  if (r.blocks || other.block != self->block) return true;
  if (r.time < self->all->met) return false;
  if (r.warps || other.warp != self->warp) return true;
  return r.time >= self->warp->met && (r.lanes || &other != self);
}

static void remember(Record &r, unsigned site) {
  const Fiber &other = fibers[r.thread];
  bool any = r.time, recent = any && r.time >= self->all->met;
  r.blocks = any && (r.blocks || other.block != self->block);
  r.warps = recent && (r.warps || other.warp != self->warp);
  r.lanes = recent && r.time >= self->warp->met && (r.lanes || &other != self);
  r.time = now, r.site = site, r.thread = self->id;
}

static void access(char *p, size_t n, Kind kind, unsigned site) {
  if ((p >= self->stack && p + n <= self->stack + STACK) || (p >= __ehdr_start && p + n <= _end)) return;
  Region &region = nearest(p);
  if (p < region.start || p + n > region.start + region.size) report("out of bounds: ", p, n, kind, site, true);
  if (!region.writable) {                         // nor is there a race where nobody may write
    if (kind != READ) report("not in out: ", p, n, kind, site, false);
    return;
  }
  Record race = {};
  for (size_t i = (p - region.start) / region.grain; i <= (p + n - 1 - region.start) / region.grain; i++) {
    Record *last = region.grains[i].last;
    for (Kind k : {READ, ATOMIC, WRITE})
      if (!race.time && (k != kind || k == WRITE) && unordered(last[k])) race = last[k];
    remember(last[kind], site);
  }
  if (race.time) report_race(p, n, kind, site, race);
}

#define HOOKS(n) \
  extern "C" void __tsan_read##n(char *p) { access(p, n, READ, SITE); } \
  extern "C" void __tsan_write##n(char *p) { access(p, n, WRITE, SITE); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
extern "C" void __tsan_read_range(char *p, size_t n) { access(p, n, READ, SITE); }
extern "C" void __tsan_write_range(char *p, size_t n) { access(p, n, WRITE, SITE); }
extern "C" void __tsan_init() {}
extern "C" void __ubsan_handle_out_of_bounds(void *, long i) {
  report("index out of bounds: " + who(self->id, SITE) + " takes element " + to_string(i), SITE, true);
}
extern "C" void __ubsan_handle_type_mismatch_v1(void *, char *p) { report("misaligned: ", p, 0, READ, SITE, true); }
int atomicAdd(int *p, int x) { access((char *)p, 4, ATOMIC, SITE); return (*p += x) - x; }

// ---- threads

static void go_on() {                             // with the next thread that can
  if (ready.empty()) {
    for (Fiber &f : fibers) if (f.where) for (Fiber &g : fibers) if (g.all == f.all && g.where != f.where)
      report("deadlock: " + who(f.id, f.site) + " waits at " + f.where + ", " +
             (g.where ? who(g.id, g.site) + " at " + g.where : who(g.id, 0) + " has ended"), f.site, true);
    _longjmp(host, 1);
  }
  self = ready.front();
  ready.pop_front();
  threadIdx.x = self->id % blockDim.x;
  blockIdx.x = self->block;
  simt_shared = regions[self->block].start;
  _longjmp(self->context, 1);
}

static void live() {                              // what a fiber does
  if (!_setjmp(self->context)) setcontext(&starting);
  kernel(arguments);
  self->where = nullptr;
  go_on();
}

// Returns when all of the group are here. If that `orders` accesses, as only barriers do, those before it come before
// those after it.
static void meet(Group &g, const char *where, bool orders, unsigned site) {
  if (g.arrived && strcmp(g.where, where))
    report("divergence: " + who(self->id, site) + " is at " + where + ", others at " + g.where, site, true);
  self->where = g.where = where, self->site = site;
  if (++g.arrived < g.threads.size()) {
    if (!_setjmp(self->context)) go_on();
    return;
  }
  g.arrived = 0, g.rounds++;
  if (orders) g.met = ++now;
  for (Fiber *f : g.threads) if (f != self) ready.push_back(f);
}

static Given &exchange(unsigned mask, const int *mine, int n, const char *where, bool orders, unsigned site) {
  if (mask != ~0u) report("not emulated: " + who(self->id, site) + " masks lanes of " + where, site, true);
  Given &given = self->warp->given[self->warp->rounds % 2];
  memcpy(given[threadIdx.x % 32], mine, n * sizeof(int));
  meet(*self->warp, where, orders, site);
  return given;
}

void __syncthreads() { meet(*self->all, "__syncthreads", true, SITE); }
void __syncwarp(unsigned mask) { exchange(mask, nullptr, 0, "__syncwarp", true, SITE); }
int __all_sync(unsigned mask, int x) {
  Given &given = exchange(mask, &x, 1, "a vote", false, SITE);
  for (int lane = 0; lane < 32; lane++) if (!given[lane][0]) return 0;
  return 1;
}

// mma.m16n8k32: lane 4g + j has in a0 bytes 4j to 4j+3 of row g of A (a1, a3: of row g+8; a2, a3: bytes +16),
// in b0, b1 the same bytes of column g of B, and in c columns 2j, 2j+1 of row g, then of row g+8.
void simt_mma(int *c, int a0, int a1, int a2, int a3, int b0, int b1) {
  int mine[6] = {a0, a1, a2, a3, b0, b1}, g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
  Given &given = exchange(~0u, mine, 6, "an MMA", false, SITE);
  for (int i = 0; i < 4; i++) for (int k = 0; k < 4; k++) for (int half = 0; half < 2; half++)
    c[i] = __dp4a(given[4 * g + k][i / 2 + 2 * half], given[4 * (2 * j + i % 2) + k][4 + half], c[i]);
}

// ---- launches

// Tells what a kernel may access: every block if block is -1, or as the shared memory of one, these come first.
// grain: as many bytes are one thing, of which no two threads own a part.
extern "C" void simt_region(const char *name, char *start, size_t size, bool writable, int block, int grain) {
  regions.push_back({name, start, size, writable, block, grain, vector<Grain>(size / grain + 1)});
}

// Runs a kernel on the regions given since the last launch and returns what is wrong with it.
extern "C" const char *simt_launch(void (*entry)(void **), void **values, unsigned blocks, unsigned threads) {
  kernel = entry, arguments = values;
  gridDim.x = blocks, blockDim.x = threads, now = 1;
  findings.clear(), found.clear(), ready.clear();
  vector<Group> all(blocks), warps(blocks * threads);  // more than enough
  char *stacks = (char *)malloc(blocks * threads * STACK);
  fibers.resize(blocks * threads);
  for (Fiber &f : fibers) {
    f.id = &f - &fibers[0], f.block = f.id / threads, f.stack = stacks + f.id * STACK;
    f.all = &all[f.block], f.warp = &warps[f.block * threads + f.id % threads / 32];
    for (Group *g : {f.all, f.warp}) g->threads.push_back(&f);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = f.stack, context.uc_stack.ss_size = STACK;
    makecontext(&context, live, 0);
    self = &f;
    swapcontext(&starting, &context);
    ready.push_back(&f);
  }
  if (!_setjmp(host)) go_on();
  regions.clear();
  free(stacks);
  return findings.c_str();
}
#endif
"""


class Simt:
    """A launcher, see E.KernelBackend, on an emulated GPU; raises AssertionError where a kernel does something wrong.

    arch: its compute capability times 100; blocks: how many run; check: look for races and for accesses out of bounds;
    shared: bytes of shared memory that a block may have.
    """

    lock = threading.Lock()

    def __init__(self, source, arch=800, blocks=2, check=True, shared=232448):
        self.blocks = blocks
        signature = r"(?:KERNEL|__global__\s+void(?:\s+__launch_bounds__\(\w+\))?)\s+(\w+)\s*\(([^)]*)\)\s*\{"
        self.kernels = {name: re.findall(r"\s*(.+?)(\w+)\s*(?:,|$)", parameters) for name, parameters in
                        re.findall(signature, source)}
        self.code = re.sub(r"(extern\s+__shared__[^;]*?)(\w+)\s*\[\s*\]", r'\1*\2 __asm__("simt_shared")', source)
        for name, parameters in self.kernels.items():
            values = ", ".join(f"*({kind} *)values_[{i}]" for i, (kind, _) in enumerate(parameters))
            self.code += f'\nextern "C" __attribute__((no_sanitize("thread"))) void simt_{name}(void **values_) {{'
            self.code += f" {name}({values}); }}\n"
        stem = FOLDER / hashlib.sha256(f"{self.code}{arch}{check}{shared}".encode()).hexdigest()[:16]
        header, machine, kernel = FOLDER / "simt.cc", FOLDER / "machine.o", f"{stem}.o"
        gcc = ["g++", "-std=c++17", "-w", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]  # that forbids _longjmp
        hooks = ["-fsanitize=thread,bounds,alignment", "--param", "tsan-instrument-func-entry-exit=0"] if check else []
        self.path = f"{stem}.so"
        with self.lock:
            if not machine.exists():
                header.write_text(SIMT)
                subprocess.run([*gcc, "-O2", "-c", header, "-o", machine], check=True)
        if not os.path.exists(self.path):
            Path(f"{stem}.cu").write_text(self.code)
            subprocess.run([*gcc, "-O1", *hooks, "-gdwarf-4",  # addr2line gets the files of DWARF 5 wrong
                            f"-D__CUDA_ARCH__={arch}", f"-DSHARED={shared}", "-include", header, "-x", "c++", "-c",
                            f"{stem}.cu", "-o", kernel], check=True)
            subprocess.run(["g++", "-shared", "-Wl,-z,defs", machine, kernel, "-lm", "-o", self.path], check=True)
        self.gpu = ctypes.CDLL(self.path)
        self.gpu.simt_launch.restype = ctypes.c_char_p
        needs = np.zeros(len(E.Needs._fields), np.int32)
        if "needs" in self.kernels:
            self.run("needs", (needs,), [needs], 1, 1, 0)
        self.needs, self.shared = E.Needs(*needs.tolist()), shared

    def place(self, site):
        """Where in the source the machine found something, with the lines that it is inlined from."""
        found = subprocess.run(["addr2line", "-ie", self.path, hex(int(site[1]))], capture_output=True, text=True,
                               check=True)
        lines = [int(n) for n in re.findall(r"\.cu:(\d+)", found.stdout)]
        text = self.code.splitlines()
        return f" (line {' from '.join(map(str, lines))}: {text[lines[0] - 1].strip()})" if lines else ""

    def run(self, name, args, out, blocks, threads, shared):
        """Call a kernel on copies of its arrays, well apart from each other; those in `out` are copied back."""
        values, back, kept = [], [], []

        def put(what, array, writable, block):
            memory = np.full(2048 + array.nbytes, 0xCD, np.uint8)
            at = 1024 - memory.ctypes.data % 256
            copy = memory[at:at + array.nbytes]
            copy[:] = array.reshape(-1).view(np.uint8)
            kept.append(memory)
            self.gpu.simt_region(what.encode(), ctypes.c_void_p(copy.ctypes.data), ctypes.c_size_t(copy.size), writable,
                                 block, 4 if name == "play" and array.dtype == np.uint8 else array.itemsize)
            return copy

        for block in range(blocks):
            put("shared memory", np.full(shared, 0xCD, np.uint8), True, block)
        for (_, parameter), a in zip(self.kernels[name], args, strict=True):
            if isinstance(a, np.ndarray):
                writable = any(a is o for o in out)
                copy = put(parameter, a, writable, -1)
                back += [(a, copy)] * writable
                a = np.uint64(copy.ctypes.data)
            values.append(np.array(0 if a is None else a))
        pointers = np.array([v.ctypes.data for v in values], np.uint64)
        findings = self.gpu.simt_launch(getattr(self.gpu, f"simt_{name}"), ctypes.c_void_p(pointers.ctypes.data),
                                        blocks, threads).decode()
        if findings:
            raise AssertionError(f"{name}\n" + re.sub(r" @(\d+)", self.place, findings))
        for a, copy in back:
            a[...] = copy.view(a.dtype).reshape(a.shape)

    def zeros(self, size):
        """An array for the kernel alone."""
        return np.zeros(size, np.int8)

    def __call__(self, name, which, args, out):
        """Run batches or units of a kernel."""
        needs = self.needs
        fast = needs.swaps + {"play": needs.fast, "update": needs.update}.get(name, 0)
        scratch = np.full(self.blocks * max(needs.batch, needs.update), 0xCD, np.uint8)
        self.run(name, (*args, np.int32(which.start), np.int32(which.stop), scratch), [*out, scratch], self.blocks,
                 needs.threads, fast if fast <= self.shared else needs.swaps)


ARM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
struct { char *data; long size; } f[32];          // argument i is in the file "i", an array that is empty is NULL
FILE *file(int i, const char *how) { char name[9]; sprintf(name, "%d", i); return fopen(name, how); }
void get(int i) {
  FILE *s = file(i, "rb");
  fseek(s, 0, SEEK_END);
  f[i].size = ftell(s);
  f[i].data = f[i].size ? aligned_alloc(64, (f[i].size + 63) / 64 * 64) : 0;
  rewind(s);
  if (fread(f[i].data, 1, f[i].size, s) != f[i].size) exit(1);
  fclose(s);
}
void put(int i) {
  FILE *s = file(i, "wb");
  if (fwrite(f[i].data, 1, f[i].size, s) != f[i].size || fclose(s)) exit(1);
}
int main(int argc, char **argv) {
  int n = 0;
"""


class Arm:
    """A launcher on an emulated ARM: a program that calls kernels with arguments from files, and writes arrays back."""

    def __init__(self, source, flags):
        self.kernels = {name: [kind for kind, _ in re.findall(r"\s*(.+?)(\w+)\s*(?:,|$)", parameters)]
                        for name, parameters in re.findall(r"KERNEL (\w+)\(([^)]*)\)", source)}
        code = source + ARM
        for name, kinds in self.kernels.items():
            values = ", ".join(f"f[{i}].data" if "*" in kind else f"*({kind} *)f[{i}].data"
                               for i, kind in enumerate(kinds))
            code += f'  if (!strcmp(argv[1], "{name}")) {{ for (; n < {len(kinds)}; n++) get(n); {name}({values}); }}\n'
        code += "  for (int i = 0; i < n; i++) put(i);\n}"
        self.folder = FOLDER / hashlib.sha256(f"{code}{flags}".encode()).hexdigest()[:16]
        self.folder.mkdir(exist_ok=True)
        subprocess.run(["aarch64-linux-gnu-gcc", "-x", "c", *flags.split(), "-O2", "-static", "-ffp-contract=off", "-w",
                        "-fno-strict-aliasing", "-", "-lm", "-o", self.folder / "kernel"], input=code, text=True,
                       check=True)
        needs = np.zeros(len(E.Needs._fields), np.int32)
        self.run("needs", (needs,), [needs])
        self.needs = E.Needs(*needs.tolist())

    def run(self, name, args, out):
        """Call a kernel."""
        for i, a in enumerate(args):
            (self.folder / str(i)).write_bytes(b"" if a is None else np.asarray(a).tobytes())
        subprocess.run(["qemu-aarch64", "./kernel", name], cwd=self.folder, check=True)
        for i, a in enumerate(args):
            if a is not None and any(a is o for o in out):
                a[...] = np.frombuffer((self.folder / str(i)).read_bytes(), a.dtype).reshape(a.shape)

    def zeros(self, size):
        """An array for the kernel alone."""
        return np.zeros(size, np.int8)

    def __call__(self, name, which, args, out):
        """Run batches or units of a kernel."""
        scratch = np.zeros(max(self.needs.batch, self.needs.update), np.uint8)
        self.run(name, (*args, np.int32(which.start), np.int32(which.stop), scratch), out)


def main() -> None:
    """Train a small model by numpy and on the machine, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # One line, without the usage.
    parser.add_argument("--machine", choices=MACHINES, default=MACHINES[0])
    machine = parser.parse_args().machine
    if not shutil.which("g++" if "sm" in machine else "qemu-aarch64"):
        parser.error(f"{machine} cannot be emulated: install g++, or gcc-aarch64-linux-gnu and qemu-user")

    def build(source):
        return Simt(source, 10 * int(machine[3:])) if "sm" in machine else Arm(source, f"-march={machine}")

    cfg, es = E.Config(dim=16, layers=2, head_size=8, vocab=50), E.ES(population=40, tokens=5, steps=3, rank=2)
    text, hashes = (E.mix(np.arange(1000)) % cfg.vocab).astype(np.uint16), []
    try:
        for backend in E.NumpyBackend(cfg, es.rank), E.KernelBackend(cfg, es.rank, machine, build):
            model = E.new_model(cfg, 0)
            E.evolve(model, E.predict(text, es.tokens), es, backend)
            hashes.append(model.sha256())
            print(f"{backend.name:20} weights sha256 {hashes[-1]}")
        if hashes[0] != hashes[1]:
            raise AssertionError("it does not compute what numpy does: look at what was changed in KERNEL")
    except AssertionError as e:
        parser.exit(1, f"{machine}: {e}\n")


if __name__ == "__main__":
    main()
