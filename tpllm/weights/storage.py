"""How the matrices of a model are kept: dense or quantized, as XLA reads them or as kernels do."""
import dataclasses
from collections.abc import Mapping
from typing import Self

import numpy as np

from pallas_kernels.tiling import Device
from sharding_rules import Partition
from tpllm import ops
from tpllm.weights.accelerator import AcceleratorLayout
from tpllm.weights.layout import Layout
from tpllm.weights.native import NativeLayout
from tpllm.weights.policy import AS_STORED, Policy
from tpllm.weights.scheme import Scheme
from tpllm.weights.xla import XlaLayout

NATIVE = Device("cpu")
"""Stands for the native kernels of any CPU."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """One model's choice.

    Attributes:
        dtype: of activations, vectors, and matrices that are not quantized.
        policy: how matrices are quantized while they are loaded.
        device: for whose kernels matrices are laid out: a CPU's, the native ones, which take all of them; or an accelerator's, which take quantized
            ones. None for none: XLA multiplies all.
        stored: the schemes of the checkpoint's quantized matrices, by parameter name.
    """

    dtype: np.dtype
    policy: Policy = AS_STORED
    device: Device | None = None
    stored: Mapping[str, Scheme] = dataclasses.field(default_factory=dict)

    @classmethod
    def on(cls, partition: Partition, dtype: np.dtype, policy: Policy = AS_STORED, *, stored: Mapping[str, Scheme] | None = None) -> Self:
        """The storage for the kernels of a mesh, where it has some."""
        return cls(dtype, policy, ops.device_with_kernels(partition), stored or {})

    @property
    def is_native(self) -> bool:
        """Whether the native kernels multiply all matrices, which give a row the same bits at any number of rows."""
        return self.device is not None and self.device.platform == NATIVE.platform

    def layout(self, shape: tuple[int, ...], axes: tuple[str | None, ...], partition: Partition, *, name: str) -> Layout | None:
        """How a parameter lies in memory; None for a plain array of ``dtype``.

        Raises:
            ShardingError: a dim that its mesh axis does not divide, or that cuts groups where no scale can be repeated.
        """
        if len(shape) != 2:
            return None
        scheme = self.policy.choose(name, self.stored.get(name))
        if scheme is None and not self.is_native:
            return None
        partition.sharding(axes, shape=shape, name=name)
        if self.is_native:
            return NativeLayout.of(scheme, shape, axes, partition, dtype=self.dtype, name=name)
        found = self.device and AcceleratorLayout.of(scheme, shape, axes, partition, device=self.device, name=name)
        return found or XlaLayout.of(scheme, shape, axes, partition, name=name)
