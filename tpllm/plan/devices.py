"""What the devices of a topology are: their memory, speeds and links, from data sheets, and how a slice of TPUs is wired.

Memory of TPUs is what libtpu 0.0.42 lets a program have. Speeds are the data sheets': NVIDIA H100 SXM and H200 (NVLink 4: 900 GB/s both ways
together), and https://cloud.google.com/tpu/docs (v5e 1600, v5p 4800, v6e 3584 Gbit/s over all links of a chip).
"""
import dataclasses
import math
import os
from collections.abc import Sequence

import jax

from tpllm.aot.topologies import describe_devices
from tpllm.engine.roofline import PEAKS
from tpllm.errors import ConfigError

GIB = 2**30
EXAMPLES = "write 'h200:8', 'v5e:4x4' or 'cpu:8'"
WRAPS_FROM = {"TPU v5 lite": 16, "TPU v5": 4, "TPU v6 lite": 16}  # a side of so many chips is closed to a ring


@dataclasses.dataclass(frozen=True)
class DeviceLimits:
    """What one device can do.

    Attributes:
        memory_bytes: that a program can have; None where it is the host's.
        bytes_per_s, flops: of memory, and of dense bfloat16 products; None where that is not known.
        link_bytes_per_s: one way, of a switch's port, or of one of a chip's links to its neighbours; None where devices share memory.
        hop_s: what a message takes beside its bytes.
        is_switched: whether every device reaches every other alike.
    """

    memory_bytes: int | None
    bytes_per_s: float | None
    flops: float | None
    link_bytes_per_s: float | None = None
    hop_s: float = 0.0
    is_switched: bool = True


LIMITS = {
    "NVIDIA H100 80GB HBM3": DeviceLimits(85 * 10**9, *PEAKS["NVIDIA H100 80GB HBM3"], 450e9, 2e-6),
    "NVIDIA H200": DeviceLimits(151397597184, *PEAKS["NVIDIA H200"], 450e9, 2e-6),
    "TPU v5 lite": DeviceLimits(int(15.75 * GIB), *PEAKS["TPU v5 lite"], 50e9, 1e-6, is_switched=False),
    "TPU v5": DeviceLimits(int(95.74 * GIB), *PEAKS["TPU v5p"], 100e9, 1e-6, is_switched=False),
    "TPU v6 lite": DeviceLimits(int(31.25 * GIB), *PEAKS["TPU v6 lite"], 112e9, 1e-6, is_switched=False),
    "cpu": DeviceLimits(None, None, None),
}


def find_devices(topology: str) -> list[jax.Device]:
    """The devices of ``"h200:8"``, ``"v5e:4x4"``, or ``"cpu:8"``, which are this machine's own, virtual ones.

    Raises:
        ConfigError: a topology that cannot be; a compiler that is not installed, and what to install; virtual devices asked for too late.
    """
    kind, _, size = topology.partition(":")
    if kind != "cpu":
        return describe_devices(topology)
    if not size.isdecimal() or not 1 <= int(size) <= 1024:
        raise ConfigError(f"topology {topology!r}: write how many CPU devices as a whole number from 1 to 1024, as in 'cpu:8'")
    try:
        jax.config.update("jax_num_cpu_devices", int(size))
    except RuntimeError:  # JAX has its devices already
        if len(jax.devices("cpu")) < int(size):
            raise ConfigError(f"topology {topology!r}: JAX has made {len(jax.devices('cpu'))} CPU devices already; plan in a fresh process, or set "
                              f"JAX_NUM_CPU_DEVICES={size} in its environment") from None
    return jax.devices("cpu")[:int(size)]


def limits_of(device: jax.Device) -> DeviceLimits:
    """The limits of a device's kind.

    Raises:
        ConfigError: a kind that no plan is made for.
    """
    if device.device_kind not in LIMITS:
        raise ConfigError(f"no plan is made for a {device.device_kind}, whose memory and links are not known here; known: {', '.join(LIMITS)}; "
                          f"{EXAMPLES}")
    return LIMITS[device.device_kind]


def wiring(devices: Sequence[jax.Device], all_devices: Sequence[jax.Device]) -> tuple[float | None, int]:
    """(how fast a device of a group sends to the group, one way; hops from one end of it to the other).

    On a slice of TPUs the links are those along the sides that the group spans: two of a side that is closed to a ring, else one. Beside a switch
    messages go as in a binary tree.

    Args:
        devices: of the group.
        all_devices: of the topology.
    """
    limits = limits_of(devices[0])
    if limits.link_bytes_per_s is None or limits.is_switched:
        return limits.link_bytes_per_s, math.ceil(math.log2(len(devices)))
    sides = [len(set(values)) for values in zip(*(device.coords for device in all_devices), strict=True)]
    spans = [len(set(values)) for values in zip(*(device.coords for device in devices), strict=True)]
    is_ring = [span == side >= WRAPS_FROM[devices[0].device_kind] for span, side in zip(spans, sides, strict=True)]
    num_links = sum(1 + ring for span, ring in zip(spans, is_ring, strict=True) if span > 1)
    num_hops = sum(span // 2 if ring else span - 1 for span, ring in zip(spans, is_ring, strict=True))
    return num_links * limits.link_bytes_per_s, num_hops


def prepare_environment() -> None:
    """Keep accelerators of this machine, and the log of their compilers, out of a plan; to be called before JAX has devices."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
