"""Rates and memory of accelerators, from their makers' data sheets.

Sources: NVIDIA's data sheets of the A100, H100, H200 and DGX H100;
https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e.
"""

from typing import NamedTuple

import jax


class Rates(NamedTuple):
  """Rates of a device, a second, and its memory.

  Attributes:
    flops: dense bfloat16 operations a second.
    memory_bytes: of the device.
    link: bytes a second that a device can receive from those of its node, or of a TPU's slice: half
      of the bandwidth in both directions.
    network: bytes a second that a device can receive from other nodes.
  """

  flops: float
  memory_bytes: float
  link: float
  network: float


# By the beginning of JAX's name of the device; the first that fits.
RATES = {
  "NVIDIA H100 PCIe": Rates(756e12, 80e9, 64e9, 50e9),
  "NVIDIA H100": Rates(989e12, 80e9, 450e9, 50e9),
  "NVIDIA H200": Rates(989e12, 141e9, 450e9, 50e9),
  "NVIDIA A100": Rates(312e12, 80e9, 300e9, 25e9),
  "TPU v4": Rates(275e12, 32e9, 300e9, 300e9),
  "TPU v5 lite": Rates(197e12, 16e9, 200e9, 200e9),
  "TPU v5e": Rates(197e12, 16e9, 200e9, 200e9),
  "TPU v5p": Rates(459e12, 95e9, 600e9, 600e9),
  "TPU v5": Rates(459e12, 95e9, 600e9, 600e9),
  "TPU v6 lite": Rates(918e12, 32e9, 400e9, 400e9),
  "TPU v6e": Rates(918e12, 32e9, 400e9, 400e9),
}


def rates(device: jax.Device) -> Rates | None:
  """Returns the rates of a device; None where they are not known."""
  return next((rates for name, rates in RATES.items() if device.device_kind.startswith(name)), None)
