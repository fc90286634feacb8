"""What the peers' timings on a GPU share: the rows of their CSVs, the card's state, the clock.

    gpu_common.py --columns    prints the header of the kernels' table, then that of the steps' table

The columns are the fields of KernelRow and StepRow in src/bench/results.rs, in their order; an empty cell is None."""
import ctypes
import datetime
import os
import statistics
import sys
import time

KERNEL_COLUMNS = ("date,tool,commit,card,driver,sm_mhz,memory_mhz,model,op,shape,tokens,implementation,samples,median_us,"
                  "least_us,most_us,bytes,flops,gb_per_s,tflop_per_s,copy_gb_per_s,product_tflop_per_s,floor_us,"
                  "percent_of_floor,checked,launches,registers,local_bytes,shared_bytes,occupancy").split(",")
STEP_COLUMNS = ("date,tool,commit,card,driver,sm_mhz,memory_mhz,shape,batch,length,gradient_checkpointing,memory,r,"
                "lora_dropout,optim,steps,ms,ms_min,ms_max,tokens_per_second,tflops_ceiling,bound_tokens_per_second,"
                "percent_of_bound,arena_bytes,optimizer_bytes,host_bytes,planned_bytes,driver_bytes,planned_ms,layers,loss,"
                "load_seconds").split(",")


def append(path, columns, rows):
    """Appends rows, dicts whose missing keys are empty cells, to a CSV of exactly these columns."""
    import csv
    import io
    header, text = ",".join(columns), io.StringIO()
    found = open(path, encoding="utf-8").readline().rstrip("\n") if os.path.exists(path) else ""
    if found not in ("", header):
        sys.exit(f"{path}: line 1: columns {found}, expected {header}")
    table = csv.writer(text, lineterminator="\n")
    if not found:
        table.writerow(columns)
    for row in rows:
        unknown = row.keys() - set(columns)
        assert not unknown, unknown
        table.writerow([cell(row.get(column)) for column in columns])
    with open(path, "a", encoding="utf-8", newline="") as f:
        f.write(text.getvalue())  # one write: a row is there whole or not at all


def cell(value):
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) and abs(value) < 1e6 else value


class Card:
    """The device in use. `environment` reads the clocks of this moment: ask right behind the last sample."""

    def __init__(self, device):
        import torch
        self.cuda, self.nvml, self.handle = device == "cuda", None, ctypes.c_void_p()
        self.name = torch.cuda.get_device_name() if self.cuda else "CPU"
        if not self.cuda:
            return
        try:
            self.nvml = ctypes.CDLL("libnvidia-ml.so.1")
            self.nvml.nvmlInit_v2()
        except OSError:
            return
        # By the card's own name, since CUDA_VISIBLE_DEVICES renumbers.
        uuid = str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))
        by_uuid = self.nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}".encode(), ctypes.byref(self.handle))
        if by_uuid and self.nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.handle)):
            self.nvml = None

    def driver(self):
        text = ctypes.create_string_buffer(96)
        if not self.nvml or self.nvml.nvmlSystemGetDriverVersion(text, len(text)):
            return ""
        return text.value.decode()

    def mhz(self, kind):
        value = ctypes.c_uint()
        if not self.nvml or self.nvml.nvmlDeviceGetClockInfo(self.handle, kind, ctypes.byref(value)):
            return None
        return value.value

    def environment(self):
        sm, memory = self.mhz(1), self.mhz(2)
        return {"date": datetime.date.today().isoformat(), "commit": os.environ.get("HALFBYTE_COMMIT", ""),
                "card": self.name, "driver": self.driver(), "sm_mhz": sm, "memory_mhz": memory}


class Clock:
    """Times what a GPU spends on an op, launches of the host left out.

    Before each sample a buffer larger than any L2 is read, which leaves nothing of the op's there and nothing to write
    back. The op is replayed as a CUDA graph between two events, so that nothing lies between its kernels. One that cannot
    be recorded is launched as it is, behind a spin of the GPU for as long as the host needs to enqueue it: then no kernel
    waits for its launch, but the gaps between kernels count."""

    FLUSH_BYTES = 256 << 20

    def __init__(self, device):
        import torch
        self.torch, self.cuda = torch, device == "cuda"
        if self.cuda:
            self.flush = torch.zeros(self.FLUSH_BYTES // 4, device="cuda")
            self.sum = torch.zeros((), device="cuda")
            properties = torch.cuda.get_device_properties(0)
            self.cycles_per_s = (getattr(properties, "clock_rate", 0) or 1_980_000) * 1e3

    def seconds(self, op, samples, graph=False, before=None):
        """Of each sample, sorted. `graph`: as a CUDA graph if that can be. `before`: run ahead of the op and not timed; the
        op takes its result. Without a graph it runs once, and the op many times on that."""
        recorded = self.record(op, before) if graph and self.cuda else None
        if recorded:
            return sorted([self.replay(*recorded) for _ in range(samples + 2)][2:])
        ready = before() if before else None
        run = (lambda: op(ready)) if before else op
        if not self.cuda:
            return sorted(self.host_seconds(run) for _ in range(samples))
        cuda = self.torch.cuda
        for _ in range(3):
            run()
        cuda.synchronize()
        enqueue = max(self.host_seconds(run) for _ in range(2))
        cuda.synchronize()
        spin = int(min(2 * enqueue + 50e-6, 20e-3) * self.cycles_per_s)
        ahead, behind = [], []
        while len(ahead) < samples and len(ahead) + len(behind) < 3 * samples:
            events = [cuda.Event(enable_timing=True) for _ in range(2)]
            self.torch.sum(self.flush, dim=0, out=self.sum)
            cuda._sleep(spin)
            events[0].record()
            run()
            events[1].record()
            # Where the GPU has begun before all was enqueued, it may have waited for the host.
            (behind if events[0].query() else ahead).append(events)
        cuda.synchronize()
        # An op that waits for the GPU itself never gets ahead: its waits are part of it.
        best = (ahead + behind)[:samples]
        return sorted(start.elapsed_time(end) / 1e3 for start, end in best)

    def record(self, op, before):
        """A graph of the op between two events; None if it cannot be recorded. The cache is flushed behind `before`.

        It is tried out in the stream that records: autograd ties what it makes to the stream of its first use."""
        cuda, graph, stream = self.torch.cuda, self.torch.cuda.CUDAGraph(), self.torch.cuda.Stream()
        run = (lambda: op(before())) if before else op
        try:
            stream.wait_stream(cuda.current_stream())
            with cuda.stream(stream):
                for _ in range(3):
                    run()
            cuda.synchronize()
            start, end = (cuda.Event(enable_timing=True, external=True) for _ in range(2))
            with cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                ready = before() if before else None
                self.torch.sum(self.flush, dim=0, out=self.sum)
                start.record()
                op(ready) if before else op()
                end.record()
            return graph, start, end
        except (RuntimeError, TypeError) as e:
            print(f"not recorded: {' '.join(str(e).split())[:120]}", flush=True)
            return None

    def replay(self, graph, start, end):
        graph.replay()
        self.torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    @staticmethod
    def host_seconds(op):
        start = time.perf_counter()
        op()
        return time.perf_counter() - start


def median(values):
    return statistics.median(values)


def version(package):
    from importlib.metadata import version as installed
    return f"{package} {installed(package)}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--columns"]:
        print(__doc__, file=sys.stdout if sys.argv[1:] in (["-h"], ["--help"]) else sys.stderr)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    print(",".join(KERNEL_COLUMNS))
    print(",".join(STEP_COLUMNS))
