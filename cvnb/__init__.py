__version__ = "0.1.0"

# nbdev keeps the rest of this file, which belongs to no notebook: no package may be imported before this line.
from .core.telemetry import disable_telemetry as _disable_telemetry

_disable_telemetry()
