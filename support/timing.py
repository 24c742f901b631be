"""How long a call takes, how much memory, and what the device can do."""
import os
import platform
import re
import time
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from tokprune import per_variant, with_room

STEPS = 8                       # tokens decoded at a time


def now(device) -> float:
    """Return milliseconds, on a CUDA device when everything in its queue is done.

    Synchronizes only this device: touching another would create a CUDA context on it.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()


def time_in_turns(calls: dict, rounds: int, device) -> dict[str, dict]:
    """Return the milliseconds of each call, by its name: {"median", "low", "high"} of so many
    rounds, after one that warms up. The calls take turns, every other round in reverse."""
    times = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds + 1):
        for name in order:
            start = now(device)
            calls[name]()
            times[name].append(now(device) - start)
        order.reverse()
    return {name: {"median": median(ms[1:]), "low": min(ms[1:]), "high": max(ms[1:])}
            for name, ms in times.items()}


def time_call(call, rounds: int, device) -> dict:
    """Return what `time_in_turns` finds of one call."""
    return time_in_turns({"": call}, rounds, device)[""]


def divided(ms: dict, n: int) -> dict:
    """Return the milliseconds of one of the n things that were timed together."""
    return {key: value / n for key, value in ms.items()}


def span(ms: dict, digits: int = 1) -> str:
    """Format as "12.3 [12.0, 13.1]"."""
    return f"{ms['median']:.{digits}f} [{ms['low']:.{digits}f}, {ms['high']:.{digits}f}]"


def decode_steps(model, full_stream):
    """Decode STEPS tokens behind a stream past the last layer; no answer ends it early."""
    token = per_variant(full_stream.ids[:, -1:], len(full_stream.x))
    stream = with_room(full_stream)
    for _ in range(STEPS):
        stream = model.run(model.append(stream, token))
        model.logits(stream)


def device_rates(like: torch.Tensor) -> tuple[float, float]:
    """Return the FLOPs a second of a large matrix product, in the tensor's precision and on its
    device, and the bytes a second that a large copy reads and writes there.

    Of random numbers: a GPU multiplies constant ones faster. By `linear`, as models do: in bfloat16
    on a CPU, `@` may be ten times slower.
    """
    on_gpu = like.device.type == "cuda"
    n = 8192 if on_gpu else 1024
    a = torch.randn(n, n, device=like.device, dtype=like.dtype)
    source = torch.ones(2 ** 31 if on_gpu else 2 ** 27, dtype=torch.uint8, device=like.device)
    target = torch.empty_like(source)
    product_ms = time_call(lambda: F.linear(a, a), 5, like.device)["low"]
    copy_ms = time_call(lambda: target.copy_(source), 5, like.device)["low"]
    return 2000 * n ** 3 / product_ms, 2000 * len(source) / copy_ms


def floor_ms(layer_flops: list[float], layer_bytes: float, rate: float, bandwidth: float) -> float:
    """Return the least milliseconds of a prefill: a layer takes at least the time of its FLOPs at
    `rate` and that of reading its weights once at `bandwidth`, whichever is longer."""
    return 1000 * sum(max(n / rate, layer_bytes / bandwidth) for n in layer_flops)


def extra_memory(call, device) -> int:
    """Return the most bytes that torch holds for a call at once, beside what it held before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ["KINETO_LOG_LEVEL"] = "6"        # or the profiler says when it starts and stops
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        call()                          # torch.profiler's takes two seconds more to import
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def cache_bytes(stream) -> int:
    """Return the memory of a stream's cache: the storages its tensors lie in, each once."""
    storages = [tensor.untyped_storage() for kv in stream.cache for tensor in (kv.keys, kv.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def device_name(device) -> str:
    """Return the GPU with its CUDA version, or the CPU's model where Linux tells it."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1] if model else platform.machine()
