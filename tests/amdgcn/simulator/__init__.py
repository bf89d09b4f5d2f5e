"""A simulator of AMD's CDNA instruction set (gfx90a, gfx942, gfx950), of as much of it as the compiler emits for us.

It is strict: an unknown instruction, operand or modifier raises and names its line, and so does an access outside every
buffer. Not modelled: time, waiting for memory (an access is complete at once), races between waves, atomics, matrix
instructions, scratch memory, and whatever else raises :class:`Unsupported`.
"""

from amdgcn.simulator.assembly import Unsupported
from amdgcn.simulator.machine import Result, run
from amdgcn.simulator.memory import AccessError, Arena

__all__ = ["AccessError", "Arena", "Result", "Unsupported", "run"]
