"""A place where kernels run."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """A place to run: ``cpu``, ``cuda``, ``hip``, or an architecture such as ``gfx942`` or ``sm_90``."""

    name: str

    @property
    def platform(self) -> str:
        """``cpu``, ``cuda`` or ``hip``."""
        if self.name.startswith("gfx"):
            return "hip"
        return "cuda" if self.name.startswith("sm_") else self.name

    @staticmethod
    def parse(name: str) -> Target:
        target = Target(name)
        if target.platform not in ("cpu", "cuda", "hip"):
            raise ValueError(f"target must be 'cpu', 'cuda', 'hip', 'gfx…' or 'sm_…', got {name!r}")
        return target

    @staticmethod
    def of(device: torch.device) -> Target:
        if device.type != "cuda":
            return Target(device.type)
        return Target("hip" if torch.version.hip else "cuda")
