"""Which implementation of an op runs, and how those without a backward of their own differentiate."""
import functools
import itertools
import logging
import os
from collections.abc import Callable, Mapping

import jax

from pallas_kernels.tiling import Device

REFERENCE = "reference"
DEVICES: dict[str, tuple[str, Callable[[Device], bool]]] = {
    "mosaic_gpu": ("a Hopper GPU", lambda device: device.has_mosaic_gpu), "mosaic_tpu": ("a TPU", lambda device: device.platform == "tpu"),
    "triton": ("an NVIDIA GPU of compute capability 8.0 or later",
               lambda device: device.platform == "gpu" and device.capability is not None and device.capability >= (8, 0)),
}
"""What the kernels of an implementation run on: its name, and whether a device is such."""
_log = logging.getLogger(__name__)


def pick(op: str, device: Device, named: str | None, refusals: Mapping[str, str | None]) -> str:
    """The implementation to run; where none is named the choice is logged, once for each op and device. ``TPLLM_KERNELS=0`` makes it the reference.

    Args:
        op: its name, for messages.
        device: what the op is compiled for.
        named: an implementation, or None for the first that can do what is asked.
        refusals: implementation -> why it cannot do what is asked, or None where it can; the best known first. The reference always can.

    Raises:
        ValueError: the named one cannot, or there is none of that name.
    """
    if named is None and not are_kernels_on():
        _say(op, device, REFERENCE, (("TPLLM_KERNELS=0", "turns kernels off"),))
        return REFERENCE
    if named is None:
        passed = tuple(itertools.takewhile(lambda item: item[1] is not None, refusals.items()))
        chosen = REFERENCE if len(passed) == len(refusals) else list(refusals)[len(passed)]
        _say(op, device, chosen, passed)
        return chosen
    if named != REFERENCE and named not in refusals:
        raise ValueError(f"{op}: there is no implementation {named!r}; there are {', '.join([*refusals, REFERENCE])}")
    if refusal := refusals.get(named):
        raise ValueError(f"{op}: implementation {named!r} {refusal}; or leave implementation at None")
    return named


def needed_devices(implementation: str, device: Device, interpret: bool) -> str | None:
    """What the kernels of an implementation need instead of a device, by name; None where they run on it, or are interpreted."""
    name, is_such = DEVICES[implementation]
    return None if interpret or is_such(device) else name


def are_kernels_on() -> bool:
    """Whether ops that name no implementation may take a kernel: unless ``TPLLM_KERNELS`` is 0."""
    return os.environ.get("TPLLM_KERNELS") != "0"


@functools.cache
def _say(op: str, device: Device, chosen: str, refusals: tuple[tuple[str, str], ...]) -> None:
    reasons = "; ".join(f"{name} {refusal}" for name, refusal in refusals)
    _log.info("%s on %s: %s%s", op, device.kind or device.platform, chosen, f" ({reasons})" if reasons else "")


def with_gradient_of(reference: Callable, kernel: Callable) -> Callable:
    """``kernel``, a function of arrays, which differentiates as ``reference`` of the same arrays does."""
    run = jax.custom_vjp(kernel)
    run.defvjp(lambda *arrays: (kernel(*arrays), arrays), lambda arrays, gradients: jax.vjp(reference, *arrays)[1](gradients))
    return run
